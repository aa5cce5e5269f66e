"""CI runs slow tests in turn, and leaves none out."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shares import in_share, share_of

NAMES = [f"tests/test_{letter}.py::test_{i}" for letter in "abcde" for i in range(20)]
CI = Path(__file__).parents[1] / ".ci" / "run"


def test_shares_are_apart_and_together_all():
    shares = [in_share(NAMES, k, 4) for k in (1, 2, 3, 4)]
    assert sorted(name for share in shares for name in share) == sorted(NAMES)
    assert all(len(share) > 10 for share in shares)
    assert in_share(NAMES[::2], 2, 4) == shares[1] & set(NAMES[::2])


@pytest.mark.parametrize("share", ["", "5/4", "0/4", "a/b", "1"])
def test_what_is_no_share_is_named(share):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(share))):
        share_of(share)


def test_what_is_no_share_ends_before_any_worker_starts():
    command = [sys.executable, "-m", "pytest", "-n", "2", "--share=5/4", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CI.parents[1], check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "argument --share: expected K/N with 1 <= K <= N, got '5/4'" in done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_ci_has_all_default_tests_and_every_share_in_turn():
    lines = CI.read_text().splitlines()
    assert lines[-3:] == [
        "scripts/test",
        'scripts/test -m slow "--share=$share"',
        'scripts/test --oldest "--share=$share"',
    ]
    assert 'share="$((day % 8 + 1))/8"' in lines
