"""LoRA-GA: the paper's formulas from autograd's gradient, and its claim about the first step."""

import math

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_gradinit import LoraGAConfig
from peft_gradinit.errors import ConfigError, ShapeError, TargetError
from peft_gradinit.linalg import TruncatedSVD, truncated_svd
from peft_gradinit.methods import lora_ga_factors
from tests.helpers import (
    SVD_TOLERANCE,
    adapted,
    anchors,
    autograd_gradients,
    logits,
    lora_ga,
    matrix_with_spectrum,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    token_batches,
)

R = 3
INDICES = {
    "ArB2r": ([0, 1, 2], [3, 4, 5]),
    "A2rBr": ([3, 4, 5], [0, 1, 2]),
    "ArBr": ([1, 3, 5], [0, 2, 4]),
}
MODELS = [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d")]


def dense(**options):
    return lora_ga(
        calibration=quiet(token_batches(), estimator="dense"),
        **{"r": R, "lora_alpha": 6, **options},
    )


def logical_gradients(model, names):
    """Gradients in the layout of nn.Linear."""
    gradients = autograd_gradients(model, token_batches(), names)
    is_conv1d = {n: type(model.get_submodule(n)).__name__ == "Conv1D" for n in names}
    return {n: g.T if is_conv1d[n] else g for n, g in gradients.items()}


def assert_products_equal(got, want, tolerance=SVD_TOLERANCE):
    """Products, since no formula can tell the sign of a single vector."""
    (A, B), (A0, B0) = got, want
    assert relative_error(A.T @ A, A0.T @ A0) <= tolerance
    assert relative_error(B @ B.T, B0 @ B0.T) <= tolerance
    assert relative_error(B @ A, B0 @ A0) <= tolerance


def formula(gradient, for_A, for_B, length):
    """Theorem 3.1 with the exact SVD in float64."""
    svd = truncated_svd(gradient.double(), 2 * R)
    U, _, Vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    signs = (svd.U * U[:, : 2 * R]).sum(0).sign()  # the package's canonical signs
    U, Vh = U[:, : 2 * R] * signs, Vh[: 2 * R] * signs[:, None]
    return (length * Vh[for_A]).float(), (length * U[:, for_B]).float()


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("direction", list(INDICES))
def test_factors_are_the_papers_formula_from_autograds_gradient(make, direction):
    found = anchors(adapted(make(), dense(direction=direction)))
    model = make()
    for name, gradient in logical_gradients(model, list(found)).items():
        length = gradient.shape[0] ** 0.25 / math.sqrt(16)
        S = torch.linalg.svdvals(gradient)[: 2 * R + 1]
        # Singular vectors of two float32 gradients differ by their error over the relative gap.
        tolerance = 1e-6 * max(10, S[0] / (S[:-1] - S[1:]).min())
        want = formula(gradient, *INDICES[direction], length)
        assert_products_equal(found[name], want, tolerance)


def test_random_direction_uses_disjoint_halves_that_the_seed_decides():
    def start(seed):
        calibration = quiet(token_batches(), estimator="dense", seed=seed)
        config = lora_ga(calibration=calibration, r=R, direction="random")
        return anchors(adapted(pico_llama(), config))

    first, again, other = start(0), start(0), start(1)
    gradients = logical_gradients(pico_llama(), list(first))
    halves = {}
    for name, (A0, B0) in first.items():
        svd = truncated_svd(gradients[name], 2 * R)
        in_A = (A0 @ svd.Vh.T).abs().sum(0) > 0.1
        in_B = (svd.U.T @ B0).abs().sum(1) > 0.1
        assert (in_A ^ in_B).all()
        assert in_A.sum() == in_B.sum() == R
        halves[name] = tuple(in_A.tolist())
    assert len(set(halves.values())) > 1, "every layer draws its own halves"
    assert all(torch.equal(again[n][0], A0) for n, (A0, _) in first.items())
    assert any(not torch.equal(other[n][0], A0) for n, (A0, _) in first.items())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit", "weight_svd", "lora"])
@pytest.mark.parametrize("make", MODELS)
def test_factors_have_the_lengths_of_the_scale(make, scale, use_rslora):
    config = dense(scale=scale, use_rslora=use_rslora, stable_gamma=64)
    peft_model = adapted(make(), config)
    s = 6 / math.sqrt(R) if use_rslora else 6 / R
    for name, (A0, B0) in anchors(peft_model).items():
        weight = make().get_submodule(name).weight
        weight = weight.T if B0.shape[0] != weight.shape[0] else weight
        sigma = torch.linalg.svdvals(weight)[:R]
        want_A = want_B = {
            "stable": B0.shape[0] ** 0.25 / 8,
            "gd": 1 / s,
            "unit": 1.0,
            "weight_svd": (sigma / s).sqrt().mean().item(),
            "lora": 3**-0.5,
        }[scale]
        want_B = 0.1 if scale == "lora" else want_B
        # 1e-5: norms of float32 singular vectors
        assert A0.norm(dim=1).tolist() == pytest.approx([want_A] * R, rel=1e-5)
        assert B0.norm(dim=0).tolist() == pytest.approx([want_B] * R, rel=1e-5)


def test_scaling_uses_the_patterns_of_the_layer():
    config = dense(scale="gd", rank_pattern={"k_proj": 2}, alpha_pattern={"q_proj": 12})
    found = anchors(adapted(pico_llama(), config))
    for name, (A0, _) in found.items():
        r, alpha = 2 if "k_proj" in name else R, 12 if "q_proj" in name else 6
        assert A0.shape[0] == r
        assert A0.norm(dim=1).tolist() == pytest.approx([r / alpha] * r, rel=1e-5)


def test_scale_of_the_loss_does_not_matter():
    def start(factor):
        def loss_fn(model, batch):
            return factor * model(**batch).loss, int((batch["labels"][:, 1:] != -100).sum())

        calibration = quiet(token_batches(), estimator="dense", loss_fn=loss_fn)
        return anchors(adapted(pico_llama(), lora_ga(calibration=calibration, r=R)))

    plain, loud = start(1.0), start(1024.0)  # a power of two, so float32 rounds both alike
    for name, (A0, B0) in plain.items():
        assert_products_equal(loud[name], (A0, B0))


@pytest.mark.parametrize("estimator", ["sketch", "dense"])
def test_two_runs_are_bitwise_equal(estimator):
    def start():
        calibration = quiet(token_batches(), estimator=estimator)
        return anchors(adapted(pico_llama(), lora_ga(calibration=calibration)))

    first, second = start(), start()
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("r", [20, 10_000])
def test_too_large_ranks_are_lowered_per_layer_at_the_same_scaling(r, use_rslora):
    config = dense(r=r, lora_alpha=r, use_rslora=use_rslora)
    with pytest.warns(UserWarning, match=r"fewer and get a lower rank .*k_proj \(12 of"):
        peft_model = adapted(pico_llama(), config)
    assert config.rank_pattern == {}, "the user's config stays as it was"
    for name, layer in peft_model.base_model.model.named_modules():
        if name in anchors(peft_model):
            assert layer.r["default"] == min(r, min(layer.out_features, layer.in_features) // 2)
            want = math.sqrt(r) if use_rslora else 1.0
            assert layer.scaling["default"] == pytest.approx(want, rel=1e-12)
    assert relative_error(logits(peft_model), logits(pico_llama())) <= 1e-4  # |s B0 A0| is large


def test_layer_too_narrow_for_rank_1_is_named():
    model = pico_llama()
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(48, 1)
    with pytest.raises(
        TargetError, match=r"cannot start model\.layers\.0\.mlp\.gate_proj.*\(1, 48\)"
    ):
        adapted(model, dense())


def effective_changes(peft_model, names, lr=1e-3):
    """Change of the layers' effective weights over one SGD step on the calibration data."""
    layers = {name: peft_model.base_model.model.get_submodule(name) for name in names}
    before = {n: layer.get_delta_weight("default").detach() for n, layer in layers.items()}
    n_tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in token_batches()]
    for batch, n in zip(token_batches(), n_tokens, strict=True):
        (peft_model(**batch).loss * n / sum(n_tokens)).backward()
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return {n: layer.get_delta_weight("default") - before[n] for n, layer in layers.items()}


def cosine(A, B):
    return torch.nn.functional.cosine_similarity(A.flatten(), B.flatten(), dim=0).item()


def test_first_sgd_step_follows_the_gradient_better_than_plain_lora():
    ours = adapted(pico_llama(), dense())
    names = list(anchors(ours))
    config = LoraConfig(r=R, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    ours = effective_changes(ours, names)
    plain = effective_changes(get_peft_model(pico_llama(), config), names)
    for name, G in logical_gradients(pico_llama(), names).items():
        assert cosine(ours[name], -G) > cosine(plain[name], -G) > 0
        best = truncated_svd(G, 2 * R).S.norm() / G.norm()
        # No rank-2r step is better; 1e-3: terms of second order in the learning rate.
        assert cosine(ours[name], -G) <= best + 1e-3


@pytest.mark.parametrize("direction", [*INDICES, "random"])
def test_first_step_direction_is_the_best_rank_2r_approximation_for_equal_singular_values(
    direction,
):
    G = matrix_with_spectrum(30, 20, torch.ones(2 * R))
    generator = torch.Generator().manual_seed(0)
    svd = truncated_svd(G, 2 * R)
    A0, B0 = lora_ga_factors(svd, direction=direction, lengths=(1.7, 1.7), generator=generator)
    step = B0 @ (B0.T @ G) + (G @ A0.T) @ A0
    assert relative_error(step, 1.7**2 * G) <= 1e-12  # float64


@pytest.mark.parametrize("n", [0, 3])
def test_odd_or_no_triplets_are_refused(n):
    svd = TruncatedSVD(torch.zeros(5, n), torch.zeros(n), torch.zeros(n, 4))
    with pytest.raises(ShapeError, match=f"got {n} of them"):
        lora_ga_factors(svd, lengths=(1.0, 1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, r"direction must be one of .*'ArB2r'.*got 'up'"),
        ({"scale": "big"}, r"scale must be one of .*'stable'.*got 'big'"),
        ({"stable_gamma": 0}, "stable_gamma must be a positive number, got 0"),
        ({"stable_gamma": math.nan}, "stable_gamma must be a positive number, got nan"),
        ({"stable_gamma": math.inf}, "stable_gamma must be a positive number, got inf"),
        ({"stable_gamma": True}, "stable_gamma must be a positive number, got True"),
        ({"stable_gamma": "16"}, "stable_gamma must be a positive number, got '16'"),
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": 2.5}, r"r must be a positive integer, got 2\.5"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a positive integer"),
        ({"lora_alpha": True}, "lora_alpha must be a positive number, got True"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be a positive number"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must stay True, got 'pissa'"),
        ({"init_lora_weights": False}, "init_lora_weights must stay True, got False"),
        ({"uncalibrated": "skip"}, "uncalibrated must be 'error' or 'lora', got 'skip'"),
        (
            {"lora_ga_config": peft.LoraGAConfig()},
            "cannot be used with lora_ga_config=.*PEFT's own",
        ),
        ({"eva_config": peft.EvaConfig()}, "cannot be used with eva_config=.*PEFT's own EVA"),
        ({"layer_replication": [(0, 2)]}, "cannot be used with layer_replication="),
        (
            {"calibration": peft.LoraGAConfig()},
            "LoraGAConfig.* is a sub-config of PEFT's own method",
        ),
        ({"calibration": peft.EvaConfig()}, "EvaConfig.* is a sub-config of PEFT's own method"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:`eva_config` specified but will be ignored")
@pytest.mark.filterwarnings("ignore:`lora_ga_config` specified but will be ignored")
def test_bad_options_are_refused_with_their_name_and_value(options, message):
    with pytest.raises(ConfigError, match=message):
        LoraGAConfig(target_modules="all-linear", **options)
