"""What the processes of `test_data_parallel` run."""

import os
import signal
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_gradinit import (
    Calibration,
    CalibrationCallback,
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    calibrate,
)
from peft_gradinit.layouts import whole, world
from tests.helpers import pad, pico_llama, rows_of, token_batches

N = 37
CONFIGS = (LoraGAConfig, LoraOneConfig, EvaConfig)
STARTED = (*CONFIGS, CorDAConfig, PiSSAConfig)


def rows():
    return rows_of(token_batches(n=N, batch_size=5, length=24, seed=3))


def wide():
    """Wide enough that the estimators are sketches."""
    return pico_llama(hidden_size=192, intermediate_size=448, num_hidden_layers=1)


def config(config_cls):
    return config_cls(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def products(result):
    """What does not depend on signs: `U S Vh` (EVA: `Vh^T S^2 Vh`), and the bytes."""
    found = {}
    for name, svd in result.triplets.items():
        left = svd.U if len(svd.U) else svd.Vh.T
        found[name] = ((left * svd.S) @ svd.Vh, svd.Vh.numpy().tobytes())
    return found


def measured(data, config_cls=LoraGAConfig, model=None, **options):
    calibration = Calibration(data, **{"progress": False, **options})
    return calibrate(model or pico_llama(), config(config_cls), calibration)


def batches(size=5):
    return [pad(rows()[i : i + size]) for i in range(0, N, size)]


def loader(**options):
    return DataLoader(rows(), batch_size=4, collate_fn=pad, **options)


def own_batches():
    """A part of the data for each process, in batches of its own, 4 and 9 of them."""
    mine = rows()[:16] if dist.get_rank() == 0 else rows()[16:]
    return [pad(mine[i : i + 4]) for i in range(0, len(mine), 4)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


def prepared(**options):
    accelerator = Accelerator(cpu=True, **options)
    assert accelerator.num_processes == 2
    return accelerator.prepare(loader(shuffle=True))


LOADERS = {
    "list": batches,
    "one-batch": lambda: batches(N),
    "single-rows": lambda: batches(1),
    "generator": lambda: iter(batches()),
    "loader": loader,
    "shuffled": lambda: loader(shuffle=True),
    "generator-of-its-own": lambda: loader(
        shuffle=True, generator=torch.Generator().manual_seed(dist.get_rank())
    ),
    "distributed-sampler": lambda: loader(sampler=DistributedSampler(rows(), shuffle=True)),
    "stream": lambda: DataLoader(Stream(), batch_size=4, collate_fn=pad),
    "prepared": prepared,
    "prepared-in-split-batches": lambda: prepared(
        dataloader_config=DataLoaderConfiguration(split_batches=True)
    ),
    "prepared-and-seeded": lambda: prepared(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    ),
    "dispatched": lambda: prepared(
        dataloader_config=DataLoaderConfiguration(dispatch_batches=True)
    ),
    "prepared-stream": lambda: Accelerator(cpu=True).prepare(
        DataLoader(Stream(), batch_size=4, collate_fn=pad)
    ),
    "own": own_batches,
}


def all_loaders():
    """Every kind of loader, LoRA-GA with the dense estimator; and other methods on one of them."""
    found = {}
    for name, make in LOADERS.items():
        result = measured(make(), estimator="dense")
        found[name] = (products(result), result.facts.n_tokens, result.facts.n_sequences)
    return found


def reference():
    return products(measured(batches(), estimator="dense"))


def sketched(split=5):
    found = {}
    for config_cls in CONFIGS:
        result = measured(batches(split), config_cls, wide())
        found[config_cls.__name__] = products(result)
        found[config_cls.__name__, "energy"] = dict(result.energy)
    return found


def sketched_reference():
    return sketched(N)


# From calibration to training ------------------------------------------------------------------


def started(config_cls):
    """An adapter from the data of all processes, its report, and three steps under DDP."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if config_cls.needed() != "nothing":
        values["calibration"] = Calibration(batches(), progress=False, estimator="dense")
    model = get_peft_model(pico_llama(), config_cls(**values))
    report = model.base_model.init_report["default"]
    step = report.step and (report.step.loss_before, report.step.loss_after, report.step.scale)
    adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "losses": losses(model),
        "step": step,
        "adapter": adapter,
        "facts": report.facts and report.facts.n_tokens,
    }


def losses(model, n_steps=4):
    """Losses of steps on rows that the processes share; the mean over all rows is returned."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    wrapped = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(n_steps):
        equal = [
            row[:12] for row in rows()[8 * step : 8 * step + 8]
        ]  # equal lengths: equal weights
        loss = wrapped(**pad(equal[rank::size])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if size > 1:
            dist.all_reduce(mean)
        found.append(mean.item() / size)
    return found


def trained():
    return {c.__name__: started(c) for c in STARTED}


# Faults --------------------------------------------------------------------------------------------


def one_raises_in_the_loss():
    def loss_fn(model, batch):
        if dist.get_rank() == 1:
            raise ValueError("no such luck")
        return model(**batch).loss

    measured(batches(), loss_fn=loss_fn)


def one_raises_in_the_data():
    def data():
        yield from batches()[:3]
        if dist.get_rank() == 1:
            raise OSError("disk gone")
        yield from batches()[3:]

    measured(data())


def one_has_no_data():
    measured(batches() if dist.get_rank() == 0 else [])


def failures():
    """What each process is told in each case, one after the other."""
    said = {}
    for case in (one_raises_in_the_loss, one_raises_in_the_data, one_has_no_data):
        try:
            case()
        except Exception as error:  # noqa: BLE001, PERF203 the test reads what it says
            said[case.__name__] = f"{type(error).__name__}: {error}"
    return said


def one_is_killed():
    def loss_fn(model, batch):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return model(**batch).loss

    measured(batches(), loss_fn=loss_fn)


def one_does_not_come():
    world.TIMEOUT = timedelta(seconds=5)
    if dist.get_rank() == 0:
        measured(batches())


def a_harmful_step_is_scaled_alike():
    values = {"r": 4, "lora_alpha": 8, "stable_gamma": 0.1}
    values["target_modules"] = ["v_proj", "lm_head"]
    calibration = Calibration(batches(), progress=False)
    model = get_peft_model(pico_llama(), LoraOneConfig(**values, calibration=calibration))
    return model.base_model.init_report["default"].step


# The Trainer callback ------------------------------------------------------------------------------


CALLED_BACK = {
    "LoraGAConfig": (LoraGAConfig, {}),
    "LoraOneConfig": (LoraOneConfig, {}),
    "auto": (LoraGAConfig, {"target_modules": "auto"}),
}


def by_callback(names=tuple(CALLED_BACK), sharded=False):
    """The start that `CalibrationCallback` gives under `Trainer`, and the losses that follow."""
    found = {}
    for name in names:
        config_cls, own = CALLED_BACK[name]
        values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | own
        config = config_cls(**values, task_type="CAUSAL_LM", calibration="deferred")
        model = get_peft_model(pico_llama(), config)
        with tempfile.TemporaryDirectory() as directory:
            trainer = trainer_of(model, directory, sharded)
            trainer.add_callback(Start(found, model))
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        report = model.base_model.init_report["default"]
        found[name] = (found.pop("start"), losses, report.facts.n_sequences)
    return found


def suggested_head_rate():
    """The rate of an output layer that is trained in full beside plain LoRA."""
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(pico_llama(), config)
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(model, directory, head_learning_rate="suggested")
        trainer.train()
    return [group["initial_lr"] for group in trainer.optimizer.param_groups]


def trainer_of(model, directory, sharded=False, **options):
    size = dist.get_world_size() if dist.is_initialized() else 1
    values = {
        "per_device_train_batch_size": 4 // size,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "save_strategy": "no",
    }
    data = [{key: value[0] for key, value in pad([row[:12]]).items()} for row in rows()]
    arguments = TrainingArguments(directory, **values)
    trainer = Trainer(model, arguments, train_dataset=data[: 4 * (N // 4)])
    assert trainer.args.world_size == size
    if sharded:
        shard(trainer)
    trainer.add_callback(CalibrationCallback(trainer, estimator="dense", **options))
    return trainer


def shard(trainer):
    """Let Accelerate shard by FSDP2, which it offers on accelerators alone."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    shared = {"fsdp_plugin": plugin, "distributed_type": DistributedType.FSDP}
    type(trainer.accelerator.state)._shared_state.update(shared)
    PartialState._shared_state.update(shared)
    trainer.is_fsdp_enabled = True


def by_callback_under_fsdp2():
    """Ranks and targets from the data, before the model is sharded."""
    return by_callback(("auto",), sharded=True)


def loaded_on_the_first_alone():
    """The processes but the first have weights without values, until FSDP2 sends them."""
    config = LoraOneConfig(target_modules="auto", task_type="CAUSAL_LM", calibration="deferred")
    model = get_peft_model(pico_llama(seed=dist.get_rank()), config)
    with tempfile.TemporaryDirectory() as directory:
        trainer_of(model, directory, sharded=True).train()


class Start(TrainerCallback):
    """Notes the factors before the first step."""

    def __init__(self, found, model):
        self.found, self.model = found, model

    def on_train_begin(self, *_, **__):
        parts = {n: whole(p.detach()).clone() for n, p in self.model.named_parameters()}
        self.found["start"] = {n: p for n, p in parts.items() if "lora_" in n}
