"""What is said of a host's suite: new failures, other failures, and failures that are no more."""

import tarfile

import pytest

from tests import host_suites
from tests.host_suites import Expected, run
from tests.trl_suite import checkout

SUITE = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_a(n):
    assert n == 1, "it is two"

def test_b():
    pytest.skip("not here")
"""


@pytest.fixture
def outcomes(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    return run(tmp_path, "test_it.py", env={})


def test_outcomes_are_held_against_a_table(outcomes):
    assert outcomes.passed == {"test_it::test_a[1]"}
    (complaint,) = outcomes.against({})
    assert complaint.startswith("test_it::test_a[2] failed: ")
    assert "it is two" in complaint
    assert outcomes.against({"test_it::test_a[2]": Expected("it is two", "two is not one")}) == []
    (other,) = outcomes.against({"test_it::test_a[2]": Expected("it is three", "")})
    assert other == complaint
    stale = {f"test_it::test_{name}": Expected("it is", "") for name in ("a[1]", "a[2]", "b")}
    assert outcomes.against(stale) == [
        "test_it::test_a[1] passes; take it out of the table",
        "test_it::test_b was not run; take it out of the table",
    ]


def test_a_suite_that_cannot_run_is_no_success(tmp_path):
    with pytest.raises(RuntimeError, match="the suite did not run:"):
        run(tmp_path, "missing.py", env={})


def test_the_source_of_trl_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.delenv(checkout.VARIABLE, raising=False)
    monkeypatch.setattr(host_suites, "cached_assets_path", lambda *_, **__: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    archive = tmp_path / "trl.tar.gz"
    monkeypatch.setattr(checkout, "ARCHIVE", archive.as_uri())
    with pytest.raises(
        host_suites.UnreachableError, match=r"name a checkout of v1\.9\.0 as TRL_CHECKOUT"
    ):
        checkout.checkout()
    (tmp_path / "VERSION").write_text("1.9.0")
    with tarfile.open(archive, "w:gz") as made:
        made.add(tmp_path / "VERSION", f"trl-{checkout.VERSION}/VERSION")
    found = checkout.checkout()
    assert (found / "VERSION").read_text() == "1.9.0"
    archive.unlink()
    assert checkout.checkout() == found


def test_a_checkout_of_another_version_is_refused(tmp_path, monkeypatch):
    (tmp_path / "VERSION").write_text("1.0.0\n")
    monkeypatch.setenv(checkout.VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match=r"TRL_CHECKOUT names TRL 1\.0\.0; check out v1\.9\.0"):
        checkout.checkout()
