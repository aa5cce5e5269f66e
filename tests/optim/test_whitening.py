"""Powers of Gram matrices and polar factors, against decompositions of the matrices themselves."""

import pytest
import torch

from peft_gradinit.optim.whitening import gram_power
from tests.helpers import matrix_with_spectrum


def polar(tall):
    return tall @ gram_power(tall, -0.5)


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_a_power_is_that_of_the_singular_values(exponent):
    X = matrix_with_spectrum(12, 4, torch.tensor([3.0, 1.0, 0.5, 0.1]))
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    for dampening in (1e-13, 1e-3):
        want = Vh.T @ torch.diag((S**2 + dampening * S[0] ** 2) ** exponent) @ Vh
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
