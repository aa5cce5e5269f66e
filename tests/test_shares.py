"""CI runs slow tests in turn, and leaves none out."""

import re
from pathlib import Path

import pytest

from tests.shares import in_share

NAMES = [f"tests/test_{letter}.py::test_{i}" for letter in "abcde" for i in range(20)]
CI = Path(__file__).parents[1] / ".ci" / "run"


def test_shares_are_apart_and_together_all():
    shares = [in_share(NAMES, f"{k}/4") for k in (1, 2, 3, 4)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    assert all(len(share) > 10 for share in shares)
    assert in_share(NAMES[::2], "2/4") == shares[1] & set(NAMES[::2])


@pytest.mark.parametrize("share", ["", "5/4", "0/4", "a/b", "1"])
def test_what_is_no_share_is_named(share):
    with pytest.raises(pytest.UsageError, match=re.escape(repr(share))):
        in_share(NAMES, share)


def test_ci_has_all_default_tests_and_every_share_in_turn():
    lines = CI.read_text().splitlines()
    assert lines[-3:] == [
        "scripts/test",
        'scripts/test -m slow "--share=$share"',
        'scripts/test --oldest "--share=$share"',
    ]
    assert 'share="$((day % 4 + 1))/4"' in lines
