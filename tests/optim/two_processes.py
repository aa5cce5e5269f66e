"""What the processes of `test_layouts` run: every optimiser under DDP and FSDP2."""

import copy
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_gradinit import pairs
from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import LoraMuon
from tests.distributed.parallel import cut
from tests.distributed.sharded import fsdp1
from tests.helpers import pico_llama, token_batches
from tests.methods.rows import started
from tests.moe.models import mixtral
from tests.optim.rows import ROWS

N_STEPS = 4
RANKS = {"v_proj": 1, "q_proj": 3}
"""Ranks beside 4: no rows of `A` for the second process, and one for it to the first one's two."""


def lora(model=None, dtype=torch.float32):
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "rank_pattern": RANKS}
    model = get_peft_model(model or pico_llama(), LoraConfig(**options, bias="lora_only"))
    torch.manual_seed(1)
    for pair in pairs(model):
        nn.init.normal_(pair.B, std=0.1)
    return model.to(dtype)


def whole(tensor):
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach().clone()


def gradients(model):
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def trained(model):
    return {
        n.removeprefix("module."): whole(p) for n, p in model.named_parameters() if p.requires_grad
    }


def batch(step):
    """This process's half of a batch."""
    rank = dist.get_rank()
    return {k: v[2 * rank : 2 * rank + 2, :10] for k, v in token_batches()[step % 3].items()}


def train(model, optimizer, n=N_STEPS):
    """The gradients of every step, as all processes see them, and the parameters at the end."""
    found = []
    for step in range(n):
        model(**batch(step)).loss.backward()
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found, trained(model)


def replayed(model, optimizer, found):
    """The parameters after the same gradients in one process."""
    parameters = dict(model.named_parameters())
    for step in found:
        for name, gradient in step.items():
            parameters[name.removeprefix("module.")].grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def worst(got, want):
    """Largest relative difference of a parameter, 0 if all are equal bit for bit."""
    assert got.keys() == want.keys()
    return max(((got[n] - want[n]).norm() / want[n].norm().clamp_min(1e-20)).item() for n in want)


def against_one_process(make, dtype=torch.float32):
    """Each optimiser's difference to one process that is given the same gradients."""
    found = {}
    for name, row in ROWS.items():
        model, optimizer = make(row, dtype)
        steps, ends = train(model, optimizer)
        alone = lora(dtype=dtype)
        assert worst(trained(alone), ends) > 1e-4
        found[name] = worst(replayed(alone, row.make(alone, head_lr=1e-3), steps), ends)
    return found


def ddp():
    def make(row, dtype):
        model = lora(dtype=dtype)
        optimizer = row.make(model, head_lr=1e-3)
        return DistributedDataParallel(model), optimizer

    return against_one_process(make)


def fsdp2(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def made_after(row, dtype):
    model = fsdp2(lora(dtype=dtype))
    parts = [p.to_local().shape[0] for n, p in model.named_parameters() if "v_proj.lora_A" in n]
    assert all(p == 1 - dist.get_rank() for p in parts)
    return model, row.make(model, head_lr=1e-3)


def fsdp2_made_after():
    return against_one_process(made_after)


def fsdp2_bfloat16():
    return against_one_process(made_after, torch.bfloat16)


def fsdp2_made_before():
    """As `Trainer` does it: the optimiser first, then Accelerate shards the model."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)

    def make(row, dtype):
        model = lora(dtype=dtype)
        return accelerator.prepare(model, row.make(model, head_lr=1e-3))

    return against_one_process(make)


def fsdp2_anchored():
    return _replayed_muon(fsdp2(started("lora_ga")), started("lora_ga"))


def fsdp2_experts():
    """The experts' factors are cut by rows as any matrix; they are blocks when they are whole."""

    def make():
        options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        return get_peft_model(mixtral(), LoraConfig(**options, target_parameters=targets))

    model = make()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _replayed_muon(model, make())


def fsdp2_hybrid():
    """A mesh of two dimensions, one of copies and one of parts."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "parts"))
    return _replayed_muon(fully_shard(lora(), mesh=mesh), lora())


def _replayed_muon(model, alone):
    before = trained(model)
    steps, ends = train(model, LoraMuon(model, lr=0.03, head_lr=1e-3))
    return worst(replayed(alone, LoraMuon(alone, lr=0.03, head_lr=1e-3), steps), ends), worst(
        before, ends
    )


def fsdp2_resumed():
    """A checkpoint as torch and Accelerate write it, loaded into a new optimiser."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    found = {}
    for name, row in ROWS.items():
        if row.state == 0:
            continue  # torch cannot load the whole state of an optimiser without one, SGD neither
        model, optimizer = made_after(row, torch.float32)
        train(model, optimizer, 2)
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        # The second half from the same weights, with and without a new optimiser.
        weights = {n: p.to_local().clone() for n, p in model.named_parameters()}
        _, straight = train(model, optimizer, 2)
        for n, p in model.named_parameters():
            p.to_local().detach().copy_(weights[n])
        fresh = row.make(model, head_lr=1e-3)
        set_optimizer_state_dict(model, fresh, saved, options=options)
        _, resumed = train(model, fresh, 2)
        found[name] = worst(resumed, straight)
    return found


def fsdp2_stale():
    """Made before sharding, by hand: nobody has put the new parameters in."""
    model = lora()
    optimizer = LoraMuon(model, lr=0.03, head_lr=1e-3)
    model = fsdp2(model)
    model(**batch(0)).loss.backward()
    return message_of(optimizer.step)


def zero_2():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = lora()
    optimizer = LoraMuon(model, lr=0.03, head_lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }

    def engine():
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        optimizer.step()

    return message_of(engine)


def message_of(function):
    try:
        function()
    except ConfigError as error:
        return str(error)
    return "no error"


def refused():
    """What is said under the layouts that are not served."""
    columns = get_peft_model(pico_llama(), LoraConfig(r=4, target_modules="all-linear"))
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    made = LoraMuon(before := lora(), lr=0.03, head_lr=1e-3)
    wrapped = fsdp1(before)
    wrapped(**batch(0)).loss.backward()
    return {
        "columns": message_of(lambda: LoraMuon(columns, lr=0.1, head_lr=0.1)),
        "FSDP1 after": message_of(lambda: LoraMuon(wrapped, lr=0.1, head_lr=0.1)),
        "FSDP1 before": message_of(made.step),
    }


def tensor_parallel():
    """What is said of a model that Transformers has cut over processes, which older versions cannot."""
    model = lora(cut(2))
    return message_of(lambda: LoraMuon(model, lr=0.1, head_lr=0.1))


def several():
    """All that two processes do in one launch: starting them takes longest."""
    return {f.__name__: f() for f in (ddp, fsdp2_made_after, fsdp2_stale, refused)}


def more():
    functions = (
        fsdp2_bfloat16,
        fsdp2_resumed,
        fsdp2_anchored,
        fsdp2_experts,
        fsdp2_hybrid,
        fsdp2_made_before,
    )
    return {f.__name__: f() for f in functions}
