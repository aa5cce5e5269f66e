"""The reference of preference losses: the base model, or a copy of the adapter that TRL adds."""

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from peft_gradinit import CalibrationCallback, initialize, load_for_training
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import (
    adapted,
    anchors,
    base_weights,
    logits,
    lora_ga,
    pico_llama,
    quiet,
    relative_error,
    same_factors,
    same_weights,
    train_steps,
)
from tests.trainer.runs import mostly_slow, same_state
from tests.trainer.trl_runs import CONFIGS, config_of, data, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*policy-gradient loss"),
]
MAKERS = ["calibrated", "trained", "deferred", "loaded"]
POLICIES = mostly_slow(
    [(method, maker) for method in CONFIGS for maker in MAKERS],
    quick=[*(("LoRA-GA", maker) for maker in MAKERS), *((method, "trained") for method in CONFIGS)],
)
RUNS = mostly_slow(
    [(kind, method) for kind in ("dpo", "kto", "grpo") for method in CONFIGS],
    quick=[("dpo", "LoRA-GA"), ("kto", "LoRA-One"), ("grpo", "SVFit")],
)


def policy(method, maker, directory):
    config = config_of(method, "deferred" if maker == "deferred" else data())
    model = get_peft_model(pico_llama(), config)
    if maker in ("trained", "loaded"):
        train_steps(model)
    if maker == "loaded":
        model.save_pretrained(directory)
        model = load_for_training(pico_llama(), directory)
    return model


def of_adapter(model, name):
    return {
        key.replace(f".{name}", ".x"): value.clone()
        for key, value in model.state_dict().items()
        if f".{name}" in key
    }


@pytest.mark.parametrize(("method", "maker"), POLICIES)
def test_adapter_that_trl_adds_is_the_policy_and_disturbs_nothing(
    method, maker, tmp_path, monkeypatch
):
    model = policy(method, maker, tmp_path / "saved")
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    monkeypatch.setattr(
        "peft_gradinit.tuners.lora.model.compute_start", lambda *_: pytest.fail("again")
    )
    trainer = trainer_of("dpo", tmp_path / "out", model=model)
    assert torch.equal(logits(model), before)
    assert {k: v for k, v in model.state_dict().items() if k in state}.keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(model.get_parameter(n).requires_grad == was for n, was in trainable.items())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref" in n)
    assert same_state(of_adapter(model, "ref"), of_adapter(model, "default"))
    assert deferred_adapters(model) == (
        ["default", "ref"] if maker == "deferred" and method != "SVFit" else []
    )
    with torch.no_grad():
        model.set_adapter("ref")
        assert torch.equal(logits(model), before)
        model.set_adapter("default")
    assert trainer.ref_model is None


@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_deferred_policy_and_its_reference_start_together(kind, method, tmp_path):
    model = policy(method, "deferred", tmp_path)
    trainer = trainer_of(kind, tmp_path, model=model, max_steps=1, learning_rate=0.0)
    if method != "SVFit":
        trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    assert deferred_adapters(model) == []
    assert same_state(of_adapter(model, "ref"), of_adapter(model, "default"))
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log.get("rewards/margins", log.get("kl")) == pytest.approx(0, abs=1e-6)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "ref" / "adapter_config.json").exists()


@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_reference_stays_while_the_policy_trains(kind, method, tmp_path):
    model = policy(method, "trained", tmp_path)
    base, start = base_weights(model), logits(model)
    trainer = trainer_of(kind, tmp_path, model=model)
    trainer.train()
    assert relative_error(logits(model), start) > 1e-6
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    assert same_weights(base_weights(model), base)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(pico_llama()))


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="Trainer before 5.23 leaves the policy out where a checkpoint has a second adapter",
)
def test_run_with_a_reference_adapter_resumes(tmp_path):
    def trainer(directory, model):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return trainer_of("dpo", directory, model=model, **options)

    whole = trainer(tmp_path, policy("LoRA-GA", "trained", tmp_path))
    whole.train()
    # Another policy to begin with: all that counts is in the checkpoint.
    resumed = trainer(tmp_path / "resumed", policy("LoRA-GA", "calibrated", tmp_path))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [log.get("loss") for log in resumed.state.log_history] == [
        log.get("loss") for log in whole.state.log_history
    ]
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_start_of_dpo_is_the_gradient_of_its_loss(tmp_path):
    """Against DPO written down from its paper, with the base model as the reference."""

    def log_probabilities(model, batch):
        out = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        taken = out.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return (taken * batch["completion_mask"][:, 1:]).sum(1)

    def loss_fn(model, batch):
        policy = log_probabilities(model, batch)
        ratio = policy - policy.detach()
        chosen, rejected = ratio.chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean(), len(ratio)

    trainer = trainer_of("dpo", tmp_path, peft_config=config_of("LoRA-GA"))
    batches = list(trainer.get_train_dataloader())
    trainer.add_callback(CalibrationCallback(trainer, estimator="dense"))
    trainer.train()
    want = adapted(pico_llama(), config_of("LoRA-GA"))
    initialize(want, quiet(batches, loss_fn=loss_fn, estimator="dense"))
    for name, (A0, B0) in anchors(trainer.model).items():
        A, B = anchors(want)[name]
        assert relative_error(B0 @ A0, B @ A) < 1e-3, name


def test_config_of_the_user_used_twice_calibrates_twice(tmp_path):
    """Only TRL's name makes a copy; a config that is used again makes a new adapter."""
    config = lora_ga()
    model = get_peft_model(pico_llama(), config)
    train_steps(model)
    model.add_adapter("second", config)
    assert same_factors(anchors(model, "second"), anchors(model))
    model.set_adapter("second")
    assert relative_error(logits(model), logits(pico_llama())) < 1e-5


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_copies_hold_everything_that_an_adapter_has(options, tmp_path):
    model = get_peft_model(pico_llama(), lora_ga(target_modules=["q_proj"], **options))
    train_steps(model)
    start = logits(model)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    train_steps(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), start)


def test_copy_keeps_the_precision_of_the_policy():
    model = get_peft_model(pico_llama().to(torch.bfloat16), lora_ga())
    train_steps(model)
    start = logits(model)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL does
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    assert {p.dtype for n, p in model.named_parameters() if ".ref." in n} == {torch.float32}


def test_plain_lora_beside_a_live_adapter_is_refused_by_peft():
    model = adapted(pico_llama())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))
