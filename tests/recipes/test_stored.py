"""What a file holds is what is trained on: no text becomes another by looking like a number or a date."""

import gzip
import re
import warnings

import datasets
import pytest
from transformers import BertConfig

from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.recipes import DataSection, ModelSection, encode, labels_of, load_rows
from peft_gradinit.recipes.chats import as_messages
from peft_gradinit.recipes.embedded import pico_tokenizer
from peft_gradinit.recipes.encoding import Encoder
from peft_gradinit.recipes.models import load_processor

TOKENIZER = pico_tokenizer()

# Older datasets leave it to the garbage collector to close a CSV.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture
def rows_of(tmp_path):
    def read(text, kind="csv", **options):
        path = tmp_path / f"data.{kind}"
        path.write_text(text, encoding="utf-8")
        section = DataSection(path=str(path), **options)
        return load_rows(section), section

    return read


def _decoded(rows, section):
    encoded = encode(rows, section, "CAUSAL_LM", TOKENIZER)
    return [TOKENIZER.decode([i for i in row["labels"] if i != -100]) for row in encoded]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_cells_are_text(rows_of, kind):
    text = 'zip,price,when,word\n02139,1.50,2024-05-01,NA\n00501,2,2024-05-02,"None, or"\n7,,,\n'
    rows, _ = rows_of(
        text if kind == "csv" else text.replace("None, or", "None").replace(",", "\t"), kind
    )
    rows = list(rows)
    assert [row["zip"] for row in rows] == ["02139", "00501", "7"]
    assert [row["price"] for row in rows] == ["1.50", "2", None]
    assert [row["when"] for row in rows[:2]] == ["2024-05-01", "2024-05-02"]
    assert [row["word"] for row in rows][::2] == ["NA", None]


LABELS = ("true", "1.50", "12345678901234567890123", "007", "0x10")


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("completion", ["label", "{text}{label}"])
def test_a_column_label_that_is_trained_on_is_text(rows_of, label, completion):
    keys = {"prompt": "text", "completion": completion, "where": {"label": f"^{label}$"}}
    rows, section = rows_of(f"text,label\na=,{label}\nb=,{label}\n", **keys)
    want = [label, label] if completion == "label" else [f"a={label}", f"b={label}"]
    assert _decoded(rows, section) == [f"{text}</s>" for text in want]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (("2", "10"), (2, 10)),
        (("0x10", "16"), ("0x10", "16")),
        (("true", "false"), ("true", "false")),
        (("1.50", "2"), (1.5, 2.0)),
    ],
)
def test_labels_are_numbers_if_all_are(rows_of, written, read):
    rows, _ = rows_of("text,label\na,{}\nb,{}\n".format(*written))
    assert tuple(rows["label"]) == read


def test_whole_numbers_beside_an_empty_cell_stay_whole(rows_of):
    rows, section = rows_of(
        "prompt,completion\n1+1=,2\n1+2=,3\n2+2=,\n", where={"completion": "^[0-9]$"}
    )
    assert _decoded(rows, section) == ["2</s>", "3</s>"]


@pytest.mark.parametrize(
    ("cells", "want"),
    [
        (["0", "10", "2"], ["0", "2", "10"]),  # as numbers are ordered
        (["NA", "None", "yes"], ["NA", "None", "yes"]),
        (["True", "False"], ["False", "True"]),
        (["1", "a"], ["1", "a"]),
    ],
)
def test_labels_are_what_all_of_them_are(rows_of, cells, want):
    text = "text,label\n" + "".join(f"word,{cell}\n" for cell in cells)
    rows, section = rows_of(text)
    labels = labels_of(rows, section, BertConfig(), None)
    assert list(labels.head()["id2label"].values()) == want


def test_labels_of_a_part_are_read_as_those_of_the_whole_file(rows_of):
    rows, section = rows_of("text,label\na,1\nb,2\nc,x\n", split="train[:2]")
    assert rows["label"][:] == ["1", "2"]
    rows, section = rows_of(
        "text,label\na,1.5\nb,2\nc,\n", where={"label": "."}, label_kind="number"
    )
    encoded = encode(rows, section, "SEQ_CLS", TOKENIZER, labels_of(rows, section, None, 1))
    assert encoded["labels"][:] == [1.5, 2.0]


@pytest.mark.parametrize(
    ("text", "n_cells"),
    [("text,label\ngood, really,1\nbad,0\n", 3), ("text\na, b\n", 2), ("a,b\n1,2,\n", 3)],
)
def test_a_row_with_more_cells_than_the_header_is_refused(rows_of, text, n_cells):
    """pandas would take the first cell for a name of the row, and train on the others."""
    with pytest.raises(DataError, match=f"has {n_cells} cells, but its header .* put quotes"):
        rows_of(text)


def test_labels_with_zeros_in_front_stay_as_they_are(rows_of):
    rows, section = rows_of("text,label\na,01\nb,02\n")
    assert list(labels_of(rows, section, BertConfig(), None).head()["id2label"].values()) == [
        "01",
        "02",
    ]
    rows, _ = rows_of("text,label\na,007\nb,2\n", label_kind="number")
    assert rows["label"][:] == [7, 2]


def test_a_mark_of_the_byte_order_is_no_text(rows_of):
    rows, _ = rows_of("\ufeffone\ntwo\n", "txt")
    assert rows["text"][:] == ["one", "two"]


@pytest.mark.parametrize("names", [["train.csv.gz"], ["train.csv", "test.csv.gz"]])
def test_compressed_files_are_refused_in_a_folder_as_alone(tmp_path, names):
    for name in names:
        opened = gzip.open if name.endswith("gz") else open
        with opened(tmp_path / name, "wt") as file:
            file.write("text\n007\n")
    for path in (tmp_path, tmp_path / names[-1]):
        with pytest.raises(DataError, match=r"ends in '\.gz'; expected one of .* Unpack it first"):
            load_rows(DataSection(path=str(path)))


def test_a_folder_of_files_is_read_as_its_files_are(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("text,label\n02139,1\n1e5,2\nNA,1\n")
    (tmp_path / "csv" / "test.csv").write_text("text,label\nNone,x\n")
    section = DataSection(path=str(tmp_path / "csv"), eval_split="test")
    assert load_rows(section)["text"][:] == ["02139", "1e5", "NA"]
    assert load_rows(section)["label"][:] == ["1", "2", "1"]  # as one split has a word
    assert load_rows(section, evaluation=True)["text"][:] == ["None"]
    (tmp_path / "json").mkdir()
    for i in range(2):
        (tmp_path / "json" / f"part{i}.jsonl").write_text(f'{{"text": "2024-01-0{i + 1}"}}\n')
    section = DataSection(path=str(tmp_path / "json"), split="train[1:]")
    assert load_rows(section)["text"][:] == ["2024-01-02"]
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "a.txt").write_text("one\n\ntwo\n")
    assert load_rows(DataSection(path=str(tmp_path / "txt")))["text"][:] == ["one", "two"]


@pytest.mark.parametrize(
    ("split", "eval_split", "n"),
    [
        ("train", "train[80%:]", 2),
        ("train[:6]", "train[4:8]", 2),
        ("train[:80%]", "train[80%:]", 0),
        ("train[:3]+train[9:]", "train[3:9]", 0),
    ],
)
def test_evaluating_on_rows_of_the_training_is_told(tmp_path, split, eval_split, n):
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{i}\n" for i in range(10)))
    section = DataSection(path=str(tmp_path / "a.csv"), split=split, eval_split=eval_split)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_rows(section, evaluation=True)
    told = [str(w.message) for w in caught if "in common" in str(w.message)]
    assert len(told) == bool(n)
    assert all(f"have {n} rows in common" in message for message in told)


def test_evaluating_on_the_split_of_the_training_is_told():
    section = DataSection(path="embedded:docstrings", eval_split="train", n_eval=4)
    with pytest.warns(UserWarning, match="rows in common"):
        load_rows(section, evaluation=True)
    own = section.model_copy(update={"eval_split": "test"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_rows(own, evaluation=True)


def test_labels_of_evaluation_rows_have_another_name(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,0\nb,1\n")
    (tmp_path / "b.csv").write_text("text,gold\na,1\n")
    section = DataSection(
        path=str(tmp_path / "a.csv"),
        eval_path=str(tmp_path / "b.csv"),
        eval_split="train",
        eval_rename={"gold": "label"},
    )
    assert load_rows(section, evaluation=True)["label"][:] == [1]
    (tmp_path / "b.csv").write_text("text,gold,label\na,1,0\n")
    with pytest.raises(DataError, match=r"data\.eval_rename: there is a column 'label' already"):
        load_rows(section, evaluation=True)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "a", "completion": "2024-05-01"}\n{"prompt": "b", "completion": "2024-05-02"}\n',
        '[{"prompt": "a", "completion": "2024-05-01"},\n {"prompt": "b", "completion": "2024-05-02"}]',
    ],
    ids=["lines", "a list"],
)
def test_dates_in_json_are_text(rows_of, text):
    rows, section = rows_of(text, "json")
    assert _decoded(rows, section) == ["2024-05-01</s>", "2024-05-02</s>"]
    rows, _ = rows_of(text.replace("05-0", "06-0"), "json")  # not what was read before
    assert rows["completion"][:] == ["2024-06-01", "2024-06-02"]


def test_dates_in_chats_are_text(rows_of):
    chat = '[{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]'
    lines = [chat % (f"2024-05-0{i}", f"2024-06-0{i}") for i in (1, 2, 3)]
    text = "".join(f'{{"messages": {line}, "n": {i}}}\n' for i, line in enumerate(lines))
    rows, section = rows_of(text, "jsonl", assistant_only_loss=True, split="train[1:]")
    assert _decoded(rows, section) == ["2024-06-02</s>", "2024-06-03</s>"]


# Columns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [["a", "b"], [3, 5], [True, False]])
def test_encoded_labels_have_a_type_of_their_own(values):
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "labels": values})
    section = DataSection(path="data", label="labels")
    encoded = encode(
        rows, section, "SEQ_CLS", TOKENIZER, labels_of(rows, section, BertConfig(), None)
    )
    assert sorted(encoded["labels"][:]) == [0, 1]
    assert encoded.features["labels"].dtype == "int64"


def test_encoded_texts_have_a_type_of_their_own():
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": [12, 13]})
    section = DataSection(path="data")
    assert _decoded(rows, section) == ["12</s>", "13</s>"]
    rows = datasets.Dataset.from_dict({"text": [1, 2]})
    assert _decoded(rows, section) == ["1</s>", "2</s>"]


LISTS: list[tuple[str, dict]] = [
    ("CAUSAL_LM", {"text": ["a", "b"]}),
    ("CAUSAL_LM", {"prompt": "a", "completion": {"b": 1}}),
    ("SEQ_2_SEQ_LM", {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}),
    ("SEQ_CLS", {"text": ["a"], "label": 0}),
    ("PREFERENCE", {"prompt": "a", "chosen": {"b": 1}, "rejected": "c"}),
]


@pytest.mark.parametrize(("task", "row"), LISTS)
def test_lists_are_not_trained_on_as_python_writes_them(task, row):
    encoder = Encoder(DataSection(path="data"), task, TOKENIZER, list(row), read_label=int)
    with pytest.raises(DataError, match=r"is read as text, but holds (list|dict)"):
        encoder(row)


def test_columns_of_a_template_are_texts():
    for template, said in (
        ("{q}", "'q' is read as text, but holds list"),
        ("{q", "the template '{q' cannot be filled: "),
        ("{n:d}", "the template '{n:d}' cannot be filled: "),
    ):
        encoder = Encoder(DataSection(path="data", text=template), "CAUSAL_LM", TOKENIZER, ["q"])
        with pytest.raises(DataError, match=re.escape(said)):
            encoder({"q": ["a"], "n": "b"})


def test_a_prompt_before_a_chat_is_the_turn_of_the_user():
    answer = [{"role": "assistant", "content": "yo"}]
    encoder = Encoder(DataSection(path="data"), "CAUSAL_LM", TOKENIZER, ["prompt", "completion"])
    got = encoder({"prompt": "hi", "completion": answer})
    asked = [{"role": "user", "content": "hi"}]
    assert got == {"prompt": asked, "completion": answer}
    row = {"prompt": asked, "completion": answer}
    assert encoder.prompt({"prompt": "hi", "completion": answer}) == encoder.prompt(row)
    with pytest.raises(DataError, match="begins with a turn of 'user', not of the assistant"):
        encoder({"prompt": "hi", "completion": asked})


def test_pairs_are_chats_or_texts():
    asked = [{"role": "user", "content": "hi"}]
    columns = ["prompt", "chosen", "rejected"]
    encoder = Encoder(DataSection(path="data"), "PREFERENCE", TOKENIZER, columns)
    with pytest.raises(
        DataError, match="the prompt of a pair is a chat, but its answers are texts"
    ):
        encoder({"prompt": asked, "chosen": "a", "rejected": "b"})


def test_turns_that_call_tools_need_no_content():
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}]
    assert as_messages(chat) == chat
    for wrong in ([], [{"role": "user"}]):
        with pytest.raises(DataError, match="a chat is a list of"):
            as_messages(wrong)


def test_empty_rows_are_told():
    rows = datasets.Dataset.from_dict({"text": ["a", "", "b", " "]})
    with pytest.warns(UserWarning, match="2 of 4 rows of the data are empty and were left out"):
        assert len(encode(rows, DataSection(path="data"), "CAUSAL_LM", TOKENIZER)) == 2


def test_what_is_said_comes_before_what_columns_are_called():
    row = {"prompt": "p", "completion": "c", "text": "t", "messages": [], "source": "s"}
    rows = datasets.Dataset.from_list([row])
    assert _decoded(rows, DataSection(path="data", text="source")) == ["s</s>"]
    chats = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = datasets.Dataset.from_list([{"prompt": "p", "completion": "c", "chat": chats}])
    section = DataSection(path="data", messages="chat", assistant_only_loss=True)
    assert _decoded(rows, section) == ["ho</s>"]
    with pytest.raises(ConfigError, match=r"data\.messages and data\.text both say what to read"):
        _decoded(rows, DataSection(path="data", messages="chat", text="prompt"))
    with pytest.raises(ConfigError, match=r"data\.prompt and data\.text both say what to read"):
        _decoded(rows, DataSection(path="data", prompt="prompt", completion="x", text="prompt"))


def test_the_text_of_a_classifier_is_not_guessed():
    rows = datasets.Dataset.from_dict({
        "question": ["q", "r"],
        "sentence": ["s", "t"],
        "label": [0, 1],
    })
    section = DataSection(path="data")
    labels = labels_of(rows, section, BertConfig(), None)
    with pytest.raises(DataError, match="there is no column 'text'"):
        encode(rows, section, "SEQ_CLS", TOKENIZER, labels)


def test_tokens_keep_their_masks():
    row = {
        "input_ids": [5, 6, 7, 8, 0, 0],
        "attention_mask": [1, 1, 1, 1, 0, 0],
        "completion_mask": [0, 0, 1, 1, 0, 0],
    }
    section = DataSection(path="data")
    (encoded,) = encode(datasets.Dataset.from_list([row]), section, "CAUSAL_LM", TOKENIZER)
    assert (encoded["input_ids"], encoded["labels"]) == ([5, 6, 7, 8], [-100, -100, 7, 8])
    whole = DataSection(path="data", loss_on_prompt=True)
    (encoded,) = encode(datasets.Dataset.from_list([row]), whole, "CAUSAL_LM", TOKENIZER)
    assert encoded["labels"] == [5, 6, 7, 8]
    turns = {"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 0]}
    (encoded,) = encode(datasets.Dataset.from_list([turns]), section, "CAUSAL_LM", TOKENIZER)
    assert encoded["labels"] == [-100, 6, -100]
    short = datasets.Dataset.from_list([{**turns, "assistant_masks": [0, 1]}])
    with pytest.raises(DataError, match="other numbers of labels or of entries in its masks"):
        encode(short, section, "CAUSAL_LM", TOKENIZER)


def test_parts_of_completions_that_are_chats():
    user, section = [{"role": "user", "content": "q"}], {"completion_keep": "#### (.*)"}
    answers = [[{"role": "assistant", "content": text}] for text in ("x #### 3", "none")]
    rows = datasets.Dataset.from_list([{"prompt": user, "completion": a} for a in answers])
    assert _decoded(rows, DataSection(path="data", **section)) == ["3</s>"]
    for data in ([{"text": "a"}], [{"messages": [*user, *answers[0]]}]):
        with pytest.raises(
            ConfigError, match=r"data\.completion_keep is for prompts and completions"
        ):
            _decoded(datasets.Dataset.from_list(data), DataSection(path="data", **section))


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_longer_rows_are_dropped_whatever_the_task(task):
    long = "a b c d e f g h i j k l m n o p"
    rows = datasets.Dataset.from_dict({
        "text": ["a", long, "b"],
        "label": [0, 1, 1],
        "prompt": ["a", long, "b"],
        "completion": ["a", "b", long],
    })
    section = DataSection(path="data", max_length=8, drop_longer=True)
    labels = labels_of(rows, section, BertConfig(), None) if task == "SEQ_CLS" else None
    assert len(encode(rows, section, task, TOKENIZER, labels)) == (2 if task == "SEQ_CLS" else 1)
    cut = section.model_copy(update={"drop_longer": False})
    assert len(encode(rows, cut, task, TOKENIZER, labels)) == 3


@pytest.mark.parametrize("task", ["IMAGE_CLS", "PREFERENCE"])
def test_where_rows_are_not_tokenised_none_can_be_dropped_for_its_length(task):
    section = DataSection(path="data", drop_longer=True)
    with pytest.raises(ConfigError, match=f"cannot be heeded for {task}"):
        Encoder(section, task, TOKENIZER, ["image", "label", "chosen"], read_label=int)


# Streams ----------------------------------------------------------------------------------------


def test_rows_held_out_of_a_stream_are_never_trained_on(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(20)]})
    monkeypatch.setattr(
        "peft_gradinit.recipes.data.read_stored",
        lambda *_: rows.to_iterable_dataset(num_shards=4),
    )
    section = DataSection(path="hub/data", streaming=True, shuffle_seed=0, n_eval=5, n_train=10)
    held_out = {row["text"] for row in load_rows(section, evaluation=True)}
    train, orders = load_rows(section), []
    for epoch in range(4):  # as `Trainer` does
        train.set_epoch(epoch)
        orders.append([row["text"] for row in train])
    assert len(held_out) == 5
    assert not held_out & {text for order in orders for text in order}
    assert len({frozenset(order) for order in orders}) == 1  # n_train rows, the same in all epochs
    assert len({tuple(order) for order in orders}) > 1


# Revisions --------------------------------------------------------------------------------------


def test_a_revision_is_of_the_repository_that_is_named(monkeypatch):
    asked = {}

    def load(path, name=None, *, revision, **_):
        asked[path] = revision
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    options = {"eval_path": "other/data", "eval_split": "test", "revision": "abc123"}
    for evaluation in (False, True):
        load_rows(DataSection(path="me/data", **options), evaluation=evaluation)
    assert asked == {"me/data": "abc123", "other/data": None}


def test_a_revision_of_the_model_is_not_one_of_another_tokenizer(monkeypatch):
    asked = {}

    def load(name, *, revision):
        asked[name] = revision
        return TOKENIZER

    monkeypatch.setattr("peft_gradinit.recipes.models.AutoTokenizer.from_pretrained", load)
    model = {"name": "me/model", "revision": "abc123", "task": "CAUSAL_LM"}
    for tokenizer in (None, "other/tokenizer"):
        load_processor(ModelSection(**model, tokenizer=tokenizer))
    assert asked == {"me/model": "abc123", "other/tokenizer": None}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "txt"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_files_in_other_encodings_are_refused_by_name(ending, encoding, tmp_path):
    line = {"csv": "text\nhéllo\n", "jsonl": '{"text": "héllo"}\n', "txt": "héllo\n"}[ending]
    (tmp_path / f"a.{ending}").write_text(line, encoding=encoding)
    with pytest.raises(DataError, match=r"a\.\w+' is not in UTF-8 \(invalid .*: 0x"):
        load_rows(DataSection(path=str(tmp_path / f"a.{ending}")))


# Older datasets leave it to the garbage collector to close a CSV.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("ending", "written"), [("csv", ";"), ("csv", "\t"), ("tsv", "|")])
def test_a_table_with_other_separators_is_told(ending, written, tmp_path):
    (tmp_path / f"a.{ending}").write_text(f"text{written}label\none{written}x\n")
    with pytest.warns(UserWarning, match="read as a single column, .*save it with commas"):
        rows = load_rows(DataSection(path=str(tmp_path / f"a.{ending}")))
    assert rows.column_names == [f"text{written}label"]


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("ending", "text"), [("csv", "text,label\n"), ("json", "[]"), ("jsonl", "\n")]
)
def test_files_without_rows_are_named(ending, text, tmp_path):
    (tmp_path / f"a.{ending}").write_text(text)
    with pytest.raises(DataError, match=r"a\.\w+' (has no row|is empty)|have no row"):
        load_rows(DataSection(path=str(tmp_path / f"a.{ending}")))
