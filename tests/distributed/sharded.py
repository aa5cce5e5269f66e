"""What the processes of `test_sharded` run: models whose weights are spread over processes."""

import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_gradinit import Calibration
from tests.distributed.plain import CONFIGS, batches, config, measured, products, rows
from tests.helpers import pad, pico_llama


def fsdp2(model=None, **options):
    model = model or pico_llama()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def probe():
    out = {}
    for name, make in {
        "fsdp2": fsdp2,
        "no-reshard": lambda: fsdp2(reshard_after_forward=False),
    }.items():
        for c in CONFIGS:
            try:
                r = measured(batches(3), c, make(), estimator="dense")
                out[name, c.__name__] = products(r)
            except Exception as e:
                import traceback

                out[name, c.__name__] = traceback.format_exc()[-1500:]
    return out


def ref():
    return {c.__name__: products(measured(batches(3), c, estimator="dense")) for c in CONFIGS}
