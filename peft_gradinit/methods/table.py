"""The table of methods: the one place that lists them."""

import dataclasses
from typing import Literal

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner

from ..tuners import GradInitModel, SVFitModel, register
from .eva import EvaConfig
from .lora_ga import LoraGAConfig
from .lora_one import LoraOneConfig
from .svfit import SVFitConfig


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """One method.

    Attributes:
        name: lower case; its upper case is the `PeftType`.
        title: as the paper writes it.
        paper: arXiv number.
        start: where the adapter starts, in half a line.
        needs: what a calibration pass measures.
        preserves_output: whether the function at step 0 is the base model's.
        saved_as: what `save_pretrained` writes, for an adapter of rank `r`.
        config: the config class.
        model: the tuner class.
        prefix: of the adapter's parameters.
    """

    name: str
    title: str
    paper: str
    start: str
    needs: Literal["gradients", "inputs", "nothing"]
    preserves_output: bool
    saved_as: str
    config: type[PeftConfig]
    model: type[BaseTuner]
    prefix: str = "lora_"


METHODS = (
    MethodInfo(
        name="lora_ga",
        title="LoRA-GA",
        paper="2407.05000",
        start="leading singular vectors of the gradient",
        needs="gradients",
        preserves_output=True,
        saved_as="LoRA of rank 2r",
        config=LoraGAConfig,
        model=GradInitModel,
    ),
    MethodInfo(
        name="lora_one",
        title="LoRA-One",
        paper="2502.01235",
        start="one normalised low-rank gradient step",
        needs="gradients",
        preserves_output=False,
        saved_as="LoRA of rank r",
        config=LoraOneConfig,
        model=GradInitModel,
    ),
    MethodInfo(
        name="eva",
        title="EVA",
        paper="2410.07170",
        start="principal components of the layer's inputs",
        needs="inputs",
        preserves_output=True,
        saved_as="LoRA of rank r",
        config=EvaConfig,
        model=GradInitModel,
    ),
    MethodInfo(
        name="svfit",
        title="SVFit",
        paper="2409.05926",
        start="singular vectors of the weight; trains r numbers a layer",
        needs="nothing",
        preserves_output=True,
        saved_as="LoRA of rank r, or r numbers a layer",
        config=SVFitConfig,
        model=SVFitModel,
        prefix="svfit_",
    ),
)

for _method in METHODS:
    register(_method.name, _method.config, _method.model, prefix=_method.prefix)
