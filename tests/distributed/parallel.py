"""What the processes of `test_tensor_parallel` run."""

import os
import tempfile

import torch.distributed as dist
from transformers import LlamaForCausalLM

from peft_gradinit import LoraGAConfig
from tests.distributed.plain import CONFIGS, batches, measured, products
from tests.helpers import pico_llama


def cut(tp_size, fsdp_size=None):
    """A model whose layers are cut over processes by transformers."""
    from transformers.distributed import DistributedConfig

    directory = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directory, 0)
    if dist.get_rank() == 0:
        pico_llama().save_pretrained(directory[0])
    dist.barrier()
    sizes = DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
    return LlamaForCausalLM.from_pretrained(directory[0], distributed_config=sizes).eval()


def whole():
    return {c.__name__: products(measured(batches(3), c, estimator="dense")) for c in CONFIGS}


def over_two():
    return {
        c.__name__: products(measured(batches(3), c, cut(2), estimator="dense")) for c in CONFIGS
    }


def over_two_by_two():
    return {
        c.__name__: products(measured(batches(3), c, cut(2, 2), estimator="dense")) for c in CONFIGS
    }


def loaded_by_the_first_alone():
    """As FSDP does with `cpu_ram_efficient_loading`: what is there is calibrated, or refused."""
    os.environ["ACCELERATE_USE_FSDP"] = os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    directory = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directory, 0)
    if dist.get_rank() == 0:
        pico_llama().save_pretrained(directory[0])
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(directory[0]).eval()
    return products(measured(batches(3), LoraGAConfig, model, estimator="dense"))


def on_meta_on_one():
    model = pico_llama()
    if dist.get_rank() == 1:
        model = model.to("meta")
    measured(batches(3), LoraGAConfig, model, estimator="dense")
