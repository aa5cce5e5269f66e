"""The calibration file: round trip, the older format, refusals, damage, interruption."""

import dataclasses
import json
import os
import re

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft_gradinit.calibration import CalibrationResult, Gradients, Inputs, PassFacts
from peft_gradinit.errors import FingerprintError
from peft_gradinit.statistics import Fingerprint, load_readouts, save_readouts, store

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


def triplets(seed=0, rows=None):
    """Readouts as gradients give them; those of inputs have no rows of `U`."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (out, in_, size) in TARGETS.items():
        shapes = {"U": (out if rows is None else rows, size), "S": (size,), "Vh": (size, in_)}
        parts = {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}
        U, Vh = torch.linalg.qr(parts["U"])[0], torch.linalg.qr(parts["Vh"].T)[0].T
        S = parts["S"].abs().sort(descending=True).values
        found[name] = {"U": U.contiguous() if len(U) else parts["U"], "S": S, "Vh": Vh.contiguous()}
    return found


def save(path, seed=0):
    save_readouts(path, triplets(seed), FINGERPRINT, FACTS)


def equal(one, other):
    return one.keys() == other.keys() and all(
        parts.keys() == other[name].keys()
        and all(torch.equal(parts[k], other[name][k]) for k in parts)
        for name, parts in one.items()
    )


def assert_holds(path, seed):
    assert equal(load_readouts(path)[0], triplets(seed))


def changed(**values):
    return dataclasses.replace(FINGERPRINT, **values)


# --- round trip ----------------------------------------------------------------------------------


def test_a_round_trip_gives_everything_back_bit_for_bit(path):
    save(path)

    loaded, fingerprint, facts, _ = load_readouts(path)

    assert loaded.keys() == TARGETS.keys()
    assert_holds(path, seed=0)
    assert fingerprint == FINGERPRINT
    assert facts == FACTS


def test_folders_are_made_and_paths_may_be_strings(tmp_path):
    nested = f"{tmp_path}/new/deeper/c.safetensors"
    save(nested)

    assert_holds(nested, seed=0)


def test_readouts_come_back_under_whatever_names_in_the_order_of_the_targets(path):
    readouts = {
        "model.v_proj": {"C": torch.randn(16, 16), "n": torch.tensor(3)},
        "model.q_proj": {"U": torch.zeros(0, 4), "half": torch.ones(2).bfloat16()},
    }
    save_readouts(path, readouts, FINGERPRINT, {})
    loaded = load_readouts(path)[0]
    assert equal(loaded, readouts)
    assert list(loaded) == list(TARGETS)
    assert loaded["model.q_proj"]["half"].dtype == torch.bfloat16


def test_names_of_targets_may_have_dots_and_indices_and_begin_alike(path):
    targets = {name: [2, 2, 1] for name in ("a", "a.C", "a.C.C", "experts.up[3]")}
    readouts = {name: {"C": torch.full((2, 2), i)} for i, name in enumerate(targets)}
    save_readouts(path, readouts, changed(targets=targets), {})
    assert equal(load_readouts(path)[0], readouts)


def test_a_target_without_readouts_is_absent_after_loading(path):
    save_readouts(path, {"model.q_proj": triplets()["model.q_proj"]}, FINGERPRINT, {})

    loaded, fingerprint, *_ = load_readouts(path)

    assert loaded.keys() == {"model.q_proj"}
    assert fingerprint.targets == TARGETS


def test_targets_may_share_their_readouts(path):
    shared = triplets()["model.q_proj"]
    save_readouts(path, dict.fromkeys(TARGETS, shared), FINGERPRINT, {})

    assert equal(load_readouts(path)[0], dict.fromkeys(TARGETS, shared))


def test_views_are_saved_at_their_own_size(path):
    wide = {"U": torch.randn(300, 200)[:, :1], "S": torch.randn(200)[:1]}
    save_readouts(path, {"model.q_proj": wide}, FINGERPRINT, {})

    assert path.stat().st_size < 4 * (300 + 1) + 2000  # and the header


def test_batches_are_kept_beside_the_readouts_in_their_order(path):
    batches = [{"input_ids": torch.full((1, 2), i), "labels.x": torch.ones(i)} for i in range(12)]
    save_readouts(path, triplets(), FINGERPRINT, FACTS, batches)

    assert_holds(path, seed=0)
    assert equal(dict(enumerate(load_readouts(path)[3])), dict(enumerate(batches)))
    save(path)
    assert load_readouts(path)[3] == []


def test_batches_whose_tensors_are_one_come_back_in_full(path):
    ids = torch.arange(6).view(2, 3)
    batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids}]
    save_readouts(path, triplets(), FINGERPRINT, FACTS, batches)

    assert equal(dict(enumerate(load_readouts(path)[3])), dict(enumerate(batches)))


@pytest.mark.parametrize("torn", [False, True], ids=["whole-old-file", "torn"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(path, monkeypatch, torn):
    save(path, seed=0)
    newer, opened = path.with_name("newer"), store.safe_open
    save(newer, seed=1)

    def opened_and_replaced(file, **options):
        result = opened(file, **options)
        if newer.exists():
            newer.replace(path)
            if torn:
                raise SafetensorError("header of one file, tensors of another")
        return result

    monkeypatch.setattr(store, "safe_open", opened_and_replaced)
    assert_holds(path, seed=1)


# --- the older format ----------------------------------------------------------------------------

PASS = PassFacts(3, 12, 100, 90.0, 1.5, 2.0, 10, 20, "end of data")


def write_format_1(path, readouts, statistic):
    """A file as the releases before readouts had names wrote it; facts do not tell the need."""
    facts = {
        "energy": {name: parts["S"].square().sum().item() + 1 for name, parts in readouts.items()},
        "failures": {},
        "pass": dataclasses.asdict(PASS),
    }
    metadata = {
        "format": "peft_gradinit.calibration/1",
        "fingerprint": json.dumps(dataclasses.asdict(changed(statistic=statistic))),
        "facts": json.dumps(facts),
    }
    tensors = {f"{name}.{k}": t for name, parts in readouts.items() for k, t in parts.items()}
    save_file(tensors, path, metadata=metadata)
    return facts


@pytest.mark.parametrize(
    ("statistic", "need", "rows"), [("gradient", Gradients, None), ("inputs", Inputs, 0)]
)
def test_format_1_is_still_read(path, statistic, need, rows):
    readouts = triplets(rows=rows)
    facts = write_format_1(path, readouts, statistic)

    result = CalibrationResult.load(path)

    assert equal(result.readouts, readouts)
    assert equal({name: svd._asdict() for name, svd in result.triplets.items()}, readouts)
    assert result.fingerprint == changed(statistic=statistic)
    assert (result.energy, result.facts, result.replay) == (facts["energy"], PASS, None)
    assert type(result.need) is need
    for name, (out_features, in_features, size) in TARGETS.items():
        energy = result.energy[name]
        assert result.need.is_whole(result.readouts[name], (out_features, in_features), size)
        assert 0 < result.need.captured(result.readouts[name], 1, energy) < 1
        assert len(result.need.scores(result.readouts[name], energy, "explained_variance")) == size
    # And saved again, it is of the new format, and the same.
    again = CalibrationResult.load(result.save(path.parent / "again"))
    assert equal(again.readouts, readouts)
    assert again.need == result.need


@pytest.mark.parametrize(
    ("part", "damaged"), [("U", None), ("S", torch.ones(3)), ("Vh", torch.ones(4, 15))]
)
def test_readouts_that_are_not_whole_are_refused_in_either_format(path, part, damaged):
    readouts = triplets()
    del readouts["model.q_proj"][part]
    if damaged is not None:
        readouts["model.q_proj"][part] = damaged
    facts = write_format_1(path, triplets(), "gradient")
    for write in (
        lambda: write_format_1(path, readouts, "gradient"),
        lambda: save_readouts(path, readouts, FINGERPRINT, {**facts, "need": {"per_rank": 2}}),
    ):
        write()
        with pytest.raises(FingerprintError, match=r"damaged calibration: model\.q_proj should"):
            CalibrationResult.load(path)


def _with_nan(tensor):
    return torch.where(tensor == tensor.max(), torch.nan, tensor)


DAMAGE = [
    ("U", lambda U: U > 0, "its U is torch.bool"),
    ("U", lambda U: (100 * U).to(torch.int8), "its U is torch.int8"),
    ("U", lambda U: U * 1e20, r"its U .* not (finite|orthonormal)"),
    ("U", torch.zeros_like, "its U is not orthonormal"),
    ("Vh", lambda Vh: Vh[:1].expand(4, -1).contiguous(), "its Vh is not orthonormal"),
    ("Vh", _with_nan, "its Vh has values that are not finite"),
    ("S", lambda S: S.flip(0).contiguous(), "its S is not descending"),
    ("S", lambda S: -S, "its S is not descending"),
    ("S", lambda S: S[None], "its S is .* of shape"),
]


@pytest.mark.parametrize(("part", "damage", "message"), DAMAGE)
def test_triplets_that_cannot_be_are_refused_without_a_digest(path, part, damage, message):
    readouts = triplets()
    readouts["model.q_proj"][part] = damage(readouts["model.q_proj"][part])
    write_format_1(path, readouts, "gradient")
    with pytest.raises(FingerprintError, match=rf"damaged calibration: model\.q_proj .*{message}"):
        CalibrationResult.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triplets_of_any_precision_are_taken_without_a_digest(path, dtype):
    readouts = {n: {k: t.to(dtype) for k, t in parts.items()} for n, parts in triplets().items()}
    write_format_1(path, readouts, "gradient")
    assert equal(load_readouts(path)[0], readouts)


@pytest.mark.parametrize("change", [{"sha256": None}, {"sha256": "0"}, {"format": "…/1"}])
def test_a_changed_digest_or_none_is_refused(path, change):
    save(path)
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), **change}
    metadata = {k: v.replace("…", "peft_gradinit.calibration") for k, v in metadata.items() if v}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(FingerprintError, match="damaged calibration"):
        load_readouts(path)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_bit_is_noticed(path, seed):
    save(path)
    content = bytearray(path.read_bytes())
    content[-1 - 37 * seed] ^= 1 << seed
    path.write_bytes(content)
    with pytest.raises(FingerprintError, match="damaged calibration"):
        load_readouts(path)


def test_a_fifo_is_refused(path):
    os.mkfifo(path)
    with pytest.raises(FingerprintError, match="is a FIFO"):
        load_readouts(path)


def test_a_statistic_that_is_not_known_is_refused(path):
    write_format_1(path, triplets(), "moments of tomorrow")
    with pytest.raises(FingerprintError, match=r"not those of this version .*moments of tomorrow"):
        CalibrationResult.load(path)


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
    _, fingerprint, *_ = load_readouts(path)

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
        load_readouts(path)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(FingerprintError, match="cannot read a calibration"):
        load_readouts(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b"no safetensors file", lambda b: b[:-10], lambda b: b[:100]],
    ids=["empty", "text", "end missing", "header cut"],
)
def test_a_damaged_file_is_refused(path, damage):
    save(path)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(FingerprintError, match="cannot read a calibration"):
        load_readouts(path)


def test_a_foreign_safetensors_file_is_refused_with_both_formats(path):
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(FingerprintError, match=r"expected format 'peft_gradinit.*got None"):
        load_readouts(path)

    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(FingerprintError, match=r"expected format 'peft_gradinit.*got 'pt'"):
        load_readouts(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"fingerprint": "{no json", "facts": "{}"},
        {"fingerprint": '{"statistic": "gradient"}', "facts": "{}"},
        {"fingerprint": json.dumps(dataclasses.asdict(FINGERPRINT))},
        {"fingerprint": "[]", "facts": "{}"},
    ],
    ids=["no fingerprint", "no json", "half a fingerprint", "no facts", "a list"],
)
def test_a_calibration_with_missing_parts_is_refused(path, metadata):
    tensors = {f"a.{part}": torch.ones(2) for part in ("U", "S", "Vh")}
    save_file(tensors, path, metadata={"format": store.FORMAT, **metadata})

    with pytest.raises(FingerprintError, match="damaged calibration"):
        load_readouts(path)


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
