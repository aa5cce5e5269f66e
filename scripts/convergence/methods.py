"""What is compared: how a model is made ready for training, and by which optimiser.

Every method gets the same rank and the same layers. Starts of PEFT that write into the base weights
(PiSSA, OLoRA, LoRA-GA) are used as PEFT documents them.
"""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_gradinit import (
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    SVFitConfig,
    pairs,
)
from peft_gradinit.optim import OPTIMIZERS, optimizer

from .levers import LEVERS
from .method import (
    EQUAL_NUMBERS,
    Method,
    Start,
    Steps,
    adapter_of,
    calibrated,
    plain,
    with_output,
)
from .neighbours import loraplus, muon, olora, peft_corda, peft_eva, peft_lora_ga, riemannian
from .pair_levers import PAIR_LEVERS
from .pretraining import Rows
from .tasks import Task


def of_pairs(name: str, **options: Any) -> Steps:
    """One of our optimisers of pairs, with the options of its class."""

    def make(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
        factory, given = optimizer(name, lr=lr, head_lr=head_lr, **options)
        return factory()(model, **given)

    return make


def full(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """All weights, in float32: a weight of bfloat16 rounds most steps of AdamW away."""
    del task, batches
    return model.float()


def automatic(config: type[PeftConfig], word: str, **options: Any) -> Start:
    """One of our types whose layers the calibration chooses, among those of the task."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        chosen: dict[str, Any] = {**EQUAL_NUMBERS, "min_rank": 0, **options}
        if task.adapter["target_modules"] == "all-linear":
            chosen["target_modules"] = word
        return calibrated(config, **chosen)(model, task, batches)

    return start


def a_rank_less_with_dora(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's DoRA, whose magnitudes a rank of all layers pays for; at LoRA's scaling."""
    del batches
    given = adapter_of(task, use_rslora=False, use_dora=True)
    r, lora_alpha = given["r"], given["lora_alpha"]
    config = LoraConfig(**{**given, "r": r - 1, "lora_alpha": lora_alpha * (r - 1) / r})
    return get_peft_model(model, config)


def with_dora(word: str | None = None) -> Start:
    """Our LoRA-One with DoRA and ranks by gradient; ranks and magnitudes are as many numbers as LoRA's."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        lora = get_peft_model(copy.deepcopy(model), LoraConfig(**adapter_of(task)))
        budget = sum(p.A.numel() + p.B.numel() for p in pairs(lora))
        chosen: dict[str, Any] = {**EQUAL_NUMBERS, "budget": budget, "use_dora": True}
        if word is not None:
            return automatic(LoraOneConfig, word, **chosen)(model, task, batches)
        return calibrated(LoraOneConfig, **chosen)(model, task, batches)

    return start


def svfit(**options: Any) -> Start:
    """Our SVFit, which takes neither data nor a scaling."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        del batches
        return get_peft_model(
            model, SVFitConfig(**{"r": task.settings.adapter["r"], **task.adapter, **options})
        )

    return start


def pissa(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """Our PiSSA, which leaves the base as it is."""
    del batches
    return get_peft_model(model, PiSSAConfig(**adapter_of(task)))


CALIBRATED: dict[str, Any] = {"reads_data": True, "ours": True, "suggests": "adamw"}
"""What holds of our types that need data, with AdamW."""

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", full, 1e-3),
    "full+muon": Method("full fine-tuning, Muon", full, 1e-3, muon),
    "full+muon_0.8": Method(
        "full fine-tuning, Muon, momentum 0.8, a fifth of the rate for embeddings",
        full,
        1e-3,
        partial(muon, momentum=0.8, share=0.2),
    ),
    "lora": Method("LoRA", plain(use_rslora=False), 3.2e-3, suggests="adamw"),
    "lora_output": Method(
        "LoRA with output layer", with_output, 3.2e-3, suggests="adamw", has_output=True
    ),
    "rslora": Method("rsLoRA", plain(), 3.2e-3),
    "dora": Method("DoRA", plain(use_rslora=False, use_dora=True), 3.2e-3),
    "dora_less": Method("DoRA, a rank less", a_rank_less_with_dora, 3.2e-3),
    "loraplus": Method("LoRA+", plain(), 1e-3, loraplus),
    "riemannian": Method("rsLoRA, Riemannian", plain(), 3.2e-3, riemannian),
    "pissa": Method("PiSSA", plain(init_lora_weights="pissa"), 1e-3),
    "olora": Method("OLoRA", olora, 3.2e-3),
    "peft_corda": Method("CorDA (PEFT)", peft_corda, 1e-3, reads_data=True),
    "peft_eva": Method("EVA (PEFT)", peft_eva, 1e-3, reads_data=True),
    "peft_lora_ga": Method("LoRA-GA (PEFT)", peft_lora_ga, 1e-3, reads_data=True),
    "lora_ga": Method("LoRA-GA", calibrated(LoraGAConfig), 1e-3, **CALIBRATED),
    "lora_ga_auto": Method(
        "LoRA-GA, `auto`, LoRA's length",
        automatic(LoraGAConfig, "auto", scale="lora"),
        3.2e-3,
        **CALIBRATED,
    ),
    "lora_ga_auto_output": Method(
        "LoRA-GA, `auto+output`, LoRA's length",
        automatic(LoraGAConfig, "auto+output", scale="lora"),
        3.2e-3,
        **CALIBRATED,
        has_output=True,
    ),
    "lora_one": Method("LoRA-One", calibrated(LoraOneConfig), 3.2e-3, **CALIBRATED),
    "lora_one_ranks": Method(
        "LoRA-One, ranks by gradient",
        calibrated(LoraOneConfig, **EQUAL_NUMBERS),
        3.2e-3,
        **CALIBRATED,
    ),
    "lora_one_auto": Method(
        "LoRA-One, `auto`",
        automatic(LoraOneConfig, "auto"),
        3.2e-3,
        **CALIBRATED,
    ),
    "lora_one_auto_output": Method(
        "LoRA-One, `auto+output`",
        automatic(LoraOneConfig, "auto+output"),
        3.2e-3,
        **CALIBRATED,
        has_output=True,
    ),
    "lora_one_ranks_dora": Method(
        "LoRA-One, ranks by gradient, DoRA", with_dora(), 3.2e-3, **CALIBRATED
    ),
    "lora_one_auto_output_dora": Method(
        "LoRA-One, `auto+output`, DoRA",
        with_dora("auto+output"),
        3.2e-3,
        **CALIBRATED,
        has_output=True,
    ),
    "eva": Method("EVA", calibrated(EvaConfig, budget="parameters"), 1e-3, **CALIBRATED),
    "corda": Method("CorDA", calibrated(CorDAConfig), 1e-3, **CALIBRATED),
    "pissa_anchored": Method("PiSSA, base unchanged", pissa, 1e-3, ours=True, suggests="adamw"),
    "svfit": Method("SVFit", svfit(), 3.2e-2, ours=True, suggests="adamw"),
}
FIRST_RATES = {"lora_muon": 3.2e-2, "lora_rite": 3.2e-3, "lora_one": 3.2e-3, "lora_pro": 1e-3}
"""Where the search begins, by optimiser."""
OF_PAIRS = {kind.name: of_pairs(kind.name) for kind in OPTIMIZERS}
OF_PAIRS["lora_muon"] = of_pairs("lora_muon", momentum=0.9)
"""The optimisers of the rows. LoRA-Muon's momentum is that of when most of them were run; rows named
`+lora_muon_0.8` have today's default."""
TITLES = {kind.name: kind.title for kind in OPTIMIZERS} | {"lora_muon": "LoRA-Muon, momentum 0.9"}
for kind in OPTIMIZERS:
    METHODS[f"lora+{kind.name}"] = Method(
        f"LoRA; optimiser {TITLES[kind.name]}",
        plain(use_rslora=False),
        FIRST_RATES[kind.name],
        OF_PAIRS[kind.name],
        ours=True,
        suggests=kind.name,
    )
    METHODS[f"lora_output+{kind.name}"] = Method(
        f"LoRA with output layer; optimiser {TITLES[kind.name]}",
        with_output,
        FIRST_RATES[kind.name],
        OF_PAIRS[kind.name],
        ours=True,
        suggests=kind.name,
        has_output=True,
    )
    METHODS[f"lora_one_ranks+{kind.name}"] = Method(
        f"LoRA-One, ranks by gradient; optimiser {TITLES[kind.name]}",
        calibrated(LoraOneConfig, **EQUAL_NUMBERS),
        FIRST_RATES[kind.name],
        OF_PAIRS[kind.name],
        reads_data=True,
        ours=True,
        suggests=kind.name,
    )
    METHODS[f"lora_one_auto_output+{kind.name}"] = Method(
        f"LoRA-One, `auto+output`; optimiser {TITLES[kind.name]}",
        automatic(LoraOneConfig, "auto+output"),
        FIRST_RATES[kind.name],
        OF_PAIRS[kind.name],
        reads_data=True,
        ours=True,
        suggests=kind.name,
        has_output=True,
    )
for name in ("lora_one", "lora_one_auto", "lora_one_ranks_dora", "lora_one_auto_output_dora"):
    METHODS[f"{name}+lora_muon"] = replace(
        METHODS[name],
        title=f"{METHODS[name].title}; optimiser {TITLES['lora_muon']}",
        first_rate=FIRST_RATES["lora_muon"],
        optimizer=OF_PAIRS["lora_muon"],
        suggests="lora_muon",
    )
for name, momentum in (
    ("lora", 0.8),
    ("lora", 0.95),
    ("lora_output", 0.8),
    ("lora_one_ranks", 0.8),
    ("lora_one_ranks_dora", 0.8),
    ("lora_one_auto_output", 0.8),
):
    METHODS[f"{name}+lora_muon_{momentum}"] = replace(
        METHODS[f"{name}+lora_muon"],
        title=f"{METHODS[name].title}; optimiser LoRA-Muon, momentum {momentum}",
        optimizer=of_pairs("lora_muon", momentum=momentum),
    )
for name in ("lora", "lora_output", "lora_one_auto_output", "lora_output+lora_muon"):
    METHODS[f"{name}_linear"] = replace(
        METHODS[name], title=f"{METHODS[name].title}, linear decay", schedule="linear"
    )
METHODS |= LEVERS | PAIR_LEVERS
