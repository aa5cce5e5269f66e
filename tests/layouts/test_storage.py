"""Hashes of weights: equal for equal values, however they are stored; of all of a tensor."""

import re

import pytest
import torch

from peft_gradinit.layouts.storage import hash_weight


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_hash_is_equal_for_a_float32_weight_and_its_bfloat16_copy():
    W = weight(96, 80)

    assert hash_weight(W.bfloat16()) == hash_weight(W)
    assert hash_weight(W.bfloat16().float()) == hash_weight(W)
    assert re.fullmatch("[0-9a-f]{16}", hash_weight(W))


def test_the_hash_is_of_values_not_of_storage():
    W = weight(96, 80)

    assert hash_weight(W.T.contiguous().T) == hash_weight(W)
    assert hash_weight(torch.nn.Parameter(W)) == hash_weight(W)


def test_the_hash_changes_with_the_shape():
    W = weight(96, 80)

    assert hash_weight(W.reshape(80, 96)) != hash_weight(W)


@pytest.mark.parametrize("shape", [(7,), (64, 64), (96, 80), (512, 4096)], ids=str)
def test_the_hash_changes_after_a_training_step(shape):
    W = weight(*shape)

    # One per cent is more than bfloat16's rounding of 0.4 %.
    assert hash_weight(W * 1.01) != hash_weight(W)


@pytest.mark.parametrize("n", [4096, 5000, 8191, 8192, 40_000])
def test_the_sample_is_spread_over_all_of_the_tensor(n):
    W = weight(n)
    for part in (slice(0, n // 8), slice(n - n // 8, n)):
        other = W.clone()
        other[part] += 1
        assert hash_weight(other) != hash_weight(W)


def test_the_sample_does_not_stay_in_one_column():
    # 1,024 x 4,096 has 1,024 times as many entries as are sampled, a divisor of its row length.
    W = weight(1024, 4096)
    other = W.clone()
    other[:, 1024 * torch.arange(4)] += 1
    rest = torch.where(other == W, W + 1, W)

    assert hash_weight(other) != hash_weight(W)
    assert hash_weight(rest) != hash_weight(W)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_quantised_storage_is_hashed_as_it_is(dtype):
    W = torch.arange(6000).reshape(60, 100).to(dtype)
    other = W.clone()
    other[0, 0] = not W[0, 0]

    assert hash_weight(W) == hash_weight(W.clone())
    assert hash_weight(other) != hash_weight(W)


def test_empty_and_scalar_tensors_have_hashes():
    assert hash_weight(torch.empty(0, 4)) != hash_weight(torch.empty(4, 0))
    assert hash_weight(torch.tensor(1.0)) != hash_weight(torch.tensor(2.0))
