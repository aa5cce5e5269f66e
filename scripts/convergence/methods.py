"""What is compared: how a model is made ready for training, and by which optimiser.

Every method gets the same rank and the same layers. Starts of PEFT that write into the base weights
(PiSSA, OLoRA, LoRA-GA) are used as PEFT documents them.
"""

import warnings
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from torch import nn
from transformers import PreTrainedModel

from peft_gradinit import Calibration, EvaConfig, LoraGAConfig, LoraOneConfig, SVFitConfig
from peft_gradinit.optim import OPTIMIZERS, optimizer

from .levers import LEVERS
from .method import Method, Start, Steps, adapter_of, head_and_rest, plain
from .pretraining import Rows
from .tasks import Task

LORAPLUS_RATIO = 16.0
"""The ratio that the LoRA+ paper recommends (https://arxiv.org/abs/2402.12354)."""
BY_GRADIENT = {"rank_allocation": "gradient_energy", "rho": 4.0}
EQUAL_NUMBERS = {**BY_GRADIENT, "budget": "parameters", "use_rslora": False}


def loraplus(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
    """PEFT's LoRA+: the rate of B is 16 times that of A, which is `lr`."""
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=LORAPLUS_RATIO, weight_decay=0.0
    )
    return _with_head(optimizer, model, head_lr)


def riemannian(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
    """PEFT's preconditioner before AdamW."""
    optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    return _with_head(optimizer, model, head_lr)


def of_pairs(name: str, **options: Any) -> Steps:
    """One of our optimisers of pairs, with the options of its class."""

    def make(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
        factory, given = optimizer(name, lr=lr, head_lr=head_lr, **options)
        return factory()(model, **given)

    return make


def _with_head(optimizer, model: nn.Module, head_lr: float) -> torch.optim.Optimizer:
    """Move the head's parameters to a group of their own."""
    head, _ = head_and_rest(model)
    ids = {id(p) for p in head}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    if head:
        optimizer.add_param_group({"params": head, "lr": head_lr})
    return optimizer


def full(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """All weights."""
    del task, batches
    return model


def calibrated(config: type[PeftConfig], **options: Any) -> Start:
    """One of our types with a calibration."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        calibration = Calibration(batches, progress=False, max_tokens=None)
        return get_peft_model(model, config(**adapter_of(task, **options), calibration=calibration))

    return start


def automatic(config: type[PeftConfig], word: str) -> Start:
    """One of our types whose layers the calibration chooses, among those of the task."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        options: dict[str, Any] = {**EQUAL_NUMBERS, "min_rank": 0}
        if task.adapter["target_modules"] == "all-linear":
            options["target_modules"] = word
        return calibrated(config, **options)(model, task, batches)

    return start


def with_output(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's LoRA with a rank less, whose numbers go to the output layer; tied layers stay tied."""
    r, alpha = task.settings.adapter["r"], task.settings.adapter["lora_alpha"]
    head = model.get_output_embeddings()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = [n for n, m in layers.items() if m is not head]
    freed = sum(sum(layers[n].weight.shape) for n in names)
    own = max(1, freed // sum(head.weight.shape))
    options = {
        "target_modules": [*names, "lm_head"],
        "r": r - 1,
        "lora_alpha": alpha * (r - 1) / r,
        "rank_pattern": {"lm_head": own},
        "alpha_pattern": {"lm_head": alpha * own / r},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return plain(use_rslora=False, **options)(model, task, batches)


def svfit(**options: Any) -> Start:
    """Our SVFit, which takes neither data nor a scaling."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        del batches
        return get_peft_model(
            model, SVFitConfig(**{"r": task.settings.adapter["r"], **task.adapter, **options})
        )

    return start


def peft_eva(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's own EVA, told what its defaults for language models get wrong elsewhere."""
    labels_of_tokens = batches[0]["labels"].ndim == 2
    eva_config = peft.EvaConfig(rho=2.0, use_label_mask=labels_of_tokens)
    config = LoraConfig(**adapter_of(task), init_lora_weights="eva", eva_config=eva_config)
    adapted = get_peft_model(model, config)
    has_tokens = "input_ids" in batches[0]
    repeated = batches * 50  # its loop has no budget of its own, and needs many forwards
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the following layers were initialized")
        peft.initialize_lora_eva_weights(
            adapted, repeated, show_progress_bar=False, **(OF_TEXT if has_tokens else OF_IMAGES)
        )
    return adapted


def _all_positions(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    del model_input, layer_name
    x = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    return x.flatten(0, -2).contiguous()


def _of_tokens(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    x = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
    if x.dim() == 2:  # behind a pooler
        return x.contiguous()
    return prepare_layer_inputs_fn_language_modeling(x, model_input, layer_name)


OF_TEXT = {"prepare_layer_inputs_fn": _of_tokens}
OF_IMAGES = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": _all_positions}
"""PEFT's EVA takes every batch for text and every layer's input for a sequence."""


def peft_lora_ga(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's own LoRA-GA, with its defaults; it does not know `"all-linear"`."""
    named = adapter_of(task)
    if named["target_modules"] == "all-linear":
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        heads = ("classifier", "score", "lm_head")
        named["target_modules"] = [n for n in layers if n not in heads]
    config = LoraConfig(**named, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    peft.preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


CALIBRATED: dict[str, bool] = {"reads_data": True, "ours": True, "suggests": True}
"""What holds of our types that need data, with AdamW."""

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", full, 1e-3),
    "lora": Method("LoRA", plain(use_rslora=False), 3.2e-3, suggests=True),
    "lora_output": Method(
        "LoRA with output layer", with_output, 3.2e-3, suggests=True, has_output=True
    ),
    "rslora": Method("rsLoRA", plain(), 3.2e-3),
    "loraplus": Method("LoRA+", plain(), 1e-3, loraplus),
    "riemannian": Method("rsLoRA, Riemannian", plain(), 3.2e-3, riemannian),
    "pissa": Method("PiSSA", plain(init_lora_weights="pissa"), 1e-3),
    "olora": Method("OLoRA", plain(init_lora_weights="olora"), 1e-3),
    "peft_eva": Method("EVA (PEFT)", peft_eva, 1e-3, reads_data=True),
    "peft_lora_ga": Method("LoRA-GA (PEFT)", peft_lora_ga, 1e-3, reads_data=True),
    "lora_ga": Method("LoRA-GA", calibrated(LoraGAConfig), 1e-3, **CALIBRATED),
    "lora_ga_ranks": Method(
        "LoRA-GA, ranks by gradient",
        calibrated(LoraGAConfig, **BY_GRADIENT),
        3.2e-4,
        **CALIBRATED,
    ),
    "lora_ga_ranks_as_lora": Method(
        "LoRA-GA, ranks by gradient, LoRA's length",
        calibrated(LoraGAConfig, scale="lora", use_rslora=False, **BY_GRADIENT),
        1.8e-3,
        **CALIBRATED,
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
    "lora_one_riemannian": Method(
        "LoRA-One, Riemannian",
        calibrated(LoraOneConfig),
        3.2e-3,
        riemannian,
        reads_data=True,
        ours=True,
    ),
    "eva": Method("EVA", calibrated(EvaConfig), 1e-3, **CALIBRATED),
    "svfit": Method("SVFit", svfit(), 3.2e-2, ours=True, suggests=True),
}
FIRST_RATES = {"lora_muon": 3.2e-2, "lora_rite": 3.2e-3, "lora_one": 3.2e-3, "lora_pro": 3.2e-3}
"""Where the search begins, by optimiser."""
for kind in OPTIMIZERS:
    METHODS[f"lora+{kind.name}"] = Method(
        f"LoRA, {kind.title}",
        plain(use_rslora=False),
        FIRST_RATES[kind.name],
        of_pairs(kind.name),
        ours=True,
    )
    METHODS[f"lora_one_ranks+{kind.name}"] = Method(
        f"LoRA-One, ranks by gradient, {kind.title}",
        calibrated(LoraOneConfig, **EQUAL_NUMBERS),
        FIRST_RATES[kind.name],
        of_pairs(kind.name),
        reads_data=True,
        ours=True,
    )
METHODS |= LEVERS
NOT_PUBLISHED = frozenset({
    *LEVERS,
    *("lora_output", "lora_one_ranks", "lora_one_auto", "lora_one_auto_output"),
    *(name for name in METHODS if "+" in name),
})
"""Rows that `run` makes, and whose figures are not in `measured/` yet."""
