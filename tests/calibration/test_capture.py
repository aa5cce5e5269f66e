"""What the taps record is the gradient that autograd computes, whatever the model does."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_gradinit.calibration import capture
from peft_gradinit.errors import CalibrationError
from tests.calibration.passes import FLOAT32, gradients, linears, measure, worst_error
from tests.helpers import autograd_gradients, pico_gpt2, pico_llama, relative_error, token_batches


def oracle(model, batches):
    """`(out, in)` gradients of all linear layers by autograd; weights must require them."""
    found = autograd_gradients(model, batches, list(linears(model)))
    return {n: g.T if isinstance(linears(model)[n], Conv1D) else g for n, g in found.items()}


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_linear_layers_get_the_gradient_of_autograd(freeze):
    want = oracle(pico_llama(), token_batches())
    model = frozen(pico_llama()) if freeze else pico_llama()
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_conv1d_layers_get_the_gradient_of_autograd_as_out_by_in(freeze):
    # The head is tied to the embedding, whose use has a gradient of its own: see the next test.
    want = {n: g for n, g in oracle(pico_gpt2(), token_batches()).items() if n != "lm_head"}
    model = frozen(pico_gpt2()) if freeze else pico_gpt2()
    modules = {n: m for n, m in linears(model).items() if n != "lm_head"}
    assert worst_error(gradients(model, token_batches(), modules), want) < FLOAT32


def test_tied_head_gets_the_gradient_of_its_own_use():
    untied = pico_gpt2()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    want = oracle(untied, token_batches())["lm_head"]
    got = gradients(pico_gpt2(), token_batches())["lm_head"]
    assert relative_error(got, want) < FLOAT32


def test_inputs_embeds_instead_of_ids_give_the_same_gradient():
    model = frozen(pico_llama())
    embeds = []
    for batch in token_batches():
        ids = batch.pop("input_ids")
        embeds.append({**batch, "inputs_embeds": model.model.embed_tokens(ids).detach()})
    want = gradients(model, token_batches())
    assert worst_error(gradients(model, embeds), want) < FLOAT32


class Toy(nn.Module):
    """A two-layer model of vectors; subclasses use the layer `inner` in odd ways."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.outer = nn.Linear(6, 5)
        self.inner = layer(5, 5)
        self.head = nn.Linear(5, 3)

    def use(self, h):
        return self.inner(h)

    def loss(self, x, y):
        return F.cross_entropy(self.head(self.use(F.gelu(self.outer(x)))), y)


class CalledThreeTimes(Toy):
    def use(self, h):
        return self.inner(self.inner(self.inner(h).tanh()).tanh())


class OneUseNotInTheLoss(Toy):
    def use(self, h):
        self.unused = self.inner(h * 3)
        return self.inner(h)


class AddInPlace(Toy):
    def use(self, h):
        y = self.inner(h)
        y += 1
        return y * y


class ReluInPlace(Toy):
    def use(self, h):
        return self.inner(h).relu_()


class KeywordCall(Toy):
    def use(self, h):
        return self.inner(input=h)


class Conv1DKeywordCall(Toy):
    def __init__(self):
        super().__init__(layer=lambda i, o: Conv1D(o, i))

    def use(self, h):
        return self.inner(x=h)


class ReferenceUnderNoGrad(Toy):
    def use(self, h):
        with torch.no_grad():
            reference = self.inner(h)
        return self.inner(h) - 0.5 * reference


class OutputChangedByHook(Toy):
    def __init__(self):
        super().__init__()
        self.inner.register_forward_hook(lambda module, args, out: out.sin() * 2)


class Checkpointed(Toy):
    """Raw `torch.utils.checkpoint`, as remote code calls it."""

    reentrant = False

    def use(self, h):
        return checkpoint(self.inner, h, use_reentrant=self.reentrant)


TOYS = [
    Toy,
    CalledThreeTimes,
    OneUseNotInTheLoss,
    AddInPlace,
    ReluInPlace,
    KeywordCall,
    Conv1DKeywordCall,
    ReferenceUnderNoGrad,
    OutputChangedByHook,
    Checkpointed,
]


def toy_batches(n=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(n)
    ]


def toy_loss(model, batch):
    return model.loss(*batch)


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("toy", TOYS)
def test_odd_uses_of_a_layer_give_the_gradient_of_autograd(toy, freeze):
    model = toy()
    loss = torch.stack([toy_loss(model, b) for b in toy_batches()]).mean()
    weights = {n: m.weight for n, m in linears(model).items()}
    want = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    if isinstance(model.inner, Conv1D):
        want["inner"] = want["inner"].T
    if freeze:
        frozen(model)
    got = gradients(model, toy_batches(), loss_fn=toy_loss)
    assert worst_error(got, want) < FLOAT32


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_raw_reentrant_checkpointing_is_refused_by_name(freeze):
    model = Checkpointed()
    model.reentrant = True
    if freeze:
        frozen(model)
    with pytest.raises(CalibrationError, match=r"^inner ran without gradients.*use_reentrant=Fals"):
        gradients(model, toy_batches(), loss_fn=toy_loss)


def test_a_layer_that_runs_without_gradients_in_a_later_batch_is_refused():
    model = Checkpointed()

    def loss_fn(model, batch):
        loss = toy_loss(model, batch)
        model.reentrant = True
        return loss

    with pytest.raises(CalibrationError, match=r"^inner ran without gradients"):
        gradients(model, toy_batches(), loss_fn=loss_fn)


class _NoInputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        return None, None


class LayerWithoutBackward(nn.Linear):
    """Like an int8 kernel: its op gives no gradient to its input."""

    def forward(self, x):
        return _NoInputGradient.apply(x.detach(), self.weight)


def test_layer_without_input_gradient_is_refused_by_name():
    model = frozen(Toy(layer=LayerWithoutBackward))
    message = r"inner \(LayerWithoutBackward\) gives no gradient to its input.*a weight-only one"
    with pytest.raises(CalibrationError, match=message):
        gradients(model, toy_batches(), loss_fn=toy_loss)


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_no_grad_is_ever_allocated_and_no_flag_touched(freeze):
    model = frozen(pico_llama()) if freeze else pico_llama()
    seen = []

    def loss_fn(model, batch):
        parameters = list(model.parameters())
        seen.append(any(p.grad is not None for p in parameters))
        seen.append(any(p.requires_grad == freeze for p in parameters))
        return model(**batch).loss

    gradients(model, token_batches(), loss_fn=loss_fn)
    assert len(seen) == 6
    assert not any(seen)
    assert all(p.grad is None and p.requires_grad != freeze for p in model.parameters())


def test_sinks_run_in_float32_also_under_autocast():
    model, enabled = Toy(), []
    sinks = dict.fromkeys(
        linears(model), lambda x, dy: enabled.append(torch.is_autocast_enabled("cpu"))
    )
    with capture(linears(model), sinks) as seen, torch.autocast("cpu", torch.bfloat16):
        seen.backward(toy_loss(model, toy_batches()[0]))
    assert enabled == [False] * 3


def test_hooks_are_removed_also_after_an_error():
    model = Toy()

    def fail_inside():
        with capture(linears(model), dict.fromkeys(linears(model))):
            assert model.inner._forward_hooks
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert not model.inner._forward_hooks
    assert not model.inner._forward_hooks_with_kwargs


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_frees_the_inputs_that_taps_saved(checkpointing):
    model = pico_llama()
    if checkpointing:
        model.gradient_checkpointing_enable()
    alive = []

    def loss_fn(model, batch):
        inputs = []
        handles = [
            layer.mlp.down_proj.register_forward_hook(
                lambda module, args, out: inputs.append(weakref.ref(args[0]))
            )
            for layer in model.model.layers
        ]
        loss = model(**batch).loss
        for handle in handles:
            handle.remove()
        alive.append(sum(ref() is not None for ref in inputs))
        return loss

    gradients(model, token_batches(4, 4), loss_fn=loss_fn)
    # Without checkpointing all of them wait for the backward: the probe does see what is saved.
    assert alive == [0 if checkpointing else 2]


def test_zero_gradient_and_unused_targets_are_named_with_the_reason():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(5, 4)
            self.multiplied_by_zero = nn.Linear(5, 5)

        def use(self, h):
            return self.inner(h) + 0.0 * self.multiplied_by_zero(h)

    result = measure(Idle(), toy_batches(), loss_fn=toy_loss)
    assert result.failures == {
        "idle": "it never ran in 3 batches, or the loss does not use it",
        "multiplied_by_zero": "its gradient is zero over 3 batches",
    }
    assert set(result.triplets) == {"outer", "inner", "head"}
