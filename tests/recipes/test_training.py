"""`training` of a recipe is the class of arguments of its task: names, types, values."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, SFTConfig

from peft_gradinit.errors import ConfigError
from peft_gradinit.recipes import load_recipe
from peft_gradinit.recipes.sections import Section
from peft_gradinit.recipes.trainers import arguments_of, preparation_of
from peft_gradinit.recipes.training import (
    ARGUMENTS,
    EARLIER_NAMES,
    TrainingSection,
    section_of_task,
)

PICO = Path(__file__).parents[2] / "configs/offline/pico_llama_docstrings.yaml"
OF_TASKS = {
    "CAUSAL_LM": SFTConfig,
    "PREFERENCE": DPOConfig,
    "SEQ_2_SEQ_LM": Seq2SeqTrainingArguments,
    "SEQ_CLS": TrainingArguments,
    "IMAGE_CLS": TrainingArguments,
}


def recipe_of(*changes, task="CAUSAL_LM", rate="1e-3"):
    more = [f"model.task={task}", f"training.learning_rate={rate}"]
    return load_recipe(PICO, [*more, *(f"training.{change}" for change in changes)])


def arguments(*changes, task="CAUSAL_LM", **options):
    recipe = recipe_of(*changes, task=task, **options)
    return arguments_of(recipe, task, evaluates=True)


@pytest.mark.parametrize("task", OF_TASKS)
def test_every_field_of_the_class_is_a_key(task):
    assert ARGUMENTS[task] is OF_TASKS[task]
    keys = set(section_of_task(task).model_fields)
    fields = {field.name for field in dataclasses.fields(OF_TASKS[task]) if field.init}
    assert keys - fields == {"head_learning_rate"}
    assert fields <= keys


@pytest.mark.parametrize(
    ("task", "change", "name", "value"),
    [
        ("CAUSAL_LM", "adam_beta2=0.95", "adam_beta2", 0.95),
        ("CAUSAL_LM", "neftune_noise_alpha=5", "neftune_noise_alpha", 5.0),
        (
            "CAUSAL_LM",
            "lr_scheduler_kwargs={num_cycles: 2}",
            "lr_scheduler_kwargs",
            {"num_cycles": 2},
        ),
        (
            "CAUSAL_LM",
            "lr_scheduler_kwargs={min_lr: 1e-5, a: [-.5e+1, 1E3, 1e, e5]}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5, "a": [-5.0, 1000.0, "1e", "e5"]},
        ),
        ("CAUSAL_LM", "logging_first_step=true", "logging_first_step", True),
        ("PREFERENCE", "beta=0.3", "beta", 0.3),
        ("PREFERENCE", "loss_type=[ipo]", "loss_type", ["ipo"]),
        ("SEQ_2_SEQ_LM", "generation_num_beams=2", "generation_num_beams", 2),
        ("SEQ_CLS", "label_smoothing_factor=1e-1", "label_smoothing_factor", 0.1),
        ("SEQ_CLS", "remove_unused_columns=true", "remove_unused_columns", True),
        ("IMAGE_CLS", "output_dir=elsewhere", "output_dir", "elsewhere"),
        ("SEQ_CLS", "per_device_eval_batch_size=16", "per_device_eval_batch_size", 16),
        ("SEQ_CLS", "save_strategy=epoch", "save_strategy", "epoch"),
    ],
)
def test_a_key_is_given_to_the_trainer(task, change, name, value):
    assert getattr(arguments(change, task=task), name) == value
    assert type(arguments(change, task=task)) is OF_TASKS[task]


def test_defaults_are_those_that_are_documented():
    recipe = load_recipe(PICO)
    plain = recipe.model_copy(update={"training": section_of_task("CAUSAL_LM")(learning_rate=1e-3)})
    found = arguments_of(plain, "CAUSAL_LM", evaluates=True)
    assert found.learning_rate == 1e-3
    for name, field in TrainingSection.model_fields.items():
        if name not in {
            "learning_rate",
            "head_learning_rate",
            "resume_from_checkpoint",
            "save_steps",
        }:
            want = [] if field.default == "none" else field.default
            assert getattr(found, name) in (want, field.default), name
    assert found.save_strategy == "no"
    assert arguments("save_steps=7").save_strategy == "steps"


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "CAUSAL_LM",
            "num_trian_epochs=2",
            "training.num_trian_epochs: no such key, did you mean 'num_train_epochs'?",
        ),
        ("CAUSAL_LM", "packin=true", "training.packin: no such key, did you mean 'packing'?"),
        ("CAUSAL_LM", "beta=0.3", "training.beta: no such key for CAUSAL_LM; PREFERENCE has it"),
        ("SEQ_CLS", "packing=true", "training.packing: no such key for SEQ_CLS; CAUSAL_LM has it"),
        ("CAUSAL_LM", "max_steps=many", "training.max_steps: Input should be a valid integer"),
        ("CAUSAL_LM", "max_steps=0", "training.max_steps: should be 1 or more, or -1 for no limit"),
        ("SEQ_CLS", "max_steps=-2", "training.max_steps: should be 1 or more, or -1 for no limit"),
        ("CAUSAL_LM", "lr_scheduler_type=cosin", "no such schedule, did you mean 'cosine'?"),
        ("CAUSAL_LM", "packing_strategy=bdf", "training.packing_strategy: Input should be 'bfd'"),
        (
            "CAUSAL_LM",
            "eval_strategy=step",
            "training.eval_strategy: Input should be 'no', 'steps'",
        ),
        ("CAUSAL_LM", "per_device_train_batch_size=0", "greater than or equal to 1 (got 0)"),
        ("PREFERENCE", "learning_rate=suggested", "rates are suggested for supervised training"),
        ("PREFERENCE", "head_learning_rate=suggested", "a head's rate is suggested for supervised"),
        ("SEQ_CLS", "head_learning_rate=0", "should be 'suggested' or a number greater than 0"),
    ],
)
def test_a_fault_names_the_key_and_the_nearest_one(task, change, message):
    with pytest.raises(ConfigError) as caught:
        recipe_of(change, task=task)
    assert "has 1 fault:" in str(caught.value)
    assert message in str(caught.value)


def test_a_head_rate_is_suggested_for_adam():
    assert recipe_of("head_learning_rate=suggested").training.head_learning_rate == "suggested"
    assert recipe_of("head_learning_rate=3e-2").training.head_learning_rate == 3e-2
    with pytest.raises(ConfigError, match="name the head_learning_rate of lora_muon"):
        recipe_of("optim=lora_muon", "head_learning_rate=suggested")


def test_a_rate_is_suggested_for_optimisers_that_have_one():
    assert recipe_of("optim=adamw_8bit", rate="suggested").training.optim == "adamw_8bit"
    with pytest.raises(ConfigError, match="name the learning_rate of galore_adamw"):
        recipe_of("optim=galore_adamw", rate="suggested")


@pytest.mark.parametrize(
    ("task", "options", "what"),
    [
        ("SEQ_CLS", "{}", "the head of SEQ_CLS"),
        ("CAUSAL_LM", "{use_dora: true}", "method.options.use_dora"),
        ("CAUSAL_LM", "{bias: lora_only}", "method.options.bias"),
    ],
)
def test_a_rate_for_what_is_in_no_pair_is_asked_for_before_the_start(task, options, what):
    def made(*more):
        rates = ("training.optim=lora_muon", "training.learning_rate=0.03")
        changes = (f"model.task={task}", f"method.options={options}")
        return arguments_of(load_recipe(PICO, [*rates, *changes, *more]), task, evaluates=True)

    with pytest.raises(ConfigError, match=rf"but {what} trains .*training\.head_learning_rate"):
        made()
    assert made("training.head_learning_rate=1e-3").max_steps
    assert made("training.optim_args='head_lr=1e-3'").max_steps


def test_a_preference_without_a_rate_is_refused(tmp_path):
    values = yaml.safe_load(PICO.read_text())
    values["model"]["task"], values["training"] = "PREFERENCE", {"beta": 0.1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=r"training\.learning_rate: .*preference losses"):
        load_recipe(tmp_path / "recipe.yaml")


def test_faults_of_training_are_among_all_others():
    with pytest.raises(ConfigError) as caught:
        load_recipe(
            PICO, ["training.packin=1", "training.max_steps=x", "data.txt=a", "training.optim=a"]
        )
    assert "has 4 faults" in str(caught.value)


def test_a_key_that_only_the_model_decides_is_checked_before_it_is_loaded(tmp_path):
    """Without a task, every field of every class passes; the model's config has the last word."""
    values = yaml.safe_load(PICO.read_text())
    values["model"] = {"name": "someone/something"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["training.beta=0.2"])
    with pytest.raises(
        ConfigError, match=r"training.beta: SFTConfig, by which CAUSAL_LM is trained"
    ):
        arguments_of(recipe, "CAUSAL_LM", evaluates=True)
    assert arguments_of(recipe, "PREFERENCE", evaluates=True).beta == 0.2


def test_what_the_class_refuses_is_a_fault_of_the_recipe():
    with pytest.raises(ConfigError, match=r"^training: .*load_best_model_at_end"):
        arguments("load_best_model_at_end=true", "save_strategy=epoch")
    with pytest.raises(ConfigError, match=r"training.report_to=\['abacus'\] cannot be reported to"):
        arguments("report_to=[abacus]")


EARLIER = {
    "epochs": ("2", {"num_train_epochs": 2.0}),
    "batch_size": ("3", {"per_device_train_batch_size": 3}),
    "gradient_accumulation": ("4", {"gradient_accumulation_steps": 4}),
    "warmup": ("0.1", {"warmup_steps": 0.1}),
    "schedule": ("cosine", {"lr_scheduler_type": "cosine"}),
    "adam_betas": ("[0.8, 0.9]", {"adam_beta1": 0.8, "adam_beta2": 0.9}),
    "precision": ("bf16", {"bf16": True, "fp16": False}),
    "resume": ("true", {"resume_from_checkpoint": True}),
}


@pytest.mark.parametrize("name", EARLIER_NAMES)
def test_earlier_names_mean_the_same_and_say_so_once(name, tmp_path):
    values = yaml.safe_load(PICO.read_text())
    values["training"] = {"learning_rate": 1e-3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    text, want = EARLIER[name]
    with pytest.warns(UserWarning, match=f"{name} is {EARLIER_NAMES[name]}; rename") as caught:
        training = load_recipe(tmp_path / "recipe.yaml", [f"training.{name}={text}"]).training
    assert len(caught) == 1
    assert {key: getattr(training, key) for key in want} == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["batch_size=3"],
            "training.batch_size: is per_device_train_batch_size, which is there, too",
        ),
        (["precision=half"], "training.precision: should be 'float32', 'bf16' or 'fp16'"),
        (["adam_betas=0.9"], "training.adam_betas: should be a list of two numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:keys of training")
def test_earlier_names_have_faults_as_well(changes, message):
    with pytest.raises(ConfigError) as caught:
        recipe_of(*changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("max_length=77", "max_length", 77),
        ("packing=true", "packing", True),
        ("assistant_only_loss=true", "assistant_only_loss", True),
        ("completion_only_loss=false", "loss_on_prompt", True),
        ("dataset_text_field=words", "text", "words"),
    ],
)
def test_what_trl_says_of_the_data_is_read_there(change, key, value):
    values = yaml.safe_load(PICO.read_text())
    assert key == "max_length" or key not in values["data"]
    recipe = recipe_of(change) if key != "max_length" else None
    if recipe is not None:
        assert getattr(recipe.read_data(), key) == value
        return
    with pytest.raises(ConfigError, match=r"data.max_length and training.max_length .* 192 and 77"):
        recipe_of(change)


def test_trl_prepares_by_its_own_fields():
    recipe = recipe_of("packing_strategy=wrapped", "eos_token='</s>'", "packing=true", "seed=3")
    assert preparation_of(recipe.training) == {
        "packing_strategy": "wrapped",
        "eos_token": "</s>",
        "seed": 3,
    }


def test_results_have_what_was_said_and_no_secrets():
    dumped = recipe_of("hub_token=secret", "adam_beta2=0.95").model_dump(mode="json")["training"]
    assert dumped["adam_beta2"] == 0.95
    assert "secret" not in json.dumps(dumped)
    assert set(dumped) == {*TrainingSection.model_fields, "adam_beta2"}
    assert issubclass(section_of_task("CAUSAL_LM"), Section)


def test_losses_can_be_reported(monkeypatch):
    where = "peft_gradinit.recipes.trainers.get_available_reporting_integrations"
    monkeypatch.setattr(where, lambda: ["tensorboard", "wandb"])
    assert arguments("report_to=tensorboard").report_to == ["tensorboard"]
    assert arguments("report_to=[wandb, tensorboard]").report_to == ["wandb", "tensorboard"]
    assert arguments().report_to == []
