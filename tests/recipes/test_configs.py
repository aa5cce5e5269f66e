"""Every recipe in `configs/` is valid, honest about its source, and documented."""

import functools
import re
from pathlib import Path

import pytest
import yaml

from peft_gradinit.errors import ConfigError, GradInitError
from peft_gradinit.methods import METHODS
from peft_gradinit.recipes import adapter_config, load_recipe
from peft_gradinit.recipes.documentation import documentation

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
PAPERS = {method.name: method.paper for method in METHODS}


def ids(path):
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_every_file_is_valid(path):
    recipe = load_recipe(path)
    task = recipe.model.task or "CAUSAL_LM"
    config = adapter_config(recipe.method, task, calibration="unused")
    assert config.r == recipe.method.r
    assert recipe.output == f"out/{path.relative_to(ROOT / 'configs').with_suffix('')}".replace(
        "offline/", ""
    )
    assert recipe.offline == recipe.model.name.startswith("embedded:")
    if recipe.data.chat_template is not None:
        assert (ROOT / recipe.data.chat_template).exists()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_recipes_of_papers_cite_them(path):
    recipe = load_recipe(path)
    if path.parent.name not in PAPERS:
        assert recipe.source is None
        return
    assert recipe.method.name == path.parent.name
    assert recipe.source is not None
    assert PAPERS[recipe.method.name] in recipe.source.paper
    assert recipe.source.expected
    for value in recipe.source.expected.values():
        assert isinstance(value, float | str)
        assert value != ""


def test_every_method_has_a_recipe_of_its_paper_and_one_that_runs_offline():
    of_papers = {path.parent.name for path in FILES}
    assert set(PAPERS) <= of_papers
    offline = {load_recipe(p).method.name for p in FILES if p.parent.name == "offline"}
    assert {"lora", "lora_ga", "lora_one", "eva", "svfit"} <= offline


def test_the_documentation_is_that_of_the_schema():
    assert (ROOT / "configs" / "README.md").read_text() == documentation()


def test_completions_are_kept_as_the_recipes_say():
    code = load_recipe(ROOT / "configs/lora_ga/llama2_code_feedback.yaml").data
    found = re.search(code.completion_keep, "text\n```py\na = 1\n```\nmore\n```\nb\n```")
    assert found.group(1) == "text\n```py\na = 1\n```"
    assert re.search(code.completion_keep, "no code") is None
    wizard = load_recipe(ROOT / "configs/lora_ga/llama2_wizardlm.yaml").data.where["output"]
    assert re.search(wizard, "Here it is.\nDone.")
    assert not re.search(wizard, "Well,\nI am Sorry, but")


@pytest.mark.parametrize("name", ["lora_ga/llama2_metamath", "eva/llama2_metamath"])
def test_answers_are_found_in_both_forms(name):
    from peft_gradinit.recipes.evaluation import answer_of

    pattern = load_recipe(ROOT / f"configs/{name}.yaml").evaluation.answer
    assert answer_of("3 + 4 = 7\nThe answer is: 7", pattern) == "7"
    assert answer_of("It is 1,234.\n#### 1,234", pattern) == "1234"
    assert answer_of("The answer is $-3.5.", pattern) == "-3.5"
    assert answer_of("nothing", pattern) == ""
    for answer in ("(1,2)", "1,23", "1,2345", "a, b"):
        assert answer_of(f"<{answer}>", "<(.*)>") == answer
    assert answer_of("<1,234,567.5>", "<(.*)>") == "1234567.5"


def broken(tmp_path, **changes):
    values = yaml.safe_load((ROOT / "configs/offline/minilm_docstrings.yaml").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values[section][name] = value
        else:
            values[key] = value
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "broken.yaml"


def test_the_tilde_is_the_home_folder_wherever_a_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    places = (
        *("output", "model.name", "model.tokenizer", "data.path", "data.eval_path"),
        *("data.chat_template", "calibration.result", "training.resume_from_checkpoint"),
    )
    changes = [f"{place}=~/x" for place in places]
    recipe = load_recipe(
        ROOT / "configs/offline/minilm_docstrings.yaml", [*changes, "baselines=[~/x, ./a//b]"]
    )
    for place in places:
        assert functools.reduce(getattr, place.split("."), recipe) == str(tmp_path / "x"), place
    assert recipe.baselines == [str(tmp_path / "x"), "./a//b"]
    with pytest.raises(ConfigError, match="output: there is no such home folder"):
        load_recipe(ROOT / "configs/offline/minilm_docstrings.yaml", ["output=~nobody-here/x"])


def test_all_faults_are_shown_at_once_with_the_nearest_key(tmp_path):
    path = broken(
        tmp_path,
        version=7,
        trainig={},
        data__max_lenght=3,
        method__options={"stable_gama": 2},
        training__learning_rate=-1,
        model__dtype="float7",
    )
    with pytest.raises(GradInitError) as caught:
        load_recipe(path, ["calibration.max_tokns=3", "nonsense"])
    message = str(caught.value)
    assert "8 faults" in message
    for part in (
        "version: this package reads version 1 of the schema; update it (got 7)",
        "trainig: no such key, did you mean 'training'?",
        "data.max_lenght: no such key, did you mean 'max_length'?",
        "has no option 'stable_gama', did you mean 'stable_gamma'?",
        "training.learning_rate: should be 'suggested' or a number greater than 0 (got -1)",
        "model.dtype: Input should be 'auto'",
        "calibration.max_tokns: no such key, did you mean 'max_tokens'?",
        "'nonsense' is not of the form section.key=value",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "method.r=-1",
            "method.r: Input should be greater than or equal to 1, or Input should be 'full'",
        ),
        ("export.targets=[peft, a]", "export.targets.1: Input should be 'peft'"),
    ],
)
def test_a_value_that_is_none_of_several_kinds_is_one_fault(override, told, tmp_path):
    with pytest.raises(ConfigError, match="has 1 fault:") as caught:
        load_recipe(broken(tmp_path), [override])
    assert told in str(caught.value)


def test_missing_keys_and_methods_are_named(tmp_path):
    with pytest.raises(
        GradInitError, match=r"method\.name: no such method, did you mean 'lora_ga'"
    ):
        load_recipe(broken(tmp_path, method__name="lora_gaa"))
    (tmp_path / "short.yaml").write_text("version: 1\n")
    with pytest.raises(GradInitError, match=r"model: missing"):
        load_recipe(tmp_path / "short.yaml")
    (tmp_path / "short.yaml").write_text("title: one\n")
    with pytest.raises(GradInitError, match=r"version: missing\. Version of this schema: 1\."):
        load_recipe(tmp_path / "short.yaml")


def test_overrides_are_yaml_and_the_last_one_wins():
    recipe = load_recipe(
        ROOT / "configs/offline/minilm_docstrings.yaml",
        [
            "training.learning_rate=1e-4",
            "training.learning_rate=2e-4",
            "method.options.direction=ArBr",
            "evaluation.metrics=[accuracy]",
            "data.n_train=10",
            "push.repo=someone/something",
        ],
    )
    assert recipe.training.learning_rate == 2e-4
    assert recipe.method.options == {"stable_gamma": 64, "direction": "ArBr"}
    assert recipe.evaluation.metrics == ["accuracy"]
    assert recipe.data.n_train == 10
    assert recipe.push.repo == "someone/something"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("method: {r: 4}\nmethod: {r: 8}\n", r"the key 'method' is there twice"),
        ("method: {name: lora, r: 4, r: 8}\n", r"the key 'r' is there twice"),
        ("just text", "holds str where keys and values are expected"),
        (None, "there is no recipe .*give a file"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(GradInitError, match=message):
        load_recipe(tmp_path / "x.yaml")


def test_an_override_cannot_make_a_section_of_a_value():
    with pytest.raises(GradInitError, match="title is a value, not a section"):
        load_recipe(ROOT / "configs/offline/minilm_docstrings.yaml", ["title.x=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.r=full"], "r='full' is for svfit"),
        (["method.name=svfit", "method.options={}"], "svfit has no lora_alpha, use_rslora"),
    ],
)
def test_options_that_do_not_go_with_the_method(overrides, message):
    with pytest.raises(GradInitError, match=message):
        load_recipe(ROOT / "configs/offline/minilm_docstrings.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("evaluation.answer=#### (-?[0-9,]+)", "#### (-?[0-9,]+)"),
        ("evaluation.answer='#### (.)'", "#### (.)"),
        ("evaluation.answer=null", None),
        ("data.completion=A # {answer}", "A # {answer}"),
        ("data.prompt={question}", "{question}"),
        ("data.revision=0123456", "0123456"),
        ("title=yes", "yes"),
        ("output=2024", "2024"),
    ],
)
def test_text_on_the_command_line_is_the_text_that_was_typed(override, value):
    recipe = load_recipe(ROOT / "configs/offline/minilm_docstrings.yaml", [override])
    for key in override.partition("=")[0].split("."):
        recipe = getattr(recipe, key)
    assert recipe == value


TWICE = {
    "training.per_device_eval_batch_size=4": (
        "evaluation.batch_size=2",
        "evaluation",
        "batch_size",
        4,
    ),
    "training.eval_steps=5": ("evaluation.steps=2", "evaluation", "steps", 5),
    "training.packing=true": ("data.packing=false", "data", "packing", True),
}


@pytest.mark.parametrize("by_training", TWICE)
def test_what_two_keys_say_is_one_thing(by_training):
    here, section, name, value = TWICE[by_training]
    path = ROOT / "configs/offline/pico_llama_docstrings.yaml"
    with pytest.raises(
        GradInitError, match=rf"{section}\.{name} and training\.\w+ say the same thing"
    ):
        load_recipe(path, [here, by_training])
    alone = load_recipe(path, [f"{section}.{name}={value}".lower(), by_training])
    assert getattr(getattr(alone, f"read_{section}")(), name) == value


def test_a_comment_on_the_command_line_is_no_value():
    with pytest.raises(GradInitError, match=r"is a comment of YAML; put it into quotes"):
        load_recipe(ROOT / "configs/offline/minilm_docstrings.yaml", ["training.run_name=#3"])
