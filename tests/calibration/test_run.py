"""The loop: what it returns, and the errors of data, losses and models that cannot be measured."""

import accelerate
import pytest
import torch
from torch.utils.data import DataLoader

from peft_gradinit.errors import CalibrationError, ConfigError, DataError
from peft_gradinit.layouts import model_fingerprint
from peft_gradinit.statistics import DenseGradient
from tests.calibration.passes import (
    FLOAT32,
    collect,
    gradients,
    linears,
    measure,
    run_pass,
    worst_error,
)
from tests.helpers import pad, pico_gpt2, pico_llama, quiet, relative_error, rows_of, token_batches


@pytest.fixture(scope="module")
def model():
    return pico_llama()


def mean_loss(model, batch):
    return model(**batch).loss


def n_terms(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def test_ragged_batches_weigh_by_tokens_and_not_by_batch(model):
    rows = rows_of(token_batches(4, 4))
    ragged = [pad([rows[0][:4]]), pad([rows[1]]), pad([r[:7] for r in rows[2:]])]
    together = [pad([rows[0][:4], rows[1], rows[2][:7], rows[3][:7]])]
    want = gradients(model, together)
    assert worst_error(gradients(model, ragged), want) < FLOAT32
    per_batch = [gradients(model, [b]) for b in ragged]
    unweighted = {n: sum(g[n] for g in per_batch) / 3 for n in want}
    assert worst_error(unweighted, want) > 0.1  # the data tell the two apart


@pytest.mark.parametrize("as_tensor", [False, True])
def test_loss_fn_may_return_its_weight(model, as_tensor):
    def loss_fn(model, batch):
        weight = n_terms(batch)
        loss = model(**{k: v for k, v in batch.items() if k != "labels"}, labels=batch["labels"])
        return loss.loss, torch.tensor(weight) if as_tensor else weight

    got = gradients(model, token_batches(), loss_fn=loss_fn)
    assert worst_error(got, gradients(model, token_batches())) < FLOAT32


def test_loss_fn_without_weight_is_weighed_by_the_labels(model):
    got = gradients(model, token_batches(), loss_fn=mean_loss)
    assert worst_error(got, gradients(model, token_batches())) < FLOAT32


def test_batches_without_loss_are_skipped(model):
    want, facts_want = run_pass(model, token_batches())
    masked = {**token_batches()[0], "labels": torch.full_like(token_batches()[0]["labels"], -100)}
    batches = [masked, *token_batches(), masked]
    got, facts = run_pass(model, batches)
    assert worst_error(got, want) < FLOAT32
    assert (facts.loss_weight, facts.n_batches) == (facts_want.loss_weight, 5)
    assert facts.loss == pytest.approx(facts_want.loss)
    got = gradients(model, batches, loss_fn=mean_loss)  # its loss is NaN there
    assert worst_error(got, want) < FLOAT32


def test_facts_tell_what_was_read(model):
    batches = token_batches()
    _, facts = run_pass(model, batches)
    with torch.no_grad():
        total = sum(model(**b).loss * n_terms(b) for b in batches)
    weight = sum(map(n_terms, batches))
    assert facts.loss == pytest.approx(total.item() / weight)
    assert facts.loss_weight == weight
    assert facts.n_batches == 3
    assert facts.n_sequences == 12
    assert facts.seconds > 0
    assert facts.state_bytes == 4 * sum(m.weight.numel() for m in linears(model).values())


def test_probe_is_the_first_sequence_that_carries_loss(model):
    first, *rest = token_batches()
    first["labels"][:] = -100
    assert (probe := measure(model, [first, *rest]).probe)["input_ids"].shape[0] == 1
    assert torch.equal(probe["input_ids"], rest[0]["input_ids"][:1])


def test_statistics_are_oriented_after_8_and_24_sequences(model):
    class Spy(DenseGradient):
        can_orient = True

        def orient(self):
            oriented.append(self.weight)

    oriented, name = [], "model.layers.0.mlp.up_proj"
    module = model.get_submodule(name)
    batches = token_batches(32, 4)
    collect(model, {name: module}, {name: Spy(112, 48)}, quiet(batches))
    assert oriented == [sum(map(n_terms, batches[:2])), sum(map(n_terms, batches[:6]))]


class TestLosses:
    """What a loss may not be."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda loss: loss.detach(), r"loss of loss_fn \(4.*batch 1\) has no gradient.*detach"),
            (lambda loss: loss * float("nan"), "loss of loss_fn is nan in calibration batch 1"),
            (lambda loss: loss / 0, "loss of loss_fn is inf"),
            (lambda loss: loss.repeat(3), r"loss_fn gave \(3,\) .*a scalar loss tensor"),
            (lambda loss: loss.item(), "loss_fn gave float .*scalar loss tensor"),
            (lambda loss: None, "loss_fn gave NoneType"),
            (lambda loss: (loss, {"logits": 1}), r"loss_fn returned \(Tensor, dict\) with weight"),
            (lambda loss: (loss, -1), "weight -1 where"),
            (lambda loss: (loss, float("nan")), "weight nan where"),
            (lambda loss: (loss, 1, 2), r"returned \(Tensor, int, int\)"),
        ],
    )
    def test_wrong_loss_is_refused(self, change, message, model):
        with pytest.raises(CalibrationError, match=message):
            gradients(model, token_batches(), loss_fn=lambda m, b: change(m(**b).loss))

    def test_loss_computed_under_no_grad_is_refused(self, model):
        def loss_fn(model, batch):
            with torch.no_grad():
                return model(**batch).loss

        with pytest.raises(CalibrationError, match=r"ran without gradients.*no_grad"):
            gradients(model, token_batches(), loss_fn=loss_fn)

    def test_loss_of_nothing_that_is_targeted_is_refused(self, model):
        constant = torch.zeros((), requires_grad=True)
        result = measure(model, token_batches(), loss_fn=lambda m, b: constant * 1)
        assert set(result.failures) == set(linears(model))

    def test_nan_in_the_model_names_the_model_and_the_batch(self):
        model = pico_llama()
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        with pytest.raises(
            CalibrationError, match=r"loss of LlamaForCausalLM is nan in .* batch 1"
        ):
            gradients(model, token_batches())

    def test_gradient_that_overflows_names_the_layer(self, model):
        def loss_fn(model, batch):
            return Overflow.apply(model(**batch).loss)

        with pytest.raises(CalibrationError, match=r"gradient of model\.layers\.0.* is not finite"):
            measure(model, token_batches(), loss_fn=loss_fn)


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class TestData:
    """What data may not be."""

    @pytest.mark.parametrize("data", [[], DataLoader([]), iter(())], ids=["list", "loader", "iter"])
    def test_empty_data_are_refused(self, data, model):
        with pytest.raises(DataError, match="gave no batch; a generator can be read only once"):
            gradients(model, data)

    def test_consumed_generator_is_refused(self, model):
        data = (b for b in token_batches())
        gradients(model, data)
        with pytest.raises(DataError, match=r"\(generator\) gave no batch"):
            gradients(model, data)

    def test_all_labels_masked_is_refused(self, model):
        batches = token_batches()
        for batch in batches:
            batch["labels"][:] = -100
        with pytest.raises(DataError, match=r"all labels of the 12 .* are -100.*prompt masking"):
            gradients(model, batches)
        with pytest.raises(DataError, match="all labels of the 12"):
            gradients(model, batches, loss_fn=mean_loss)

    def test_weights_of_zero_only_are_refused(self, model):
        with pytest.raises(DataError, match="loss_fn gave weight 0"):
            gradients(model, token_batches(), loss_fn=lambda m, b: (m(**b).loss, 0))

    def test_batches_without_labels_are_refused(self, model):
        batches = [{"input_ids": b["input_ids"]} for b in token_batches()]
        with pytest.raises(DataError, match=r"no loss for a .* \['input_ids'\]; add 'labels'"):
            gradients(model, batches)

    def test_collate_fn_beside_a_loader_is_refused(self, model):
        with pytest.raises(ConfigError, match="pass it to the DataLoader"):
            gradients(model, DataLoader(token_batches()), collate_fn=pad)


def test_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = pico_llama()
    with pytest.raises(CalibrationError, match=r"embed_tokens\.weight is on the meta device.*load"):
        gradients(model, token_batches())
    with pytest.raises(CalibrationError, match=r"embed_tokens\.weight is on the meta device"):
        model_fingerprint(model, skip=())


def test_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = pico_llama()
    with pytest.raises(CalibrationError, match=r"was created under torch\.inference_mode"):
        gradients(model, token_batches())


def test_accelerators_autocast_is_used_and_float16_is_scaled(model, monkeypatch):
    want = gradients(model, token_batches())
    accelerator = accelerate.Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    got = gradients(model, token_batches(), accelerator=accelerator)
    # bfloat16 in, float32 sums: near, and not equal, so the autocast was on (see test_modes).
    assert 1e-4 < worst_error(got, want) < 0.03
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.float16))
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")

    def small_loss(model, batch):
        return model(**batch).loss * 1e-3, n_terms(batch)

    got = gradients(model, token_batches(), accelerator=accelerator, loss_fn=small_loss)
    # 11 bits; without the loss scale the error is above 0.1.
    assert worst_error({n: 1e3 * g for n, g in got.items()}, want) < 0.01


def test_float16_autocast_of_the_caller_is_scaled(model):
    want = gradients(model, token_batches())

    def small_loss(model, batch):
        return model(**batch).loss * 1e-3, n_terms(batch)

    with torch.autocast("cpu", torch.float16):
        got = gradients(model, token_batches(), loss_fn=small_loss)
    assert worst_error({n: 1e3 * g for n, g in got.items()}, want) < 0.01  # as above


def test_triplets_are_those_of_the_mean_gradient(model):
    want = gradients(model, token_batches())
    result = measure(model, token_batches())
    assert result.failures == {}
    for name, gradient in want.items():
        S = torch.linalg.svdvals(gradient)
        svd = result.triplets[name]
        assert relative_error(svd.S, S[:2]) < FLOAT32
        # (G v) / sigma = u for each triplet
        assert relative_error(gradient @ svd.Vh.T / svd.S, svd.U) < 1e-3  # gaps amplify rounding
        assert result.energy[name] == pytest.approx(S.square().sum().item(), rel=1e-4)


def test_fingerprint_is_of_the_weights_under_their_plain_names():
    model = pico_gpt2()
    plain = model_fingerprint(model, skip=())
    names = dict(model.named_parameters(remove_duplicate=False))  # the tied head under its own
    assert plain.keys() == names.keys()
    assert model_fingerprint(pico_gpt2(), skip=()) == plain
    assert model_fingerprint(pico_gpt2(seed=1), skip=()) != plain
    assert model_fingerprint(torch.compile(model, backend="aot_eager"), skip=()) == plain
    model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="aot_eager")
    assert model_fingerprint(model, skip=()) == plain
    assert "lm_head" not in "".join(model_fingerprint(model, skip=("lm_head", "wte")))


def test_progress_bar_counts_tokens_of_the_budget(model, capsys):
    collect(model, {}, {}, quiet(token_batches(), max_tokens=30))
    assert capsys.readouterr().err == ""
    collect(model, {}, {}, quiet(token_batches(), max_tokens=30, progress=True))
    assert "/30" in capsys.readouterr().err
