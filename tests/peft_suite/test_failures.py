"""The table of failures explains what it names and nothing else, and says what it holds too much."""

import pytest

from tests import host_suites
from tests.peft_suite import sdist
from tests.peft_suite.failures import ALL, RULES, counts, stale, unexplained

SAID = "ConfigError: LoraGAConfig cannot be used with use_bdlora=…"


def test_failures_without_a_reason_are_told_from_others():
    failed = {"test_a::test_b[x::y]": SAID, "test_a::test_c": "IndexError: list index out of range"}
    assert list(unexplained("lora_ga", failed)) == ["test_a::test_c"]
    assert list(unexplained("svfit", failed)) == list(failed)  # SVFit has no such option
    assert list(counts("lora_ga", failed).values()) == [1]


def test_reasons_without_a_failure_are_told():
    left = stale({"lora_ga": {"test_a::test_b": SAID}})
    of_type = [rule for rule in RULES if "lora_ga" in rule.types]
    assert len(left) == len(of_type) - 1
    assert "refused by name: an option that excludes the start" not in left


def test_reasons_of_types_that_ran_in_part_are_not_judged():
    assert stale({}) == []
    of_svfit = [rule.reason for rule in RULES if rule.types == ("svfit",)]
    assert stale({"svfit": {}}) == of_svfit


def test_every_type_of_a_rule_is_known():
    assert {method for rule in RULES for method in rule.types} <= set(ALL)


def test_without_a_network_there_is_a_reason_to_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(host_suites, "cached_assets_path", lambda *_, **__: tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(host_suites.UnreachableError, match=r"PEFT 0\.21\.2.*cannot be downloaded"):
        sdist.peft_tests()
