"""Rows of every kind of file and form, as tokens with the right loss."""

import copy
import functools
import json
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import trl.data_utils
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, PreTrainedTokenizerFast, ViTConfig

from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.recipes import (
    DataSection,
    ModelSection,
    encode,
    labels_of,
    load_recipe,
    load_rows,
    section_of,
)
from peft_gradinit.recipes.cells import in_colours, value_of
from peft_gradinit.recipes.collation import collator
from peft_gradinit.recipes.data import kept_rows
from peft_gradinit.recipes.embedded import MODULES, pico_tokenizer
from peft_gradinit.recipes.encoding import Encoder
from peft_gradinit.recipes.evaluation import _answers
from peft_gradinit.recipes.finetuning import _inputs
from peft_gradinit.recipes.models import load_model, load_processor
from peft_gradinit.recipes.reading import Reader
from tests.recipes.images import image_processor

TEXTS = ["one two three", "four five six seven", "eight"]
TOKENIZER = pico_tokenizer()
ENDS_ARE_LEFT_OUT = hasattr(trl.data_utils, "common_prefix_length")


def section(path="embedded:docstrings", **options):
    return DataSection(path=str(path), **options)


def encoded(rows, task="CAUSAL_LM", options=None, **keys):
    if isinstance(rows, list):
        rows = datasets.Dataset.from_list(rows)
    labels = labels_of(rows, section(**keys), BertConfig(), None) if task == "SEQ_CLS" else None
    return list(encode(rows, section(**keys), task, TOKENIZER, labels, options))


def decoded(ids):
    return TOKENIZER.decode([i for i in ids if i != -100])


def written(tmp_path, kind):
    data, path = datasets.Dataset.from_dict({"text": TEXTS}), tmp_path / f"data.{kind}"
    if kind in ("jsonl", "json"):
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    elif kind in ("csv", "tsv"):
        data.to_csv(path, sep="\t" if kind == "tsv" else ",")
    elif kind == "txt":
        path.write_text("\n".join(TEXTS))
    elif kind == "disk":
        data.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": data}).save_to_disk(path)
    return path


# Older datasets leave it to the garbage collector to close a CSV.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "tsv", "txt", "disk", "dict"])
def test_every_kind_of_file(tmp_path, kind):
    rows = load_rows(section(written(tmp_path, kind)))
    assert rows["text"][:] == TEXTS


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_the_ending_of_a_table_tells_its_columns_in_capitals_too(tmp_path):
    (tmp_path / "A.TSV").write_text("text\tlabel\none, two\tx\n")
    assert load_rows(section(tmp_path / "A.TSV"))[0] == {"text": "one, two", "label": "x"}


def test_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n\nthree\n")
    assert load_rows(section(tmp_path / "a.txt"))["text"][:] == ["one", "two", "three"]
    with pytest.warns(UserWarning, match="1 of 3 rows of the data are empty"):
        assert len(encoded([{"text": t} for t in ("one", "", "two")])) == 2


@pytest.mark.parametrize("written", [False, True])
def test_tools_reach_the_chat_template(written, tmp_path):
    """As TRL's own trainer gives them, also where they are JSON in a text."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% if tools %}tools {% for t in tools %}{{ t.function.name }}{% endfor %} {% endif %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    row = {"messages": chat, "tools": json.dumps(tools) if written else tools}
    (got,) = encoded([row], chat_template=str(template))
    assert decoded(got["input_ids"]).startswith("tools weather user")
    asked = {"prompt": chat[:1], "completion": chat[1:], "tools": row["tools"]}
    encoder = Encoder(section(chat_template=str(template)), "CAUSAL_LM", TOKENIZER, list(asked))
    assert TOKENIZER.decode(encoder.prompt(asked)).startswith("tools weather user")


CALLS = (
    "{% for m in messages %}{{ m.role }} {% for c in m.tool_calls or [] %}call {{ c.function.name }} "
    "{% endfor %}{{ m.content or '' }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        ({"content": None, "tool_calls": [{"function": {"name": "weather"}}]}, "call weather"),
        ({"tool_calls": [{"function": {"name": "weather"}}]}, "call weather"),
        ({"content": "two words", "tool_calls": None}, "two words"),
    ],
)
def test_a_call_of_a_tool_is_compared_as_the_template_writes_it(last, answer, tmp_path):
    """It was the word None. Turns of the answer that come before belong to what is asked."""
    template = tmp_path / "chat.jinja"
    template.write_text(CALLS)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "search"}}]}
    before = [call, {"role": "tool", "content": "found"}]
    row = {
        "prompt": [{"role": "user", "content": "one"}],
        "completion": [*before, {"role": "assistant", **last}],
    }
    encoder = Encoder(section(chat_template=str(template)), "CAUSAL_LM", TOKENIZER, list(row))
    assert encoder.completion(row).strip() == answer
    asked = " ".join(TOKENIZER.decode(encoder.prompt(row)).split())
    assert asked == "user one assistant call search tool found assistant"


def of_chat(tmp_path, last, **options):
    template = tmp_path / "chat.jinja"
    template.write_text(CALLS)
    row = {"prompt": [{"role": "user", "content": "one"}], "completion": [last]}
    keys = {"chat_template": str(template), **options}
    return Encoder(section(**keys), "CAUSAL_LM", TOKENIZER, list(row)), row


def test_what_is_kept_of_a_turn_is_of_its_text(tmp_path):
    """A call of a tool was trained as the word None, parts as Python writes a list."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    encoder, row = of_chat(tmp_path, call, completion_keep="(.+)")
    assert encoder(row)["completion"] is None
    assert encoder.completion(row) is None
    parts = {"role": "assistant", "content": [{"type": "text", "text": "two. three"}]}
    encoder, row = of_chat(tmp_path, parts, completion_keep="(.+)")
    with pytest.raises(DataError, match="'content' is read as text, but holds list"):
        encoder(row)


def test_a_completion_that_ends_with_the_user_is_refused(tmp_path):
    """The user's words were learned, and answers were compared with them."""
    encoder, row = of_chat(tmp_path, {"role": "user", "content": "thanks"})
    for read in (encoder, encoder.prompt, encoder.completion):
        with pytest.raises(DataError, match="ends with a turn of 'user', not of the assistant"):
            read(row)


@pytest.mark.parametrize("column", ["meta.title", "a[0]", "of:us", "x!r"])
def test_templates_name_columns_with_dots_and_brackets(column):
    row = {column: "one", "text": "two"}
    if column in ("of:us", "x!r"):  # which a template cannot name
        assert value_of(row, column, list(row)) == "one"
    else:
        assert value_of(row, "{" + column + "}: {text}", list(row)) == "one: two"


def test_images_of_other_kinds(tmp_path):
    """16 bits are scaled to 8; what has no known range, or is a path, is named."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    gray = Image.fromarray(ramp.astype(np.uint16))
    got = np.asarray(in_colours(gray, "image"))
    assert np.abs(got[..., 0] - ramp / 257).max() <= 1
    assert got.shape == (8, 8, 3)
    for mode in ("I", "F"):
        with pytest.raises(DataError, match=f"column 'scan' have values of mode '{mode}'"):
            in_colours(Image.new(mode, (8, 8)), "scan")
    with pytest.raises(DataError, match=r"'path' holds str, not images; .*cast_column\('path'"):
        in_colours("a/b.png", "path")


def test_slices_splits_and_choices(tmp_path):
    path = written(tmp_path, "jsonl")
    assert load_rows(section(path, split="train[:2]"))["text"][:] == TEXTS[:2]
    assert load_rows(section(path, where={"text": "f(o|i)"}))["text"][:] == [TEXTS[1]]
    held = section(path, n_eval=1, n_train=1)
    assert load_rows(held, evaluation=True)["text"][:] == TEXTS[:1]
    assert load_rows(held)["text"][:] == TEXTS[1:2]
    shuffled = load_rows(section(path, shuffle_seed=1))["text"][:]
    assert shuffled == load_rows(section(path, shuffle_seed=1))["text"][:]
    assert sorted(shuffled) == sorted(TEXTS)


def test_evaluation_data_of_their_own(tmp_path):
    rows = [{"q": "a", "extra": 1}, {"q": "b", "extra": 2}]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = section(
        written(tmp_path, "jsonl"),
        eval_path=str(tmp_path / "eval.jsonl"),
        eval_split="test",
        eval_rename={"q": "text"},
        where={"text": "one"},
        n_eval=1,
    )
    assert load_rows(both, evaluation=True)["text"][:] == ["a"]
    assert load_rows(both)["text"][:] == TEXTS[:1]
    with pytest.raises(DataError, match="no column 'nothing'"):
        load_rows(both.model_copy(update={"eval_rename": {"nothing": "x"}}), evaluation=True)


@pytest.mark.parametrize("kind", ["jsonl", "disk"])
def test_data_of_one_split_are_never_evaluated_on_what_they_train_on(tmp_path, kind):
    path = written(tmp_path, kind)
    sliced = section(path, split="train[:2]", eval_split="train[2:]")
    assert load_rows(sliced)["text"][:] == TEXTS[:2]
    assert load_rows(sliced, evaluation=True)["text"][:] == TEXTS[2:]
    joined = load_rows(section(path, split="train[:1]+train[2:]"))
    assert joined["text"][:] == [TEXTS[0], TEXTS[2]]
    for options in ({"eval_split": "test"}, {"eval_split": "test[1:]", "eval_path": str(path)}):
        with pytest.raises(DataError, match=r"one split, 'train', got 'test.*give data\.n_eval"):
            load_rows(section(path, **options), evaluation=True)
    with pytest.raises(DataError, match="one split, 'train', got 'validation'"):
        load_rows(section(path, split="validation"))
    other = section(path, eval_path=str(written(tmp_path, "parquet")), eval_split="test[1:]")
    assert load_rows(other, evaluation=True)["text"][:] == TEXTS[1:]


def test_slices_of_saved_splits(tmp_path):
    rows = load_rows(section(written(tmp_path, "dict"), split="train[:1]+train[2:]"))
    assert rows["text"][:] == [TEXTS[0], TEXTS[2]]


@pytest.mark.parametrize("name", ["eval_path", "eval_name", "eval_rename"])
def test_evaluation_data_without_a_split_are_refused(name):
    value = {"a": "b"} if name == "eval_rename" else "other"
    with pytest.raises(ConfigError, match=f"{name} belongs to eval_split, which is missing"):
        section_of(DataSection, path="some", **{name: value})


@pytest.mark.parametrize("n_eval", [3, 40])
def test_holding_out_every_row_is_refused(tmp_path, n_eval):
    held = section(written(tmp_path, "jsonl"), n_eval=n_eval)
    for evaluation in (False, True):
        with pytest.raises(DataError, match=rf"n_eval={n_eval} leaves nothing of the 3 rows"):
            load_rows(held, evaluation=evaluation)


def test_more_rows_than_there_are_is_all_of_them(tmp_path):
    assert len(load_rows(section(written(tmp_path, "jsonl"), n_train=40))) == 3


def test_no_rows_are_told_with_what_left_them_out(tmp_path):
    path = written(tmp_path, "jsonl")
    with pytest.raises(
        DataError, match=r"none of the rows of .* matches data\.where=\{'text': 'z'"
    ):
        load_rows(section(path, where={"text": "z"}, n_eval=1))
    with pytest.raises(DataError, match=r"have no row in the split 'train\[:0\]'"):
        load_rows(section(written(tmp_path, "disk"), split="train[:0]"))


@pytest.mark.parametrize("name", ["data [v1]", "a*b?", "[!x]"])
def test_names_of_folders_are_no_patterns(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    assert load_rows(section(written(folder, "jsonl")))["text"][:] == TEXTS


def test_empty_columns_are_refused_alone_and_in_templates():
    rows = [{"q": "a", "context": "c"}, {"q": "b", "context": None}]
    for prompt in ("context", "Q: {q} {context}"):
        with pytest.raises(DataError, match="the column 'context' is empty in a row"):
            encoded(rows, prompt=prompt, completion="q")


@pytest.mark.parametrize("template", ["Write {} for {q}", "{q:{w}}", "{q} {0}"])
def test_a_template_with_a_field_that_is_no_column_is_refused(template):
    with pytest.raises(DataError, match=r"cannot be filled.*no column|asks for the column '0'"):
        encoded([{"q": "a"}], text=template)


READS = {
    "CAUSAL_LM": {"text", "prompt", "completion", "messages"},
    "PREFERENCE": {"prompt", "chosen", "rejected"},
    "SEQ_2_SEQ_LM": {"prompt", "completion"},
    "SEQ_CLS": {"text", "pair", "label"},
    "IMAGE_CLS": {"image", "label"},
}


@pytest.mark.parametrize("key", sorted(set().union(*READS.values())))
@pytest.mark.parametrize("task", READS)
def test_columns_that_a_task_does_not_read_are_refused(task, key):
    columns = ["text", "prompt", "completion", "chosen", "rejected", "image", "label", "c"]
    made = functools.partial(Encoder, section(**{key: "c"}), task, TOKENIZER, columns, int)
    if key in READS[task]:
        made()
    else:
        with pytest.raises(ConfigError, match=rf"data\.{key} cannot be heeded for {task}"):
            made()


def test_words_of_classes_name_their_column_in_every_task():
    options = {"label": "kind", "label_words": {0: "bad", 1: "good"}}
    (row,) = encoded([{"q": "a", "kind": 1}], prompt="{q}=", completion="{kind}", **options)
    assert decoded(row["labels"]) == "good</s>"


def test_empty_columns_match_no_pattern(tmp_path):
    rows = [{"q": "a", "context": "c"}, {"q": "b", "context": None}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = section(tmp_path / "data.jsonl", where={"context": "."})
    assert load_rows(asked)["q"][:] == ["a"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"where": {"txt": "a"}}, DataError, "no column 'txt', did you mean 'text'"),
        ({"split": "test"}, DataError, "has the splits"),
    ],
)
def test_choices_that_do_not_exist(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        load_rows(section(written(tmp_path, "dict"), **options))


def test_without_evaluation_data():
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        load_rows(section(), evaluation=True)
    with pytest.raises(ConfigError, match=r"the splits \['test', 'train'\], got 'dev'"):
        load_rows(section(split="dev"))
    with pytest.raises(ConfigError, match="did you mean 'embedded:docstrings'"):
        load_rows(section("embedded:docstring"))


def test_text_ends_and_carries_loss():
    (row,) = encoded([{"text": "hello"}])
    assert decoded(row["input_ids"]) == "hello</s>"
    assert row["labels"] == row["input_ids"]


def test_prompts_carry_no_loss_unless_asked():
    rows = [{"q": "1+1?", "a": "2"}]
    (row,) = encoded(rows, prompt="Q: {q}\nA: ", completion="a")
    assert decoded(row["input_ids"]) == "Q: 1+1?\nA: 2</s>"
    assert decoded(row["labels"]) == " 2</s>"
    (row,) = encoded(rows, prompt="Q: {q}\nA: ", completion="a", loss_on_prompt=True)
    assert decoded(row["labels"]) == "Q: 1+1?\nA: 2</s>"


def test_parts_of_completions_and_words_for_classes():
    rows = [
        {"prompt": "p", "completion": "x ```a``` y ```b```"},
        {"prompt": "p", "completion": "z"},
    ]
    (row,) = encoded(rows, completion_keep="(?s)^(.*?```.*?```)")
    assert decoded(row["labels"]) == "x ```a```</s>"
    rows = [{"s": "fine", "label": 1}]
    words = {0: "bad", 1: "good"}
    (row,) = encoded(rows, prompt="{s}: ", completion="{label}", label_words=words)
    assert decoded(row["input_ids"]) == "fine: good</s>"
    assert decoded(row["labels"]) == " good</s>"
    with pytest.raises(DataError, match="the class -1 in column 'label' has no word"):
        encoded([{"s": "a", "label": -1}], prompt="s", completion="label", label_words=words)


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def test_chats_go_through_the_template():
    (row,) = encoded([{"messages": CHAT}])
    assert decoded(row["input_ids"]).count("</s>") == 4
    assert row["labels"] == row["input_ids"]
    (row,) = encoded([{"messages": CHAT}], assistant_only_loss=True)
    assert decoded(row["labels"]) == "hello</s>ciao</s>"
    assert decoded(row["input_ids"]).count("user\n") == 2


def test_chats_of_the_other_form_and_conversational_prompts():
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    (row,) = encoded([{"conversations": sharegpt}])
    (want,) = encoded([{"messages": CHAT[:2]}])
    assert row["input_ids"] == want["input_ids"]
    (row,) = encoded([{"prompt": CHAT[:1], "completion": CHAT[1:2]}])
    assert decoded(row["labels"]) == "hello</s>"
    assert row["input_ids"] == want["input_ids"]


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    options = {"chat_template": str(tmp_path / "t.jinja")}
    (row,) = encoded([{"messages": CHAT[:2]}], **options)
    assert decoded(row["input_ids"]) == "[hi][hello]"
    with pytest.raises(DataError, match=r"TRL cannot prepare .*\{% generation %\}"):
        encoded([{"messages": CHAT[:2]}], **options, assistant_only_loss=True)


def test_lengths_are_cut_or_dropped_or_packed():
    rows = [{"text": "a b c d e f g h"}, {"text": "a"}]
    assert [len(r["input_ids"]) for r in encoded(rows, max_length=5)] == [5, 2]
    assert len(encoded(rows, max_length=5, drop_longer=True)) == 1
    long, short = (r["input_ids"] for r in encoded(rows))
    packed = encoded(rows, max_length=6, packing=True)
    assert [r["input_ids"] for r in packed] == [long[:6], short]
    cut = encoded(rows, options={"packing_strategy": "wrapped"}, max_length=4, packing=True)
    assert [i for r in cut for i in r["input_ids"]] == long + short
    assert {len(r["input_ids"]) for r in cut[:-1]} == {4}
    few = encoded([*rows, {"text": "b"}], max_length=5, packing=True, drop_longer=True)
    assert [r["seq_lengths"] for r in few] == [[2, 2]]
    with pytest.raises(ConfigError, match="packing is for causal models"):
        encode(load_rows(section()), section(packing=True), "SEQ_CLS", TOKENIZER)
    with pytest.raises(DataError, match="none of the rows"):
        encoded(rows[:1], max_length=2, drop_longer=True)


def test_packed_rows_do_not_see_each_other():
    rows = encoded([{"text": t} for t in TEXTS], max_length=64, packing=True)
    assert len(rows) == 1
    batch = collator(TOKENIZER)(rows)
    lengths, ids = rows[0]["seq_lengths"], torch.tensor(rows[0]["input_ids"])
    assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
    model = load_model(ModelSection(name="embedded:pico-llama"))
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0].split(lengths)
        for together, alone in zip(packed, ids.split(lengths), strict=True):
            assert torch.allclose(together, model(alone[None]).logits[0], atol=1e-5)


def test_streams_are_read_as_they_are_needed():
    seen = []

    def rows():
        for text in TEXTS * 100:
            seen.append(text)
            yield {"text": text}

    stream = datasets.IterableDataset.from_generator(rows)
    first = next(iter(encode(stream, section(), "CAUSAL_LM", TOKENIZER)))
    assert decoded(first["input_ids"]) == "one two three</s>"
    assert len(seen) < 20


def test_classes_and_pairs():
    labels = labels_of(load_rows(section()), section(), BertConfig(), None)
    assert labels.head()["num_labels"] == len(MODULES)
    rows = [{"a": "x", "b": "y", "kind": kind} for kind in (3, 1)]
    row, _ = encoded(rows, "SEQ_CLS", text="a", pair="b", label="kind")
    assert row["labels"] == 1
    assert decoded(row["input_ids"]) == "xy"


def test_source_and_target_of_encoder_decoders():
    (row,) = encoded([{"prompt": "in", "completion": "out"}], "SEQ_2_SEQ_LM")
    assert decoded(row["input_ids"]) == "in"
    assert decoded(row["labels"]) == "out"


def test_images():
    from PIL import Image

    image = Image.new("L", (20, 30), 128)
    rows = datasets.Dataset.from_list([{"image": image, "label": 4}])
    processor = image_processor(size={"height": 8, "width": 8})
    labels = labels_of(rows, section(), ViTConfig(), 5)
    data = encode(rows, section(), "IMAGE_CLS", processor, labels)
    batch = collator(processor)(list(data))
    assert batch["pixel_values"].shape == (1, 3, 8, 8)
    assert batch["labels"].tolist() == [4]


def test_a_tokenizer_without_words_is_refused(tmp_path):
    """Some versions of Transformers make one where a folder holds a model alone."""
    inner = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot load the tokenizer.*knows special tokens only"):
        load_processor(ModelSection(name=str(tmp_path), task="CAUSAL_LM"))


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path):
    for n, refused in ((512, False), (513, True)):
        inner = Tokenizer(WordLevel({f"t{i}": i for i in range(n)}, unk_token="t0"))
        made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", eos_token="t1")
        made.save_pretrained(tmp_path / str(n))
        model = ModelSection(name="embedded:pico-llama", tokenizer=str(tmp_path / str(n)))
        if not refused:
            assert len(Reader.of(model, section(), load_rows(section())).processor) == n
            continue
        with pytest.raises(
            ConfigError, match=r"has 513 tokens, but the embedding of .* has 512 rows"
        ):
            Reader.of(model, section(), load_rows(section()))


def test_batches_are_padded_with_what_carries_no_loss():
    batch = collator(TOKENIZER)(encoded([{"text": t} for t in TEXTS]))
    assert ((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all()
    classes = encoded([{"text": t, "label": i} for i, t in enumerate(TEXTS)], "SEQ_CLS")
    assert collator(TOKENIZER)(classes)["labels"].equal(torch.arange(3))


def with_ends(tokenizer):
    """A tokenizer that puts a token before and one behind every text."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "in: ", "completion": "out"},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]},
    ],
    ids=["text", "chat", "sharegpt"],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, with_ends(TOKENIZER)], ids=["bare", "ends"])
def test_answers_are_generated_to_the_prompt_of_training(row, tokenizer):
    if tokenizer is not TOKENIZER and isinstance(row["prompt"], str) and not ENDS_ARE_LEFT_OUT:
        pytest.skip("this TRL trains on prompts that end in the tokenizer's last token")
    encoder = Encoder(section(), "CAUSAL_LM", tokenizer, list(row))
    rows = datasets.Dataset.from_list([row])
    (trained,), prompt = encode(rows, section(), "CAUSAL_LM", tokenizer), encoder.prompt(row)
    n = trained["labels"].count(-100)
    assert prompt == trained["input_ids"][:n]
    assert encoder.completion(row) in tokenizer.decode(trained["input_ids"][n:])


def test_prompts_of_an_encoder_keep_their_end():
    encoder = Encoder(section(max_length=4), "SEQ_2_SEQ_LM", with_ends(TOKENIZER), ["prompt"])
    assert encoder.prompt({"prompt": "a"})[-1] == TOKENIZER.eos_token_id
    assert len(encoder.prompt({"prompt": "a long one " * 9})) == 4
    assert encoder.prompt({"prompt": "a long one " * 9})[-1] == TOKENIZER.eos_token_id


LONG = "a long one " * 9
KEPT = {"prompt": "a", "completion": "b"}
TOO_LONG = [{"prompt": LONG, "completion": "b"}, {"prompt": "a", "completion": LONG}]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_the_rows_that_are_kept_are_those_of_the_loss(task, packing, is_stream):
    rows = datasets.Dataset.from_list([TOO_LONG[0], KEPT, TOO_LONG[1], {**KEPT, "completion": "c"}])
    rows = rows.to_iterable_dataset() if is_stream else rows
    of_rows = section(max_length=8, drop_longer=True, packing=packing)
    kept = kept_rows(rows, of_rows, task, TOKENIZER)
    assert [(row["prompt"], row["completion"]) for row in kept] == [("a", "b"), ("a", "c")]


def test_rows_whose_prompt_fills_the_length_are_told():
    rows = [TOO_LONG[0], KEPT, TOO_LONG[1]]
    said = r"1 of 3 rows .* among the first data\.max_length=8 and were left out; set it higher"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = encoded(rows, max_length=8)
    if len(found) == len(rows):
        pytest.skip("this TRL keeps rows without loss")
    assert len(found) == 2
    assert any(re.search(said, str(w.message)) for w in warned)
    with pytest.raises(DataError, match=r"longer than max_length=8 \(with their prompts alone"):
        encoded(rows[:1], max_length=8)


def test_metrics_of_texts_are_of_the_rows_of_the_loss():
    values = ["data.max_length=64", "data.n_eval=16", "calibration.max_tokens=512"]
    recipe, inputs, _ = _inputs(load_recipe(PICO, values))
    assert recipe.data.drop_longer
    assert 0 < len(inputs.evaluation) == len(inputs.evaluation_rows) < 16


PICO = Path(__file__).parents[2] / "configs/offline/pico_llama_docstrings.yaml"
PREFERENCES = Path(__file__).parents[2] / "configs/offline/pico_llama_preferences.yaml"


def test_prompts_without_room_for_an_answer_are_not_asked():
    """Of a causal model: the loss has no token behind them either."""
    short, long = KEPT, TOO_LONG[0]
    encoder = Encoder(section(max_length=8), "CAUSAL_LM", TOKENIZER, list(short))
    assert encoder.prompt(short) is not None
    assert encoder.prompt(long) is None
    recipe = load_recipe(PREFERENCES, ["evaluation.max_new_tokens=2"])
    model = load_model(recipe.model)
    with pytest.warns(
        UserWarning, match="1 of 2 prompts to evaluate on are as long as data.max_length=8"
    ):
        answers, references = _answers(model, recipe, "CAUSAL_LM", [short, long], encoder)
    assert (len(answers), references) == (1, ["b"])
    with pytest.raises(DataError, match="all 1 prompts to evaluate on are as long as"):
        _answers(model, recipe, "CAUSAL_LM", [long], encoder)
