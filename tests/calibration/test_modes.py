"""Checkpointing, compilation, dtypes and grad modes do not change the measurement."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_gradinit.statistics import SketchedGradient, TestMatrixPool
from tests.calibration.passes import FLOAT32, collect, gradients, linears, run_pass, worst_error
from tests.helpers import pico_gpt2, pico_llama, quiet, token_batches


@pytest.fixture(scope="module")
def want():
    return gradients(pico_llama(), token_batches())


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def n_recomputed(model) -> list[int]:
    """Counts calls of the first MLP: twice a batch if its layer is checkpointed."""
    count = [0]

    def hook(*args):
        count[0] += 1

    # Before its forward, since a recomputation stops at the last tensor that is needed.
    model.get_submodule("model.layers.0.mlp").register_forward_pre_hook(hook)
    return count


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_changes_nothing_and_is_kept(reentrant, train, want):
    model = checkpointed(pico_llama(), reentrant).train(train)
    count = n_recomputed(model)
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32
    assert count == [6]  # three batches, forward and recomputation


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_dropout_is_off_also_under_checkpointing(reentrant, want):
    model = checkpointed(pico_llama(attention_dropout=0.5), reentrant).train()
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dropout_of_layers_that_drop_by_themselves_is_off(checkpointing):
    # OPT layers apply F.dropout(p=self.dropout) and its decoder applies layerdrop.
    from transformers import OPTConfig, OPTForCausalLM

    def opt(rate):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 96}
        rates = {"dropout": rate, "attention_dropout": rate, "layerdrop": rate}
        config = OPTConfig(**sizes, **rates, num_hidden_layers=3, num_attention_heads=2)
        return OPTForCausalLM(config)

    model = opt(0.5).train()
    if checkpointing:
        checkpointed(model, reentrant=False)
    batches = token_batches()
    assert worst_error(gradients(model, batches), gradients(opt(0.0).eval(), batches)) < FLOAT32
    assert model.model.decoder.layers[0].dropout == 0.5
    assert model.model.decoder.layerdrop == 0.5


def test_compiled_model_gives_the_same_after_a_warm_up(want):
    model = pico_llama()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**token_batches(4, 4)[0])
    modules = linears(model)
    assert worst_error(gradients(compiled, token_batches(), modules), want) < FLOAT32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
def test_module_compiled_in_place_gives_the_same_after_a_warm_up(want):
    model = pico_llama()
    model.model.layers[0].mlp.compile(backend="aot_eager")
    model(**token_batches(4, 4)[0])
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_caller_without_gradients_gets_the_same(mode, want):
    model = pico_llama()
    with mode():
        got = gradients(model, token_batches())  # the batches are inference tensors, too
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
        assert not torch.is_grad_enabled()
    assert worst_error(got, want) < FLOAT32


def test_bfloat16_model_is_near_float32(want):
    got, facts = run_pass(pico_llama().bfloat16(), token_batches())
    # Activations and gradients carry 8 bits (relative 2^-9 each rounding) through two layers;
    # the sums are float32. Measured: 0.010.
    assert worst_error(got, want) < 0.03
    assert facts.loss == pytest.approx(4.6, abs=0.3)


def test_bfloat16_autocast_around_the_call_is_near_float32(want):
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(pico_llama(), token_batches())
    # As for a bfloat16 model, but norms and residuals stay float32. Measured: 0.008.
    assert worst_error(got, want) < 0.03


def test_float16_model_does_not_underflow(want):
    def small_loss(model, batch):
        # Gradients of a thousandth, as long batches of a large model have.
        loss = model(**batch).loss
        return loss * 1e-3, int((batch["labels"][:, 1:] != -100).sum())

    got = gradients(pico_llama().half(), token_batches(), loss_fn=small_loss)
    got = {n: 1e3 * g for n, g in got.items()}
    # 11 bits. Measured: 0.0013, and 0.83 without the loss scale.
    assert worst_error(got, want) < 0.005


class ShapesMade(TorchDispatchMode):
    """Records the shapes of tensors that own new memory."""

    def __init__(self, known):
        super().__init__()
        self.shapes, self.known = set(), {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.shapes.add(tuple(t.shape))
        return out


@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_sketching_allocates_nothing_of_a_weights_shape(freeze):
    model = pico_llama(intermediate_size=187).requires_grad_(not freeze)
    modules = {n: m for n, m in linears(model).items() if ".mlp." in n}
    pool = TestMatrixPool()
    statistics = {
        n: SketchedGradient(m.out_features, m.in_features, width=56, seed=0, pool=pool)
        for n, m in modules.items()
    }
    with ShapesMade(model.parameters()) as made:
        collect(model, modules, statistics, quiet(token_batches(16, 4)))
    assert (187, 56) in made.shapes  # the sketch, so the recorder works
    assert not {(187, 48), (48, 187)} & made.shapes


def test_gpt2_with_dropout_and_checkpointing_in_train_mode_is_measured_in_eval():
    want = gradients(pico_gpt2(), token_batches())
    model = checkpointed(pico_gpt2(), reentrant=True).train()
    assert model.config.resid_pdrop == 0.1
    assert worst_error(gradients(model, token_batches()), want) < FLOAT32
