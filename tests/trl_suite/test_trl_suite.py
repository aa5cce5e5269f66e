"""TRL's own tests of adapters pass with our types in place of `LoraConfig`, but for the failures below."""

import shutil

import pytest

from tests.host_suites import Expected, UnreachableError, run
from tests.trl_suite.checkout import checkout
from tests.trl_suite.stand_ins import fill_cache

pytestmark = pytest.mark.slow

SUITES = ("sft", "dpo", "reward", "grpo")
CAST = Expected(
    "self_attn.q_proj.base_layer.bias has changed",
    "bitsandbytes casts biases to its compute dtype; the test knows of the second layer alone. "
    "Plain LoRA fails in the same way.",
)
ALWAYS = {
    "test_sft_trainer::test_peft_with_quantization": CAST,
    "test_dpo_trainer::test_peft_with_quantization": CAST,
}
OF_TYPE = {
    "lora_ga": {
        "test_reward_trainer::test_train_moe_with_peft_config": Expected(
            "LoRA-GA with r=8 cannot start score: its weight is (1, 16)",
            "the test targets the head of the reward model, which has one output; LoRA-GA takes two "
            "singular directions for each rank, and says so.",
        )
    }
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """TRL and its tests in one folder, and a cache with the models that they load."""
    try:
        source = checkout()
    except UnreachableError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("trl")
    shutil.copytree(source / "trl", folder / "trl")
    shutil.copytree(source / "tests", folder / "trl_tests")  # `tests` are ours
    shutil.copy(source / "VERSION", folder)
    fill_cache(folder / "hub")
    return folder


@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "eva", "pissa"])
def test_the_tests_of_trl(method, suite):
    plugin = ("-p", "tests.trl_suite.plugin", "--type", method)
    choice = ("-m", "not slow", "-k", "not vlm and not vllm and not liger")
    files = [f"trl_tests/test_{name}_trainer.py" for name in SUITES]
    env = {"HF_HUB_CACHE": str(suite / "hub"), "HF_HUB_OFFLINE": "1"}
    outcomes = run(suite, *plugin, *choice, *files, env=env)
    assert outcomes.against(ALWAYS | OF_TYPE.get(method, {})) == []
    assert len(outcomes.passed) > 20, outcomes.output
