"""The forward-only pass: right tokens, any data, within the budget, model left as found."""

import math

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_gradinit.calibration import CalibrationResult
from peft_gradinit.calibration.capture import ArgumentWatch
from peft_gradinit.errors import CalibrationError, DataError
from tests.calibration.input_passes import (
    RANK,
    agree,
    exact,
    masked_prompts,
    measure,
    predicting,
    same,
    unpadded,
)
from tests.calibration.passes import linears
from tests.helpers import overlap, pad, pico_gpt2, pico_llama, rows_of, token_batches


@pytest.mark.parametrize("make", [pico_llama, pico_gpt2])
@pytest.mark.parametrize("centered", [True, False])
def test_the_components_are_those_of_all_unpadded_inputs(make, centered):
    model, batches = make(), token_batches()
    result = measure(model, batches, centered=centered, use_labels=False)

    assert agree(result, exact(model, batches, unpadded, centered))
    assert all(s.U.shape == (0, RANK) and (s.S.diff() <= 0).all() for s in result.triplets.values())


def test_tokens_that_carry_loss_are_those_before_kept_labels():
    model, batches = pico_llama(), masked_prompts()
    result = measure(model, batches)

    assert agree(result, exact(model, batches, predicting))
    assert result.facts.loss_weight == sum(int(predicting(b).sum()) for b in batches)
    # Selecting the labelled tokens themselves, as PEFT does, is something else.
    with pytest.raises(AssertionError):
        assert agree(result, exact(model, batches, lambda b: b["labels"] != -100))


@pytest.mark.parametrize("prefix", ["completion_", "sentence_0_"])
def test_padding_does_not_count_whatever_the_batch_calls_its_mask(prefix):
    model, batches = pico_llama(), token_batches()
    renamed = [{prefix + name: value for name, value in b.items()} for b in batches]

    def loss_fn(model, batch):
        names = ("input_ids", "attention_mask")
        return model(**{name: batch[prefix + name] for name in names}).logits.mean()

    result = measure(model, renamed, use_labels=False, loss_fn=loss_fn)
    assert agree(result, exact(model, batches, unpadded))


class Sentences(nn.Module):
    """Encodes dicts of texts side by side, as Sentence Transformers do; the model is a part of it."""

    def __init__(self):
        super().__init__()
        self.auto_model = pico_llama()

    def forward(self, left, right):
        return sum(self.auto_model(**side).logits.mean() for side in (left, right))


def test_texts_in_dicts_side_by_side_count_by_their_own_masks():
    batches, model = token_batches(), Sentences()
    sides = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches]
    shorter = {name: tensor[:, :-2] for name, tensor in sides[1].items()}
    pairs = [{"left": sides[0], "right": shorter}]

    modules = linears(model.auto_model)
    result = measure(model, pairs, modules, use_labels=False)
    assert agree(result, exact(model.auto_model, [sides[0], shorter], unpadded))


def test_a_forward_inside_another_is_not_asked_and_an_error_ends_none():
    model, batches, told = pico_llama(), token_batches(), []
    watch = ArgumentWatch(model, told.append)
    with watch.watching():
        model(batches[0]["input_ids"], attention_mask=batches[0]["attention_mask"], labels=None)
        with pytest.raises(ValueError, match="exactly one"):
            model()
        model.model(batches[0]["input_ids"])
    model(batches[0]["input_ids"])

    assert [sorted(given) for given in told] == [["attention_mask", "input_ids"], [], ["input_ids"]]


def test_neither_labels_nor_a_loss_are_needed_or_computed(monkeypatch):
    model, batches = pico_llama(), token_batches()
    without = [{k: v for k, v in b.items() if k != "labels"} for b in batches]

    def refuse(*args, **kwargs):
        raise AssertionError("a loss was computed")

    monkeypatch.setattr(type(model), "loss_function", refuse)
    result = measure(model, without)

    assert same(measure(model, batches, use_labels=False), result)
    assert result.facts.loss is None


def test_labels_are_passed_where_forward_requires_them():
    class Demanding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, labels):
            return self.layer(x) * labels.sum()

    batches = [{"x": torch.randn(4, 5, 8), "labels": torch.ones(4)} for _ in range(2)]
    assert not measure(Demanding(), batches).failures


@pytest.mark.parametrize(
    "wrap",
    [
        lambda batches: [BatchEncoding(b) for b in batches],
        lambda batches: iter(batches),
        lambda batches: [pad([row]) for row in rows_of(batches)],
        lambda batches: [pad(rows_of(batches), extra=5)],
        lambda batches: list(reversed(batches)),
    ],
    ids=["BatchEncoding", "generator", "single sequences", "one padded batch", "reversed"],
)
def test_the_form_and_the_split_of_the_data_do_not_matter(wrap):
    model, batches = pico_llama(), token_batches()
    assert same(measure(model, wrap(batches)), measure(model, batches))


def test_the_sketch_agrees_across_batch_splits_with_orientation():
    model = pico_llama(hidden_size=96, intermediate_size=112)
    batches = token_batches(n=30)
    options = {"estimator": "sketch", "sketch_size": 40}
    results = [
        measure(model, data, **options)
        for data in (batches, [pad(rows_of(batches))], [pad([r]) for r in rows_of(batches)])
    ]

    # Narrower than the layers, so these are sketches.
    assert results[0].facts.state_bytes < measure(model, batches).facts.state_bytes
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_loss_fn_runs_the_model_and_its_value_is_not_used():
    model, batches = pico_llama(), token_batches()
    wrapped = [{"inputs": b["input_ids"], "mask": b["attention_mask"]} for b in batches]

    def loss_fn(model, batch):
        model(input_ids=batch["inputs"], attention_mask=batch["mask"])
        return "not a loss"

    assert not measure(model, wrapped, loss_fn=loss_fn).failures


def test_batches_shorter_than_the_rank_add_what_they_have():
    model = pico_llama()
    batches = [pad([row[:2]]) for row in rows_of(token_batches())]

    result = measure(model, batches, rank=8, use_labels=False)

    assert not result.failures
    for svd in result.triplets.values():
        torch.testing.assert_close(svd.Vh @ svd.Vh.T, torch.eye(8), atol=1e-4, rtol=0)


def test_fewer_tokens_than_components_end_finite_and_orthonormal():
    result = measure(pico_llama(), [pad([torch.tensor([1, 2, 3])])], rank=8, use_labels=False)
    for svd in result.triplets.values():
        torch.testing.assert_close(svd.Vh @ svd.Vh.T, torch.eye(8), atol=1e-4, rtol=0)
        assert svd.S.isfinite().all()


def test_more_components_than_inputs_are_capped():
    layer = nn.Sequential(nn.Linear(5, 3))
    result = measure(layer, [(torch.randn(20, 5),)], rank=16)
    assert result.triplets["0"].Vh.shape == (5, 5)


def test_all_labels_masked_is_an_error_that_says_so():
    batches = token_batches()
    for batch in batches:
        batch["labels"][:] = -100
    with pytest.raises(DataError, match="no token of the 12 calibration sequences carries loss"):
        measure(pico_llama(), batches)
    assert not measure(pico_llama(), batches, use_labels=False).failures


def test_batches_without_loss_are_skipped():
    model, batches = pico_llama(), masked_prompts()
    silent = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    assert same(measure(model, [silent, *batches]), measure(model, batches))


@pytest.mark.parametrize("data", [[], iter(())])
def test_empty_data_are_an_error(data):
    with pytest.raises(DataError, match="gave no batch"):
        measure(pico_llama(), data)


class WithIdle(nn.Module):
    """One layer runs, one is constant, one never runs."""

    def __init__(self):
        super().__init__()
        self.used, self.constant, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x) + self.constant(torch.full_like(x, 0.3))


def test_layers_that_cannot_be_measured_are_named_with_the_reason():
    result = measure(WithIdle(), [(torch.randn(4, 5, 8),) for _ in range(3)])

    assert set(result.triplets) == {"used"}
    assert result.failures == {
        "constant": "its inputs are constant over 60 tokens",
        "idle": "it never ran in 3 batches",
    }


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer():
    x = torch.randn(4, 5, 8)
    x[0, 0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="inputs of used are not finite"):
        measure(WithIdle(), [(x,)])


def test_padding_that_is_not_finite_does_not_matter():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.table = nn.Embedding(10, 8)

        def forward(self, input_ids, attention_mask):
            x = self.table(input_ids)
            return self.layer(x.masked_fill(attention_mask[..., None] == 0, float("nan")))

    batch = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4)}
    batch["attention_mask"][0, 2:] = 0
    assert not measure(Poisoned(), [batch]).failures


def test_layers_that_share_inputs_are_measured_once():
    model, batches = pico_llama(), token_batches()
    every = measure(model, batches).facts.state_bytes
    alone = sum(
        measure(model, batches, {n: m}).facts.state_bytes for n, m in linears(model).items()
    )
    # Per block: q, k, v share; o; gate, up share; down. Seven layers, four statistics.
    assert every < 0.75 * alone


@pytest.mark.parametrize("budget", [{"max_tokens": 30}, {"max_batches": 2}])
def test_endless_data_end_with_the_budget(budget):
    def endless():
        while True:
            yield from token_batches()

    result = measure(pico_llama(), endless(), settle=0.999999, **budget)
    assert result.facts.stopped_by == next(iter(budget))


def test_reading_ends_when_the_subspaces_have_settled():
    spread = 10.0 ** -torch.arange(8)
    batches = [(torch.randn(4, 5, 8) * spread,) for _ in range(60)]
    model = nn.Sequential(nn.Linear(8, 8))
    early = measure(model, batches, rank=2, settle=0.99)
    late = measure(model, batches, rank=2, max_tokens=10_000)

    # Two orientations, at 8 and at 24 sequences, and the batch that followed the second.
    assert (early.facts.stopped_by, early.facts.n_sequences) == ("settled", 28)
    assert (late.facts.stopped_by, late.facts.n_sequences) == ("end of data", 240)
    assert overlap(early.triplets["0"].Vh, late.triplets["0"].Vh) > 0.99


def test_a_layer_without_tokens_keeps_the_pass_from_settling():
    batches = [(torch.randn(4, 5, 8),) for _ in range(10)]
    assert measure(WithIdle(), batches, settle=0.01).facts.stopped_by == "end of data"


def test_the_model_is_left_as_it_was_found():
    model = pico_llama().train()
    model.lm_head.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    weights = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    random = torch.get_rng_state()

    def broken():
        yield token_batches()[0]
        raise RuntimeError("the user's code")

    measure(model, token_batches())
    with pytest.raises(RuntimeError, match="the user's code"):
        measure(model, broken())

    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {
        n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()
    } == hooks
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in model.named_parameters():
        before, requires_grad = weights[name]
        assert torch.equal(parameter, before)
        assert parameter.requires_grad == requires_grad
        assert parameter.grad is None


def test_checkpointed_models_give_the_same():
    model, batches = pico_llama(), token_batches()
    want = measure(model, batches)
    model.gradient_checkpointing_enable()
    model.train()
    assert same(measure(model, batches), want)


def test_autocast_does_not_reach_the_sums():
    model, batches = pico_llama(), token_batches()
    want = measure(model, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = measure(model, batches)
    # bfloat16 activations, but float32 sums: the components stay orthonormal and close.
    for name, svd in got.triplets.items():
        assert svd.Vh.dtype == torch.float32
        assert math.isclose(got.energy[name], want.energy[name], rel_tol=0.02)


def test_the_result_survives_a_file(tmp_path):
    result = measure(pico_llama(), token_batches())
    loaded = CalibrationResult.load(result.save(tmp_path / "inputs.safetensors"))

    assert same(result, loaded)
    assert loaded.facts == result.facts
    assert loaded.energy == result.energy
    assert loaded.triplets["lm_head"].U.shape == (0, RANK)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=32, decoder_start_token_id=0, **sizes))


def bart():
    sides = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()
    }
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=16, **sides))


def pairs(longer):
    """Sources of 8 and 6 tokens with targets of 5 and 3; `longer` widens the targets by padding."""
    batch = pad([torch.arange(4, 12), torch.arange(14, 20)])
    labels = torch.full((2, 5 + longer), -100)
    labels[0, :5], labels[1, :3] = torch.arange(20, 25), torch.arange(25, 28)
    return [{**batch, "labels": labels}]


@pytest.mark.parametrize("make", [t5, bart])
def test_an_encoder_and_a_decoder_of_one_length_count_their_own_tokens(make):
    torch.manual_seed(0)
    model = make().eval()
    targets = [n for n in linears(model) if n != "lm_head"]
    modules = {n: model.get_submodule(n) for n in targets}
    want, got = (measure(model, pairs(longer), modules) for longer in (0, 3))
    for name in targets:  # cross-attention among them, which reads both
        assert got.energy[name] == pytest.approx(want.energy[name], rel=1e-4)
        assert overlap(got.triplets[name].Vh, want.triplets[name].Vh) > 1 - 1e-4
