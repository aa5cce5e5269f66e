"""The calibration file: round trip, refusals that name both values, damage, interruption."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from peft_gradinit.errors import FingerprintError
from peft_gradinit.linalg import truncated_svd
from peft_gradinit.statistics import Fingerprint, hash_weight, load_triplets, save_triplets, store

TARGETS = {"model.q_proj": [20, 16, 4], "model.v_proj": [8, 16, 2]}
FINGERPRINT = Fingerprint(
    statistic="gradient",
    weights={"model.q_proj.weight": "aa11", "model.v_proj.weight": "bb22"},
    targets=TARGETS,
    options={"estimator": "sketch", "seed": 3, "max_tokens": None},
)
FACTS = {"energy": {"model.q_proj": 1.5}, "note": "naïve facts", "pass": {"n_tokens": 12}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "calibration.safetensors"


def triplets(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: truncated_svd(torch.randn(out, in_, generator=generator), rank)
        for name, (out, in_, rank) in TARGETS.items()
    }


def save(path, seed=0):
    save_triplets(path, triplets(seed), FINGERPRINT, FACTS)


def assert_holds(path, seed):
    loaded, _, _ = load_triplets(path)
    for name, svd in triplets(seed).items():
        assert all(torch.equal(a, b) for a, b in zip(loaded[name], svd, strict=True))


def changed(**values):
    return dataclasses.replace(FINGERPRINT, **values)


# --- round trip ----------------------------------------------------------------------------------


def test_a_round_trip_gives_everything_back_bit_for_bit(path):
    save(path)

    loaded, fingerprint, facts = load_triplets(path)

    assert loaded.keys() == TARGETS.keys()
    assert_holds(path, seed=0)
    assert fingerprint == FINGERPRINT
    assert facts == FACTS


def test_folders_are_made_and_paths_may_be_strings(tmp_path):
    nested = f"{tmp_path}/new/deeper/c.safetensors"
    save(nested)

    assert_holds(nested, seed=0)


def test_a_target_without_triplets_is_absent_after_loading(path):
    save_triplets(path, {"model.q_proj": triplets()["model.q_proj"]}, FINGERPRINT, {})

    loaded, fingerprint, _ = load_triplets(path)

    assert loaded.keys() == {"model.q_proj"}
    assert fingerprint.targets == TARGETS


def test_targets_may_share_their_triplets(path):
    shared = triplets()["model.q_proj"]
    save_triplets(path, dict.fromkeys(TARGETS, shared), FINGERPRINT, {})

    assert torch.equal(load_triplets(path)[0]["model.v_proj"].U, shared.U)


def test_views_are_saved_at_their_own_size(path):
    wide = truncated_svd(torch.randn(300, 200), 200)
    save_triplets(path, {"model.q_proj": wide.truncate(1)}, FINGERPRINT, {})

    assert path.stat().st_size < 4 * (300 + 200 + 1) + 2000  # and the header


# --- refusals ------------------------------------------------------------------------------------


def test_the_same_fingerprint_is_served():
    FINGERPRINT.check(changed())


def test_options_that_the_caller_does_not_name_are_not_compared():
    FINGERPRINT.check(changed(options={}))
    FINGERPRINT.check(changed(options={"seed": 3}))


@pytest.mark.parametrize(
    ("expected", "stored_value", "expected_value", "place"),
    [
        (changed(statistic="input"), "'gradient'", "'input'", "statistic"),
        (changed(options={"seed": 4}), "seed=3", "seed=4", "seed"),
        (changed(options={"max_tokens": 9}), "max_tokens=None", "max_tokens=9", "max_tokens"),
        (changed(options={"new": 1}), "new=None", "new=1", "new"),
        (
            changed(targets={**TARGETS, "model.v_proj": [8, 16, 3]}),
            "[8, 16, 2]",
            "[8, 16, 3]",
            "model.v_proj",
        ),
        (
            changed(targets={**TARGETS, "model.v_proj": [9, 16, 2]}),
            "[8, 16, 2]",
            "[9, 16, 2]",
            "model.v_proj",
        ),
        (
            changed(targets={"model.q_proj": [20, 16, 4]}),
            "[8, 16, 2] in the calibration",
            "None here",
            "model.v_proj",
        ),
        (
            changed(targets={**TARGETS, "model.o_proj": [4, 4, 1]}),
            "None in the calibration",
            "[4, 4, 1] here",
            "model.o_proj",
        ),
        (
            changed(weights={**FINGERPRINT.weights, "model.q_proj.weight": "cc33"}),
            "aa11 in the calibration",
            "cc33 here",
            "model.q_proj.weight",
        ),
        (
            changed(weights={"model.q_proj.weight": "aa11"}),
            "bb22 in the calibration",
            "None here",
            "model.v_proj.weight",
        ),
    ],
    ids=[
        "statistic",
        "option",
        "option with default",
        "unknown option",
        "rank",
        "shape",
        "target too many",
        "target missing",
        "weight",
        "weight missing",
    ],
)
def test_a_difference_is_refused_with_both_values(
    path, expected, stored_value, expected_value, place
):
    save(path)
    _, fingerprint, _ = load_triplets(path)

    with pytest.raises(FingerprintError) as caught:
        fingerprint.check(expected)

    for part in (stored_value, expected_value, place):
        assert part in str(caught.value)


def test_the_refusal_is_a_value_error_and_says_what_to_do():
    with pytest.raises(ValueError, match="recalibrate"):
        FINGERPRINT.check(changed(options={"seed": 4}))


# --- files that are none -------------------------------------------------------------------------


def test_a_missing_file_is_named(path):
    with pytest.raises(FingerprintError, match=re.escape(repr(str(path)))):
        load_triplets(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(FingerprintError, match="cannot read a calibration"):
        load_triplets(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"no safetensors file", lambda b: b[:-10], lambda b: b[:100]],
    ids=["empty", "text", "end missing", "header cut"],
)
def test_a_damaged_file_is_refused(path, damage):
    save(path)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(FingerprintError, match="cannot read a calibration"):
        load_triplets(path)


def test_a_foreign_safetensors_file_is_refused_with_both_formats(path):
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(FingerprintError, match=r"expected format 'peft_gradinit.*got None"):
        load_triplets(path)

    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(FingerprintError, match=r"expected format 'peft_gradinit.*got 'pt'"):
        load_triplets(path)


@pytest.mark.parametrize(
    ("metadata", "tensors"),
    [
        ({}, ("U", "S", "Vh")),
        ({"fingerprint": "{no json", "facts": "{}"}, ("U", "S", "Vh")),
        ({"fingerprint": '{"statistic": "gradient"}', "facts": "{}"}, ("U", "S", "Vh")),
        (
            {
                "fingerprint": '{"statistic": "s", "weights": {}, "targets": {"a": [2, 2, 1]},'
                ' "options": {}}',
                "facts": "{}",
            },
            ("U", "S"),
        ),
    ],
    ids=["no fingerprint", "no json", "half a fingerprint", "half the triplets"],
)
def test_a_calibration_with_missing_parts_is_refused(path, metadata, tensors):
    save_file(
        {f"a.{part}": torch.ones(2) for part in tensors},
        path,
        metadata={"format": store.FORMAT, **metadata},
    )

    with pytest.raises(FingerprintError, match="damaged calibration"):
        load_triplets(path)


# --- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_write_leaves_the_old_file_and_no_other(path, monkeypatch, interruption):
    save(path, seed=0)

    def half_written(tensors, file, metadata):
        file.write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(store, "save_file", half_written)
    with pytest.raises(type(interruption)):
        save(path, seed=1)

    assert_holds(path, seed=0)
    assert list(path.parent.iterdir()) == [path]


def test_a_complete_write_replaces_the_old_file_and_leaves_no_other(path):
    save(path, seed=0)
    save(path, seed=1)

    assert_holds(path, seed=1)
    assert list(path.parent.iterdir()) == [path]


# --- hashes --------------------------------------------------------------------------------------


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
