"""Models, data and comparisons that the tests share. Everything is made in the process."""

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_gradinit import Calibration, LoraGAConfig

VOCABULARY = 96
SVD_TOLERANCE = 1e-5
"""Relative error between two float32 computations of the same singular subspaces."""


def pico_llama(seed: int = 0, **options) -> LlamaForCausalLM:
    """A Llama with keys and values narrower than queries, in eval mode."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **options})).eval()


def pico_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2: Conv1D layers, and a head tied to the embedding."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def token_batches(
    n: int = 12, batch_size: int = 4, length: int = 20, seed: int = 1
) -> list[dict[str, Tensor]]:
    """Random sequences of different lengths, padded per batch, with labels; losses are real."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (n,), generator=generator).tolist()
    rows = [torch.randint(1, VOCABULARY, (k,), generator=generator) for k in lengths]
    return [pad(rows[i : i + batch_size]) for i in range(0, n, batch_size)]


def pad(rows: list[Tensor], extra: int = 0) -> dict[str, Tensor]:
    """Stack sequences; `extra` adds columns of padding that change nothing."""
    width = max(len(row) for row in rows) + extra
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
    }
    for i, row in enumerate(rows):
        batch["input_ids"][i, : len(row)] = row
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, : len(row)] = row
    return batch


def rows_of(batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The sequences of some batches without their padding."""
    return [
        ids[mask.bool()]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def quiet(data, **options) -> Calibration:
    """A calibration without a progress bar."""
    return Calibration(data, **{"progress": False, **options})


def lora_ga(data=None, **options) -> LoraGAConfig:
    """A LoRA-GA config with small defaults; `data` are batches, or `token_batches()`."""
    calibration = options.pop("calibration", None)
    if calibration is None:
        calibration = quiet(token_batches() if data is None else data)
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraGAConfig(**{**values, **options}, calibration=calibration)


def adapted(model: nn.Module, config: LoraGAConfig | None = None, name: str = "default"):
    """`get_peft_model` with a LoRA-GA config."""
    return get_peft_model(model, config or lora_ga(), name)


def logits(model: nn.Module) -> Tensor:
    """Output on fixed data, without gradients, in eval mode."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=token_batches(4, 4)[0]["input_ids"]).logits
    model.train(was_training)
    return out


def train_steps(model: PeftModel, n: int = 5, lr: float = 1e-2) -> list[float]:
    """A few AdamW steps on real losses; returns the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for step in range(n):
        batch = token_batches()[step % 3]
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all base weights, under the names that they have without adapters."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
        if not any(part in name for part in (".lora_", ".svfit_", "modules_to_save"))
    }


def same_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether two sets of weights agree bit for bit."""
    return before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )


def autograd_gradients(
    model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]
) -> dict[str, Tensor]:
    """Token-weighted mean gradient of every named weight, by plain autograd: the oracle."""
    total, weight = dict.fromkeys(names, 0.0), 0
    for batch in batches:
        n_tokens = int((batch["labels"][:, 1:] != -100).sum())
        parameters = [model.get_submodule(n).weight for n in names]
        gradients = torch.autograd.grad(model(**batch).loss * n_tokens, parameters)
        for n, gradient in zip(names, gradients, strict=True):
            total[n] = total[n] + gradient
        weight += n_tokens
    return {n: g / weight for n, g in total.items()}


def anchors(peft_model: PeftModel, name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """`(A0, B0)` of every anchored layer, by module name in the base model."""
    found = {}
    for path, layer in peft_model.base_model.model.named_modules():
        if name in getattr(layer, "lora_A", {}):
            A0 = layer.lora_A[name].parametrizations.weight[0].anchor
            B0 = -layer.lora_B[name].parametrizations.weight[0].anchor
            found[path] = (A0.clone(), B0.clone())
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def matrix_with_spectrum(out_features: int, in_features: int, spectrum: Tensor, seed: int = 0):
    """A matrix with given singular values and random singular vectors, float64."""
    generator = torch.Generator().manual_seed(seed)
    k = len(spectrum)
    U = torch.linalg.qr(torch.randn(out_features, k, generator=generator).double()).Q
    V = torch.linalg.qr(torch.randn(in_features, k, generator=generator).double()).Q
    return (U * spectrum.double()) @ V.T


def same_subspace(A: Tensor, B: Tensor) -> float:
    """Smallest cosine of a principal angle between the column spaces; 1 if they are equal."""
    QA, QB = torch.linalg.qr(A.double()).Q, torch.linalg.qr(B.double()).Q
    return torch.linalg.svdvals(QA.T @ QB).min().item()


def same_factors(one: dict, other: dict) -> bool:
    """Whether two results of `anchors` agree bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for n in one for a, b in zip(one[n], other[n], strict=True)
    )


def overlap(A: Tensor, B: Tensor) -> float:
    """Mean squared cosine of the principal angles between spans of orthonormal rows; 1 if equal."""
    return ((A @ B.T).square().sum() / A.shape[0]).item()
