"""PEFT's own tests with our types for `LoraConfig`: every failure has a reason in `failures.py`.

LoRA-GA runs all tests, and the other types a part each, another part for each type. A table of the
failures by reason is printed (`-s`). All tests for all types, or for some, by hand, some minutes a type:

    PEFT_SUITE=all .venv/bin/python -m pytest -m slow -s tests/peft_suite
    PEFT_SUITE=pissa,svfit .venv/bin/python -m pytest -m slow -s tests/peft_suite
"""

import os
import shutil

import peft
import pytest

from tests.host_suites import UnreachableError, run
from tests.methods.rows import INFO
from tests.peft_suite.failures import counts, stale, unexplained
from tests.peft_suite.hub import fill_cache
from tests.peft_suite.sdist import VERSION, peft_tests

pytestmark = pytest.mark.slow

N_PARTS = 48
CHOSEN = os.environ.get("PEFT_SUITE", "lora_ga")
WHOLE = list(INFO) if CHOSEN == "all" else CHOSEN.split(",")
SUITES = (
    *("config", "decoder_models", "encoder_decoder_models", "feature_extraction_models"),
    *("initialization", "tuners_utils", "low_level_api", "mixed", "other", "target_parameters"),
    *("seq_classifier", "token_classification_qa", "integrations", "mapping", "helpers"),
    *("lora_variants", "loraplus", "lorafa", "trainable_tokens", "custom_models"),
)
NOT_IMPORTED = {"svfit": ("trainable_tokens",)}
"""Modules that make a config with an option that the type lacks when they are imported."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """PEFT's tests as a package, and a cache with the models that they load."""
    if peft.__version__ != VERSION:
        pytest.skip(f"the table is of PEFT {VERSION}, got {peft.__version__}")
    try:
        source = peft_tests()
    except UnreachableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("peft")
    shutil.copytree(source, folder / "peft_tests")  # `tests` are ours
    (folder / "peft_tests" / "__init__.py").touch()
    fill_cache(folder / "hub")
    return folder


@pytest.fixture(scope="module")
def runs():
    """Failures of whole runs, by type."""
    return {}


@pytest.mark.parametrize("method", list(INFO))
def test_the_tests_of_peft(method, suite, runs):
    whole = method in WHOLE
    part = "1/1" if whole else f"{list(INFO).index(method) + 1}/{N_PARTS}"
    plugin = ("-p", "tests.peft_suite.plugin", "--type", method, "--part", part)
    left_out = NOT_IMPORTED.get(method, ())
    files = [f"peft_tests/test_{name}.py" for name in SUITES if name not in left_out]
    brief = ("--tb=native", "--show-capture=no")  # others parse a large module for each failure
    env = {"HF_HUB_CACHE": str(suite / "hub"), "HF_HUB_OFFLINE": "1"}
    outcomes = run(suite, *plugin, *brief, *files, env=env)
    table = counts(method, outcomes.failed)
    print(f"\n{method}, part {part}: {len(outcomes.passed)} passed, {len(outcomes.failed)} failed")  # noqa: T201
    print("\n".join(f"{n:6} {reason}" for reason, n in table.most_common()))  # noqa: T201
    assert unexplained(method, outcomes.failed) == {}
    assert len(outcomes.passed) > (500 if whole else 0), outcomes.output
    if whole:
        runs[method] = outcomes.failed


def test_no_reason_is_without_a_failure(runs):
    """Runs after the others."""
    assert stale(runs) == []
