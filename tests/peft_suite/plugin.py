"""A pytest plug-in that runs PEFT's own tests with one of this package's types for `LoraConfig`.

    python -m pytest -p tests.peft_suite.plugin --type lora_ga <PEFT's tests>

`peft.LoraConfig` is the type's config before PEFT's test modules are imported, so that their tables
and their code make adapters of the type. What the type adds to LoRA is filled in: the data, and a
plain start for layers that it cannot start. Tests without a LoRA config are left out.

Outputs that PEFT's tests compare to the last bits need only be equal up to rounding, as our layers
multiply in another order.

PEFT asks for a start that changes the outputs by `init_lora_weights=False`. Here it is the type's
own start, to which random numbers are added as training would add them.
"""

import functools
import sys
import types
from importlib.machinery import ModuleSpec

import peft
import torch

from peft_gradinit.tuners.lora import GradInitModel
from peft_gradinit.tuners.svfit import SVFitModel
from tests.methods.rows import INFO, WITH_DATA
from tests.peft_suite.hub import EveryModelKnown
from tests.peft_suite.inputs import calibration
from tests.peft_suite.selection import uses

LORA, PLAIN = "lora", peft.LoraConfig
MOVED = "_moved_by_tests"
SPARE = ("lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out")
"""Options of LoRA that SVFit lacks and needs not: it has no scaling and no dropout of its own."""
ROUNDING = 1e-6
"""Norm of a difference of float32 outputs over the norm of the output."""
DEFAULTS = (("init_lora_weights", True), ("bias", "none"))


def pytest_addoption(parser):
    group = parser.getgroup("peft_suite")
    group.addoption("--type", choices=[LORA, *INFO], required=True, help="for LoraConfig")
    group.addoption("--part", default="1/1", help="k/n: of n parts of the tests, the k-th")


def pytest_configure(config):
    torch.set_num_threads(1)
    _stand_in("diffusers")
    _stand_in("parameterized")
    torch.allclose = _allclose_up_to_rounding(torch.allclose)
    if config.getoption("--type") != LORA:
        substitute(config.getoption("--type"))


def _allclose_up_to_rounding(allclose):
    def close(one, other, *tolerances, **options):
        if allclose(one, other, *tolerances, **options) or tolerances or options:
            return allclose(one, other, *tolerances, **options)
        return bool((one - other).norm() <= ROUNDING * other.norm())

    return close


def substitute(method: str) -> None:
    """Let `peft.LoraConfig` be the config of a type, with what it needs as defaults."""
    config_cls = INFO[method]
    make = config_cls.__init__

    @functools.wraps(make)  # PEFT reads the signature
    def __init__(self, *args, **options):
        moved = options.get("init_lora_weights") is False
        if moved:
            options["init_lora_weights"] = True
        if method == "svfit":
            options = {k: v for k, v in options.items() if k not in SPARE}
            options = {k: v for k, v in options.items() if (k, v) not in DEFAULTS}
        else:
            options.setdefault("uncalibrated", "lora")
        if method == "eva":
            options.setdefault("rho", 1)  # PEFT's tests know the shapes beforehand
        if method in WITH_DATA:
            options.setdefault("calibration", calibration())
        make(self, *args, **options)
        if moved:
            setattr(self, MOVED, True)

    config_cls.__init__ = __init__
    for model_cls in (GradInitModel, SVFitModel):
        _move_after(model_cls, "inject_adapter", 1)
        _move_after(model_cls, "_cast_adapter_dtype", 0)
    peft.LoraConfig = config_cls


def _move_after(model_cls, name, position):
    """Let a method that writes a start also move it, where a test asks for that."""
    method = getattr(model_cls, name)

    def moving(self, *args, **options):
        adapter = args[position] if len(args) > position else options["adapter_name"]
        before = _dtypes(self, adapter)
        result = method(self, *args, **options)
        # A start is written again where the cast widens it.
        written = name == "inject_adapter" or _dtypes(self, adapter) != before
        if getattr(self.peft_config[adapter], MOVED, False) and written:
            move(self, adapter)
        return result

    setattr(model_cls, name, moving)


def _dtypes(model, adapter_name):
    return [parameter.dtype for _, parameter in _trained(model, adapter_name)]


def _trained(model, adapter_name):
    for key, parameter in model.named_parameters():
        constant = "svfit_U" in key or "svfit_Vh" in key
        if model.prefix in key and adapter_name in key.split(".") and not constant:
            yield key, parameter


def move(model, adapter_name: str) -> None:
    """Add random numbers to what an adapter trains, as large as PEFT's own random factors."""
    with torch.no_grad():
        for key, parameter in _trained(model, adapter_name):
            size = 1 if "embedding" in key else 0.3
            parameter.add_((size * (2 * torch.rand(parameter.shape) - 1)).to(parameter))


def _stand_in(name: str) -> None:
    """Let PEFT's tests import a package that is not installed; tests that use it are left out."""
    try:
        __import__(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__version__ = "0"
        module.__getattr__ = lambda attribute: type(attribute, (), {"expand": _left_out})
        sys.modules[name] = module


def _left_out(*_, **__):
    return lambda function: None


def pytest_runtest_setup():
    """The outcome of a test does not depend on those before."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config, items):
    k, n = map(int, config.getoption("--part").split("/"))
    kept = [item for item in items if uses(item, peft.LoraConfig, PLAIN)]
    kept = kept[k - 1 :: n]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    for name, module in list(sys.modules.items()):
        if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = EveryModelKnown()
