"""The SVFit layer on every kind of weight, and merged into it."""

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import nn

from peft_gradinit import load_for_training
from peft_gradinit.errors import ConfigError
from tests.helpers import (
    logits,
    pico_gpt2,
    pico_llama,
    relative_error,
    train_steps,
)
from tests.tuners.svfits import EXPORT, layers_of, svfit, svfitted

BF16 = 2**-7
"""Two roundings of bfloat16: of the layer's output and of the merged weight."""


# Kinds of layers and dtypes -------------------------------------------------------------------


def test_bfloat16_base_gets_a_float32_adapter():
    before = logits(pico_llama().bfloat16())
    peft_model = svfitted(pico_llama().bfloat16())
    assert logits(peft_model).dtype == torch.bfloat16
    assert torch.equal(logits(peft_model), before)
    kinds = {p.dtype for n, p in peft_model.named_parameters() if ".svfit_" in n}
    assert kinds == {torch.float32}
    losses = train_steps(peft_model, n=9, lr=0.1)
    assert losses[-3] < losses[0]
    trained = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload()).float(), trained.float()) <= BF16


class Quantised(nn.Module):
    """Two layers around a bitsandbytes 4-bit or 8-bit one, and a loss."""

    def __init__(self, bits):
        super().__init__()
        bnb = pytest.importorskip("bitsandbytes")
        torch.manual_seed(0)
        linear = nn.Linear(64, 64)
        if bits == 4:
            self.middle = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        else:
            self.middle = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
        self.middle.load_state_dict(linear.state_dict())
        self.out = nn.Linear(64, 8)
        self.to("cpu")  # quantises

    def forward(self, x):
        return self.out(self.middle(x).relu())


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_adapted_and_exported(bits, tmp_path):
    x, y = torch.randn(16, 64), torch.arange(16) % 8
    base = Quantised(bits)
    with torch.no_grad():
        before = base(x)
    peft_model = svfitted(base, target_modules=["middle"], task_type=None)
    with torch.no_grad():
        assert torch.equal(peft_model(x), before)
    optimizer = torch.optim.Adam([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(peft_model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    peft_model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(Quantised(bits), tmp_path).train()
        assert relative_error(loaded(x), peft_model(x)) <= EXPORT
        assert torch.equal(load_for_training(Quantised(bits), tmp_path)(x), peft_model(x))
    with pytest.raises(ConfigError, match=r"Linear\wbit.* cannot take in an adapter"):
        peft_model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layer_that_was_evaluated_before_is_adapted(bits):
    """Evaluation repacks 4-bit weights on processors with bfloat16, and empties 8-bit ones."""
    x = torch.randn(16, 64)
    model = Quantised(bits).eval()
    with torch.no_grad():
        before = model(x)
        peft_model = svfitted(model, target_modules=["middle"], task_type=None).eval()
        assert torch.equal(peft_model(x), before)
    torch.manual_seed(0)
    W = nn.Linear(64, 64).weight
    U, Vh = (getattr(peft_model.middle, f"svfit_{part}")["default"] for part in ("U", "Vh"))
    sigma = torch.linalg.svdvals(W)[:4]
    assert torch.allclose((U.T @ W @ Vh.T).diagonal(), sigma, rtol=0.05)  # error of quantisation


@pytest.mark.parametrize("quantity", ["zero", "identity"])
def test_degenerate_weights_are_adapted(quantity, tmp_path):
    def make():
        model = pico_llama()
        q_proj = model.model.layers[0].self_attn.q_proj
        q_proj.weight.data = torch.zeros(48, 48) if quantity == "zero" else torch.eye(48)
        return model

    peft_model = svfitted(make())
    assert torch.equal(logits(peft_model), logits(make()))
    train_steps(peft_model, lr=0.1)
    peft_model.save_pretrained(tmp_path)
    assert (
        relative_error(logits(PeftModel.from_pretrained(make(), tmp_path)), logits(peft_model))
        <= EXPORT
    )


# Merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, "full"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(r, safe_merge):
    peft_model = svfitted(pico_llama(), r=r)
    before = {n: layer.weight.clone() for n, layer in layers_of(peft_model).items()}
    train_steps(peft_model, lr=0.1)
    trained = logits(peft_model)
    peft_model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(logits(peft_model), trained) <= EXPORT
    with pytest.raises(ConfigError, match=r"\['default'\] are merged into the base weights"):
        peft_model.add_adapter("second", svfit())
    peft_model.unmerge_adapter()
    assert relative_error(logits(peft_model), trained) <= EXPORT
    after = layers_of(peft_model)
    assert all(torch.allclose(after[n].weight, w, atol=1e-6) for n, w in before.items())


def test_disabling_a_merged_adapter_unmerges_it():
    peft_model = svfitted(pico_llama())
    train_steps(peft_model, lr=0.1)
    peft_model.merge_adapter()
    with peft_model.disable_adapter():
        assert relative_error(logits(peft_model), logits(pico_llama())) <= EXPORT
    assert not any(layer.merged for layer in layers_of(peft_model).values())


def test_merged_and_unloaded_gpt2_has_the_trained_function():
    peft_model = svfitted(pico_gpt2(), r="full")
    train_steps(peft_model, lr=0.1)
    trained = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload(safe_merge=True)), trained) <= EXPORT


def test_safe_merge_of_a_broken_adapter_is_refused():
    peft_model = svfitted(pico_llama())
    layer = next(iter(layers_of(peft_model).values()))
    layer.svfit_delta["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match="adapter 'default' gives weights that are not finite"):
        peft_model.merge_adapter(safe_merge=True)
    assert layer.weight.isfinite().all()


def test_unmerging_nothing_warns():
    layer = next(iter(layers_of(svfitted(pico_llama())).values()))
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        layer.unmerge()


def test_pefts_own_conversion_to_lora_works():
    peft_model = svfitted(pico_llama())
    train_steps(peft_model, lr=0.1)
    config, factors = convert_to_lora(peft_model, rank=4)
    lora = get_peft_model(pico_llama(), config)
    set_peft_model_state_dict(lora, factors)
    assert relative_error(logits(lora), logits(peft_model)) <= 1e-4  # an SVD of the update
