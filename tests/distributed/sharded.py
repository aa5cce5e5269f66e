"""What the processes of `test_sharded` run: models whose weights are spread over processes."""

import os
import tempfile

import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_gradinit import (
    Calibration,
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    SVFitConfig,
    initialize,
)
from tests.distributed.plain import batches, rows
from tests.helpers import pad, pico_llama

CONFIGS = (LoraGAConfig, LoraOneConfig, EvaConfig, CorDAConfig, PiSSAConfig, SVFitConfig)
N_STEPS = 4
ZERO3 = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def calibration():
    """13 batches for two processes."""
    return Calibration(batches(3), progress=False, estimator="dense")


def adapter(config_cls, data=None):
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if config_cls.needed() != "nothing":
        values |= {"lora_alpha": 8, "calibration": data or calibration()}
    if config_cls is EvaConfig and data == "deferred":
        values["rho"] = 1.0
    return config_cls(**values)


# The layouts -----------------------------------------------------------------------------------------


def fsdp2(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp1(model):
    """Wrapped by the policy that Trainer and Accelerate use for PEFT models."""
    policy = fsdp_auto_wrap_policy(model)
    device = torch.device("cpu")
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=device
    )


def native():
    """Loaded in parts by transformers itself."""
    from transformers.distributed import DistributedConfig

    directory = [tempfile.mkdtemp()]
    dist.broadcast_object_list(directory, 0)
    if dist.get_rank() == 0:
        pico_llama().save_pretrained(directory[0])
    dist.barrier()
    parts = DistributedConfig(fsdp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(directory[0], distributed_config=parts).eval()


def zero3():
    """Made under `zero.Init`, with the weights of `pico_llama`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    reference = pico_llama()
    with deepspeed.zero.Init(config_dict_or_path=ZERO3):
        model = LlamaForCausalLM(reference.config).eval()
    for part, whole in zip(model.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([part], modifier_rank=0):
            if dist.get_rank() == 0:
                part.data.copy_(whole)
    return model


def whole(config_cls):
    return training(get_peft_model(pico_llama(), adapter(config_cls)))


def deferred_whole(config_cls):
    model = get_peft_model(pico_llama(), adapter(config_cls, "deferred"))
    if config_cls.needed() != "nothing":
        initialize(model, calibration())
    return training(model)


def fsdp2_then_adapter(config_cls):
    return training(get_peft_model(fsdp2(pico_llama()), adapter(config_cls)))


def fsdp2_kept_whole_between_forward_and_backward(config_cls):
    model = fsdp2(pico_llama(), reshard_after_forward=False)
    return training(get_peft_model(model, adapter(config_cls)))


def fsdp2_with_checkpointing(config_cls):
    model = pico_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return training(get_peft_model(fsdp2(model), adapter(config_cls)))


def adapter_then_fsdp2(config_cls):
    return training(fsdp2(get_peft_model(pico_llama(), adapter(config_cls))))


def deferred_then_fsdp2(config_cls):
    model = fsdp2(get_peft_model(pico_llama(), adapter(config_cls, "deferred")))
    if config_cls.needed() != "nothing":
        initialize(model, calibration())
    return training(model)


def adapter_then_fsdp1(config_cls):
    return training(fsdp1(get_peft_model(pico_llama(), adapter(config_cls))))


def deferred_then_fsdp1(config_cls):
    model = fsdp1(get_peft_model(pico_llama(), adapter(config_cls, "deferred")))
    if config_cls.needed() != "nothing":
        initialize(model, calibration())
    return training(model)


def native_then_adapter(config_cls):
    return training(get_peft_model(native(), adapter(config_cls)))


def zero3_then_adapter(config_cls):
    import deepspeed

    model = get_peft_model(zero3(), adapter(config_cls))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)
    found = []
    for step in range(N_STEPS):
        loss = engine(**batch_of(step)).loss
        engine.backward(loss)
        engine.step()
        found.append(mean(loss))
    return found


# Training ------------------------------------------------------------------------------------------


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def world():
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def batch_of(step):
    """This process's part of eight sequences of one length, so that means of means are means."""
    size, rank = world()
    return pad([row[:12] for row in rows()[8 * step : 8 * step + 8]][rank::size])


def mean(loss):
    size, _ = world()
    total = loss.detach().clone()
    if size > 1:
        dist.all_reduce(total)
    return total.item() / size


def training(model):
    """Losses of AdamW steps; gradients that nobody averages are averaged here."""
    size, _ = world()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    sharded = isinstance(trainable(model)[0], DTensor) or isinstance(
        model, FullyShardedDataParallel
    )
    found = []
    for step in range(N_STEPS):
        loss = model(**batch_of(step)).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in [] if sharded or size == 1 else trainable(model):
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        found.append(mean(loss))
    return found


def run(layouts):
    return {(f.__name__, c.__name__): f(c) for f in layouts for c in CONFIGS}


def run_whole():
    return run([whole, deferred_whole])


FSDP2 = (
    fsdp2_then_adapter,
    fsdp2_kept_whole_between_forward_and_backward,
    fsdp2_with_checkpointing,
    adapter_then_fsdp2,
    deferred_then_fsdp2,
)


def run_fsdp2():
    return run(FSDP2)


def run_fsdp1():
    return run([adapter_then_fsdp1, deferred_then_fsdp1])


def run_native():
    return run([native_then_adapter])


def run_zero3():
    return run([zero3_then_adapter])


def saved_by_fsdp2():
    """The trained adapter as a `Trainer` would save it, and the loss that it ends with."""
    model = fsdp2(get_peft_model(pico_llama(), adapter(LoraGAConfig)))
    losses = training(model)
    everything = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    entries = get_peft_model_state_dict(model, state_dict=everything) if everything else {}
    return losses, entries


def saved_whole():
    model = get_peft_model(pico_llama(), adapter(LoraGAConfig))
    return training(model), get_peft_model_state_dict(model)
