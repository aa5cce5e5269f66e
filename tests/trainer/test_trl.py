"""TRL's trainers take our configs by every way in, and start from their own data and loss."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed

from peft_gradinit import CalibrationCallback, calibrate
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import (
    anchors,
    base_weights,
    logits,
    pico_llama,
    relative_error,
    same_factors,
    same_weights,
    token_batches,
)
from tests.trainer.runs import PutStart, Recorder, logs_of, mostly_slow, same_state
from tests.trainer.trl_runs import (
    CONFIGS,
    KINDS,
    completions,
    config_of,
    data,
    dialogues,
    losses_of,
    trainer_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]
RUNS = mostly_slow(
    [
        *((kind, method) for kind in ("sft", "dpo") for method in CONFIGS),
        *((kind, method) for kind in ("kto", "grpo") for method in ("LoRA-GA", "EVA")),
    ],
    quick=[("sft", "LoRA-GA"), ("dpo", "EVA"), ("dpo", "LoRA-One"), ("grpo", "LoRA-GA")],
)
WAYS = mostly_slow(
    [(kind, way) for kind in KINDS for way in ("data", "result", "file")],
    quick=[("sft", "data"), ("dpo", "result"), ("kto", "file")],
)

QUANTISED = mostly_slow(
    [("LoRA-GA", "data"), ("LoRA-GA", "deferred"), ("EVA", "deferred"), ("SVFit", "data")],
    quick=[("LoRA-GA", "deferred")],
)


def calibrated(trainer):
    recorder = Recorder()
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.add_callback(recorder)
    set_seed(3)
    trainer.train()
    return recorder


def without_pass(trainer, start):
    """Train from a recorded start, from the random state that `calibrated` trains from."""
    trainer.add_callback(PutStart(start))
    set_seed(3)
    trainer.train()


@pytest.mark.parametrize(("kind", "method"), RUNS)
@pytest.mark.filterwarnings("ignore:CalibrationCallback has nothing to do")
def test_callback_runs_leave_no_trace_in_trainers_of_trl(kind, method, tmp_path):
    trainer = trainer_of(kind, tmp_path, peft_config=config_of(method))
    base = base_weights(trainer.model)
    assert same_weights(base, base_weights(pico_llama()))
    got = calibrated(trainer)
    other = trainer_of(kind, tmp_path, peft_config=config_of(method))
    without_pass(other, got.start)
    assert len(losses_of(trainer)) == 3
    if method != "SVFit":
        facts = trainer.model.base_model.init_report["default"].facts
        assert facts.n_tokens > facts.n_sequences >= 12
    assert logs_of(trainer) == logs_of(other)  # TRL's own metrics are among them
    assert same_state(trainer.model.state_dict(), other.model.state_dict())
    assert same_weights(base_weights(trainer.model), base)
    trainer.model.eval()
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model), logits(pico_llama()))


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_configs_with_data_or_a_result_give_the_start_of_get_peft_model(kind, way, tmp_path):
    result = calibrate(pico_llama(), config_of("LoRA-GA"), data())
    calibration = {"data": data(), "result": result}.get(way) or result.save(tmp_path / "saved")
    trainer = trainer_of(kind, tmp_path, peft_config=config_of("LoRA-GA", calibration))
    want = anchors(trainer.model)
    assert not deferred_adapters(trainer.model)
    assert relative_error(logits(trainer.model), logits(pico_llama())) < 1e-5
    trainer.train()
    assert same_factors(anchors(trainer.model), want)
    assert len(losses_of(trainer)) == 3


@pytest.mark.parametrize("method", mostly_slow(CONFIGS, quick=["SVFit"]))
def test_adapters_trained_by_trl_load_where_this_package_is_missing(method, tmp_path):
    trainer = trainer_of("sft", tmp_path, peft_config=config_of(method, data()))
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "saved")
    assert relative_error(logits(plain), logits(trainer.model)) < 1e-5


VARIANTS = {
    "packed": {"packing": True, "max_length": 24},
    "padding-free": {"padding_free": True, "max_length": None},
    "assistant-only": {"assistant_only_loss": True, "dataset": dialogues},
    "completion-only": {"completion_only_loss": True, "dataset": completions},
    "whole-dialogue": {"dataset": dialogues},
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "accumulated": {"gradient_accumulation_steps": 2},
    "dft": {"loss_type": "dft"},
}


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, quick=["packed", "assistant-only"]))
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*", "ignore:.*attn_implementation.*")
def test_sft_variants_leave_no_trace(variant, tmp_path):
    options = dict(VARIANTS[variant])
    make = options.pop("dataset", lambda: None)
    trainers = [
        trainer_of("sft", tmp_path, dataset=make(), peft_config=config_of("LoRA-GA"), **options)
        for _ in range(2)
    ]
    got = calibrated(trainers[0])
    without_pass(trainers[1], got.start)
    assert logs_of(trainers[0]) == logs_of(trainers[1])


def test_masks_and_losses_of_sft_reach_the_start(tmp_path):
    """The loss that the pass saw is the mean over the tokens that count, and only those."""
    weights, starts = {}, {}
    for name, options in {"all": {}, "assistant": {"assistant_only_loss": True}}.items():
        trainer = trainer_of(
            "sft", tmp_path, dataset=dialogues(), peft_config=config_of("LoRA-GA"), **options
        )
        calibrated(trainer)
        weights[name] = trainer.model.base_model.init_report["default"].facts.loss_weight
        starts[name] = anchors(trainer.model)
    answers = sum(len(d["messages"][1]["content"].split()) + 1 for d in dialogues())
    questions = sum(len(d["messages"][0]["content"].split()) for d in dialogues())
    assert weights["assistant"] == answers
    assert weights["all"] == answers + questions - len(dialogues())
    assert not same_factors(starts["all"], starts["assistant"])


DPO_VARIANTS = {
    "reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "unchecked": {"gradient_checkpointing": False},
    "precomputed": {"precompute_ref_log_probs": True},
    "ipo": {"loss_type": ["ipo"]},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("variant", mostly_slow(DPO_VARIANTS, quick=["reentrant"]))
def test_dpo_variants_leave_no_trace(variant, tmp_path):
    trainers = [
        trainer_of("dpo", tmp_path, peft_config=config_of("LoRA-GA"), **DPO_VARIANTS[variant])
        for _ in range(2)
    ]
    got = calibrated(trainers[0])
    without_pass(trainers[1], got.start)
    assert logs_of(trainers[0]) == logs_of(trainers[1])


@pytest.mark.slow
def test_checkpointing_does_not_change_the_start_of_dpo(tmp_path):
    starts = []
    for options in DPO_VARIANTS["reentrant"], DPO_VARIANTS["unchecked"], {}:
        trainer = trainer_of("dpo", tmp_path, peft_config=config_of("LoRA-GA"), **options)
        calibrated(trainer)
        starts.append(anchors(trainer.model))
    assert same_factors(starts[0], starts[1])
    assert same_factors(starts[0], starts[2])


def test_grpo_serves_one_generation_for_several_steps(tmp_path):
    options = {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 5}
    trainers = [
        trainer_of("grpo", tmp_path, peft_config=config_of("LoRA-GA"), **options) for _ in range(2)
    ]
    got = calibrated(trainers[0])
    without_pass(trainers[1], got.start)
    assert trainers[0]._step == trainers[1]._step == 5
    assert logs_of(trainers[0]) == logs_of(trainers[1])
    facts = trainers[0].model.base_model.init_report["default"].facts
    assert facts.n_sequences == 4 * facts.n_batches  # slices of the generation, as in training


def test_grpo_does_not_check_the_step_of_lora_one(tmp_path):
    trainer = trainer_of("grpo", tmp_path, peft_config=config_of("LoRA-One"))
    with pytest.warns(UserWarning, match=r"policy-gradient loss \(GRPOTrainer\).*check_step=False"):
        calibrated(trainer)
    assert trainer.model.base_model.init_report["default"].step is None


def test_dpo_checks_the_step_of_lora_one_on_its_own_loss(tmp_path):
    trainer = trainer_of("dpo", tmp_path, peft_config=config_of("LoRA-One"))
    calibrated(trainer)
    step = trainer.model.base_model.init_report["default"].step
    assert step.loss_before == pytest.approx(0.6931, abs=1e-4)
    assert step.loss_after < step.loss_before


@pytest.mark.parametrize(("kind", "logged"), [("sft", True), ("dpo", False)])
def test_a_rate_is_logged_where_one_is_suggested(kind, logged, tmp_path):
    trainer = trainer_of(kind, tmp_path, peft_config=config_of("LoRA-GA"))
    calibrated(trainer)
    (entry,) = [e for e in trainer.state.log_history if "calibration/loss" in e]
    assert ("calibration/learning_rate" in entry) == logged


@pytest.mark.parametrize("kind", mostly_slow(KINDS, quick=[]))
def test_a_model_from_a_path_works(kind, tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = trainer_of(kind, tmp_path, model=model, peft_config=config_of("LoRA-GA"))
    calibrated(trainer)
    assert trainer.model.active_peft_config.base_model_name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize(("method", "way"), QUANTISED)
def test_quantised_models_start_at_the_base_after_trl_has_cast_the_adapter(method, way, tmp_path):
    pytest.importorskip("bitsandbytes")
    pico_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised)
    packed = base_weights(model)
    calibration = data() if way == "data" else "deferred"
    options = {"peft_config": config_of(method, calibration), "max_steps": 1}
    trainer = trainer_of("sft", tmp_path / "out", model=model, **options)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.bfloat16}  # TRL's choice
    if way == "deferred":
        trainer.add_callback(CalibrationCallback(trainer))
    probe = _Probe()
    trainer.add_callback(probe)
    trainer.train()
    # An adapter of bfloat16 is the base still: both halves of the pair round alike.
    assert relative_error(probe.started, probe.base) < 1e-6
    assert same_weights(base_weights(trainer.model), packed)
    assert not any(
        getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False)
        for p in trainer.model.parameters()
    )
    if method == "LoRA-GA":  # the others have zeros that meet gradients in the first step
        assert min(probe.gradients) > 1e-6


class _Probe(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        batch = token_batches()[0]
        model.train()  # bitsandbytes repacks the weights of models that evaluate on some CPUs
        with torch.no_grad():
            self.started = model(batch["input_ids"]).logits
            with model.disable_adapter():
                self.base = model(batch["input_ids"]).logits

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = [
            p.grad.float().norm().item() for p in model.parameters() if p.requires_grad
        ]
