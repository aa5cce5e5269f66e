"""Starts and optimisers that PEFT and torch have, as their documentation uses them."""

import warnings
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import prepare_layer_inputs_fn_language_modeling
from torch import nn
from transformers import PreTrainedModel

from .half import rounded_products
from .method import HEADS, adapter_of, head_and_rest
from .pretraining import Rows
from .tasks import Task, select, size

LORAPLUS_RATIO = 16.0
"""The ratio that the LoRA+ paper recommends (https://arxiv.org/abs/2402.12354)."""


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


def olora(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's OLoRA at scaling 1, its default, since the scaling is part of the start.

    It moves `scaling` times the leading part of a weight's QR decomposition out of the base.
    """
    del batches
    options = {"init_lora_weights": "olora", "use_rslora": False}
    options["lora_alpha"] = task.settings.adapter["r"]
    return get_peft_model(model, LoraConfig(**adapter_of(task, **options)))


def muon(
    model: nn.Module, lr: float, head_lr: float, *, momentum: float = 0.95, share: float = 1.0
) -> torch.optim.Optimizer:
    """Torch's Muon for the matrices of hidden layers, AdamW with a share of the rate for all else.

    Args:
        model: all of which is trained.
        lr: Muon's rate.
        head_lr: of a new head.
        momentum: Muon's; 0.95 is torch's default.
        share: of `lr`, for embeddings and norms. `match_rms_adamw` is made for the same rate.

    Returns:
        The two optimisers as one.
    """
    head, rest = head_and_rest(model)
    matrices = {
        id(m.weight)
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    }
    hidden = [p for p in rest if id(p) in matrices]
    others = [p for p in rest if id(p) not in matrices]
    groups = [{"params": others, "lr": share * lr}, {"params": head, "lr": head_lr}]
    options: dict[str, Any] = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
    return Both(
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, **options),
        torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0),
    )


class Both(torch.optim.Optimizer):
    """Two optimisers that step together; schedules and clipping see the groups of both."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        super().__init__([g for part in parts for g in part.param_groups], {})
        for part, groups in zip(parts, self._split(), strict=True):
            part.param_groups = groups

    def _split(self) -> list[list[dict]]:
        groups = iter(self.param_groups)
        return [[next(groups) for _ in part.param_groups] for part in self.parts]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of each; torch's Muon makes its matrices orthogonal in bfloat16."""
        del closure
        with rounded_products():
            for part in self.parts:
                part.step()


def _with_head(optimizer, model: nn.Module, head_lr: float) -> torch.optim.Optimizer:
    """Move the head's parameters to a group of their own."""
    head, _ = head_and_rest(model)
    ids = {id(p) for p in head}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    if head:
        optimizer.add_param_group({"params": head, "lr": head_lr})
    return optimizer


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


def peft_corda(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's own CorDA for the data of the new task.

    It reads one sequence at a time, and takes what is behind a pooler for a sequence of numbers.
    """
    config = LoraConfig(
        **_with_names(model, task),
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    )

    @torch.no_grad()
    def run_model() -> None:
        for batch in batches:
            for row in torch.arange(size(batch)).split(1):
                model(**select(batch, row))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(_with_positions) for layer in layers]
    preprocess_corda(model, config, run_model=run_model)
    for hook in hooks:
        hook.remove()
    return get_peft_model(model, config)


def _with_positions(layer: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Inputs as `(batch, positions, features)`; behind a pooler they are `(batch, features)`."""
    del layer
    (x,) = args
    return (x[:, None],) if x.dim() == 2 else args


def peft_lora_ga(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's own LoRA-GA, with its defaults; it does not know `"all-linear"`."""
    named = _with_names(model, task)
    config = LoraConfig(**named, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def train_step() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    peft.preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def _with_names(model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """The adapter's options for starts of PEFT that do not know `"all-linear"`."""
    named = adapter_of(task)
    if named["target_modules"] == "all-linear":
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        named["target_modules"] = [n for n in layers if n not in (*HEADS, "lm_head")]
    return named
