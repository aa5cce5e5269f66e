"""Powers of Gram matrices and polar factors, against decompositions of the matrices themselves."""

import pytest
import torch

from peft_gradinit.linalg import exact_products
from peft_gradinit.optim import LoraMuon, whitening
from peft_gradinit.optim.whitening import gram_power
from tests.helpers import matrix_with_spectrum, relative_error
from tests.optim.rows import every_row, factors, run, toy


def polar(tall):
    return tall @ gram_power(tall, -0.5)


@pytest.fixture(params=["decomposition", "iteration"], autouse=True)
def way(request, monkeypatch):
    """What runs on the CPU, and what runs on accelerators."""
    monkeypatch.setattr(whitening, "decomposes", lambda matrix: request.param == "decomposition")
    return request.param


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_a_power_is_that_of_the_singular_values(exponent):
    X = matrix_with_spectrum(12, 4, torch.tensor([3.0, 1.0, 0.5, 0.1]))
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    for dampening in (1e-13, 1e-3):
        want = Vh.T @ torch.diag((S**2 + dampening * (S**2).norm()) ** exponent) @ Vh
        torch.testing.assert_close(gram_power(X[None], exponent, dampening)[0], want)


@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1.0, 1e12, 1e18])
def test_a_polar_factor_does_not_depend_on_the_size(scale):
    X = matrix_with_spectrum(12, 4, torch.tensor([3.0, 1.0, 0.5, 0.1])).float()
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    torch.testing.assert_close(polar(scale * X[None])[0], U @ Vh, rtol=1e-3, atol=1e-3)


def test_a_polar_factor_has_no_directions_that_are_not_there():
    X = matrix_with_spectrum(12, 4, torch.tensor([3.0, 1.0, 0.0, 0.0])).float()
    values = torch.linalg.svdvals(polar(X[None])[0])
    torch.testing.assert_close(values[:2], torch.ones(2), rtol=1e-3, atol=1e-3)
    assert (values[2:] < 1e-2).all()


def test_zero_has_a_power_of_zero():
    for exponent in (-0.5, -1.0):
        assert not gram_power(torch.zeros(2, 5, 3), exponent, 1e-4).any()
    assert not polar(torch.zeros(2, 5, 3)).any()


def test_matrices_of_a_batch_do_not_know_each_other():
    batch = torch.stack([torch.randn(6, 3), torch.zeros(6, 3), 1e10 * torch.randn(6, 3)])
    together = gram_power(batch, -0.5, 1e-4)
    for i in range(3):
        torch.testing.assert_close(together[i], gram_power(batch[i : i + 1], -0.5, 1e-4)[0])
    spoilt = batch.clone()
    spoilt[1] = float("nan")
    torch.testing.assert_close(gram_power(spoilt, -0.5, 1e-4)[0], together[0])


@pytest.mark.parametrize("r", [3, 8, 64, 256])
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e3, 1e8])
def test_both_ways_are_as_exact_as_float32_allows(r, condition):
    """The error of `X (X^T X)^(-1/2)` is that of the Gram matrix in float32, times its condition."""
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r)
    X = matrix_with_spectrum(512, r, spectrum)[None]
    floor = 1e-4
    want = X @ gram_power(X, -0.5, floor)
    got = X.float() @ gram_power(X.float(), -0.5, floor)
    assert relative_error(got.double(), want) < 1e-3
    assert relative_error(got.double(), want) < 1e-5 or condition > 1


def test_eigenvalues_a_little_below_zero_do_no_harm():
    """As rounding makes them."""
    for r in (8, 64, 256):
        Q = torch.linalg.qr(torch.randn(r, r)).Q
        values = torch.ones(r)
        values[1:] = -torch.finfo(torch.float32).eps
        found = whitening.power(((Q * values) @ Q.T)[None], -0.5)
        assert found.isfinite().all()
        assert found.abs().max() <= 1.01 * (max(8, r) * torch.finfo(torch.float32).eps) ** -0.5 * 2


@every_row
def test_optimizers_take_the_same_steps_either_way(row, monkeypatch):
    model, other = toy(dtype=torch.float64), toy(dtype=torch.float64)
    run(model, row.make(model))
    monkeypatch.setattr(whitening, "decomposes", lambda matrix: False)
    run(other, row.make(other))
    for a, b in zip(factors(model), factors(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_products_are_exact_in_a_step_whatever_the_loop_allows():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with exact_products(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    found = []
    for allowed in (False, True):
        model = toy()
        optimizer = LoraMuon(model, lr=0.03)
        for p in factors_of(model):
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=allowed):
            optimizer.step()
        found.append(factors(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def factors_of(model):
    return [p for p in model.parameters() if p.requires_grad]
