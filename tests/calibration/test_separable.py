"""Only batches that are known to be means over independent rows are cut; others stay whole."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.utils import ModelOutput

from peft_gradinit.calibration import Feed
from peft_gradinit.calibration.feed.separable import (
    is_mean_over_rows,
    is_sliceable,
    model_inside,
)
from peft_gradinit.calibration.feed.shards import shares
from peft_gradinit.layouts import Processes
from tests.calibration.passes import FLOAT32, gradients, linears, run_pass, worst_error
from tests.helpers import pad, pico_gpt2, pico_llama, quiet, rows_of, token_batches

SIZES = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 96, "num_hidden_layers": 1}


class BiEncoder(nn.Module):
    """Compares every query with every document of the batch."""

    def __init__(self):
        super().__init__()
        self.embedding, self.a = nn.Embedding(96, 16), nn.Linear(16, 8)

    def encode(self, ids):
        return nn.functional.normalize(self.a(self.embedding(ids)).mean(1), dim=-1)

    def forward(self, input_ids, labels=None):
        similarity = self.encode(input_ids) @ self.encode(labels).T / 0.05
        loss = nn.functional.cross_entropy(similarity, torch.arange(len(input_ids)))
        return ModelOutput(loss=loss, logits=similarity)


class OwnForward(LlamaForCausalLM):
    """A class of the user's with a name that Transformers would know."""

    def forward(self, **batch):
        return super().forward(**batch)


def mixtral(**options):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, **options
    )
    return MixtralForCausalLM(config).eval()


def bert(kind):
    return kind(BertConfig(**SIZES, num_attention_heads=2))


def with_loss_function():
    model = pico_llama()
    model.loss_function = lambda **_: torch.zeros(())
    return model


MODELS = {
    "causal": (pico_llama, True),
    "gpt2": (pico_gpt2, True),
    "compiled": (lambda: torch.compile(pico_llama(), backend="aot_eager"), True),
    "masked": (lambda: bert(BertForMaskedLM), True),
    "classes": (lambda: bert(BertForSequenceClassification), True),
    "router logits off": (mixtral, True),
    "router logits on": (lambda: mixtral(output_router_logits=True), False),
    "several heads": (
        lambda: GPT2DoubleHeadsModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)),
        False,
    ),
    "own module": (BiEncoder, False),
    "own forward": (lambda: OwnForward(pico_llama().config), False),
    "own loss function": (with_loss_function, False),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_whose_loss_is_a_mean_over_rows_are_known_by_name(name):
    model, is_known = MODELS[name]
    assert is_mean_over_rows(model()) is is_known


def test_the_model_is_found_inside_the_wrappers_of_the_libraries():
    model = pico_llama()
    assert model_inside(torch.compile(model, backend="aot_eager")) is model
    assert model_inside(model) is model
    own = nn.Sequential(nn.Linear(2, 2))
    assert model_inside(own) is own


IDS = torch.ones(3, 5, dtype=torch.long)
BATCHES = {
    "tokens": ({"input_ids": IDS, "attention_mask": IDS, "labels": IDS}, True),
    "positions": ({"input_ids": IDS, "position_ids": IDS}, True),
    "positions in three dimensions": (
        {"input_ids": IDS, "position_ids": torch.ones(3, 3, 5, dtype=torch.long)},
        False,
    ),
    "images": ({"pixel_values": torch.ones(3, 3, 8, 8), "labels": torch.ones(3)}, True),
    "patches": ({"pixel_values": torch.ones(3, 8), "labels": torch.ones(3)}, False),
    "tokens and images": ({"input_ids": IDS, "pixel_values": torch.ones(3, 3, 8, 8)}, False),
    "unknown": ({"input_ids": IDS, "head_mask": torch.ones(3)}, False),
    "audio": ({"input_values": torch.ones(3, 400), "labels": IDS}, True),
    "different rows": ({"input_ids": IDS, "labels": IDS[:2]}, False),
    "empty": ({}, False),
    "tuple": ((IDS, IDS), False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_rows_of_a_batch_are_known_by_the_names_of_its_tensors(name):
    batch, is_known = BATCHES[name]
    assert is_sliceable(batch) is is_known


def mean_gradients(model, batches, weights):
    """The weighted mean of the gradients of whole batches, by plain autograd."""
    parameters = {name: module.weight for name, module in linears(model).items()}
    loss = sum(w * model(**b).loss for b, w in zip(batches, weights, strict=True)) / sum(weights)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def test_losses_that_compare_rows_are_measured_on_whole_batches():
    torch.manual_seed(0)
    model, ids = BiEncoder(), torch.randint(0, 96, (2, 20, 6))
    batches = [{"input_ids": ids[0], "labels": ids[1]}]
    got, facts = run_pass(model, batches)
    assert worst_error(got, mean_gradients(model, batches, [1])) < FLOAT32
    assert facts.n_sequences == 20


def test_router_losses_are_measured_on_whole_batches():
    model, batches = mixtral(output_router_logits=True), [pad(rows_of(token_batches(20)))]
    got = gradients(model, batches)
    want = mean_gradients(model, batches, [1])
    assert worst_error(got, {n: want[n] for n in got}) < FLOAT32


def wav2vec2(reduction):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **{**SIZES, "vocab_size": 12},
        num_attention_heads=2,
        ctc_loss_reduction=reduction,
        conv_dim=(8,),
        conv_stride=(20,),
        conv_kernel=(40,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        apply_spec_augment=False,
    )
    return Wav2Vec2ForCTC(config).eval()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ctc_losses_count_every_clip_once(reduction):
    torch.manual_seed(1)
    model = wav2vec2(reduction)
    batches = [
        {"input_values": torch.randn(n, 1600), "labels": torch.randint(1, 12, (n, length))}
        for n, length in ((12, 3), (2, 9))
    ]
    batches[0]["labels"][0, 1:] = -100
    weights = [12, 2]
    if reduction == "sum":  # of all clips; the pass gives the mean over them
        weights = [1, 1]
    want = mean_gradients(model, batches, weights)
    want = {n: g * sum(weights) / 14 for n, g in want.items()}
    got, facts = run_pass(model, batches)
    assert facts.loss_weight == 14
    # Where the batches are cut changes the order of sums alone.
    assert worst_error(got, want) < 10 * FLOAT32
    clips = [
        {k: v[i : i + 1] for k, v in batch.items()}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    assert worst_error(gradients(model, clips), want) < 10 * FLOAT32


@pytest.mark.parametrize(("computes_loss", "n"), [(True, 1), (False, 3)])
def test_processes_share_whole_batches_of_a_loss_of_several_rows(computes_loss, n):
    batch = {"input_ids": IDS, "labels": IDS}

    def steps(rank):
        feed = Feed(quiet([batch]), BiEncoder(), computes_loss=computes_loss)
        return list(shares(iter(feed), Processes(rank, 3)))

    parts = [[step for step in steps(rank) if step.counts] for rank in range(3)]
    assert sum(map(len, parts)) == n
    assert sum(len(step.batch["labels"]) for part in parts for step in part) == 3
