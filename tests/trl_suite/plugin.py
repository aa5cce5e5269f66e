"""A pytest plug-in that runs TRL's own tests with one of this package's types for `LoraConfig`.

    python -m pytest -p tests.trl_suite.plugin --type lora_ga <TRL's tests>

`peft.LoraConfig` is the type's config before TRL's test modules are imported. Adapters are deferred,
and every trainer has the callback that starts them: the one line that users add. What the tests
load from the Hub is a stand-in. Tests without a LoRA config are left out.
"""

import inspect

import datasets
import peft
import torch
from transformers import Trainer, TrainingArguments

from peft_gradinit import CalibrationCallback
from peft_gradinit.tuners import deferred_adapters
from tests.methods.rows import INFO, WITH_DATA
from tests.trl_suite.stand_ins import OWNER, rows

PLAIN = "lora"


def pytest_addoption(parser):
    group = parser.getgroup("trl_suite")
    group.addoption("--type", choices=[PLAIN, *INFO], required=True, help="for LoraConfig")


def pytest_configure(config):
    torch.set_num_threads(1)
    method = config.getoption("--type")
    if method != PLAIN:
        substitute(method)
    datasets.load_dataset = _loading(datasets.load_dataset)
    TrainingArguments.__post_init__ = _on_the_cpu(TrainingArguments.__post_init__)


def substitute(method: str) -> None:
    """Let `peft.LoraConfig` be the config of a type, and every trainer start its adapters."""
    config_cls = INFO[method]
    make, train = config_cls.__init__, Trainer.train

    def __init__(self, *args, **options):
        if method in WITH_DATA:
            options.setdefault("calibration", "deferred")
        if method == "eva":
            options.setdefault("rho", 1)  # ranks from data would come after the optimiser
        make(self, *args, **options)

    def train_started(self, *args, **options):
        if deferred_adapters(self.model):
            self.add_callback(CalibrationCallback(self))
        return train(self, *args, **options)

    config_cls.__init__ = __init__
    Trainer.train = train_started
    peft.LoraConfig = config_cls


def _loading(load_dataset):
    def load(path, name=None, *, split=None, **options):
        if path != f"{OWNER}/zen":
            return load_dataset(path, name, split=split, **options)
        made = rows(name)
        return made if split is None else made[split]

    return load


def _on_the_cpu(post_init):
    """TRL trains in bfloat16, which Transformers wants to be told of where there is no GPU."""

    def __post_init__(self):
        self.use_cpu = not torch.accelerator.is_available()
        post_init(self)

    return __post_init__


def pytest_collection_modifyitems(config, items):
    kept = [item for item in items if "LoraConfig(" in inspect.getsource(item.function)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
