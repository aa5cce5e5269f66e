"""Classes as people have them: words, stars, booleans; and numbers that are no classes."""

import datasets
import pytest
from transformers import BertConfig

from peft_gradinit.errors import ConfigError, DataError
from peft_gradinit.recipes import DataSection, encode, labels_of, load_rows
from peft_gradinit.recipes.labels import Classes, Numbers
from tests.recipes.classifiers import tokenizer

# Older datasets leave it to the garbage collector to close a CSV.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


def section(path="embedded:docstrings", **options):
    return DataSection(path=str(path), **options)


def rows_of(values, feature=None):
    columns = {"text": ["a film"] * len(values), "label": list(values)}
    rows = datasets.Dataset.from_dict(columns)
    return rows if feature is None else rows.cast_column("label", feature)


def labels(values, config=None, n_labels=None, feature=None, **options):
    rows = rows_of(values, feature)
    return labels_of(rows, section(**options), config or BertConfig(), n_labels)


def encoded(values, by, feature=None):
    rows = encode(rows_of(values, feature), section(), "SEQ_CLS", tokenizer(), by)
    return [row["labels"] for row in rows]


def names(found):
    return list(found.head()["id2label"].values())


@pytest.mark.parametrize(
    ("values", "called", "want"),
    [
        (["pos", "neg", "pos", "neutral"], ["neg", "neutral", "pos"], [2, 0, 2, 1]),
        ([1, 5, 3, 5], ["1", "3", "5"], [0, 2, 1, 2]),
        ([-1, 1, 1], ["-1", "1"], [0, 1, 1]),
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
    ],
)
def test_classes_are_sorted_and_counted_from_zero(values, called, want):
    found = labels(values)
    assert encoded(values, found) == want
    assert found.head() == {
        "num_labels": len(called),
        "id2label": dict(enumerate(called)),
        "label2id": {name: i for i, name in enumerate(called)},
        "problem_type": "single_label_classification",
    }


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_stars_in_a_file(kind, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"] * 4, "label": [5, 1, 2, 5]})
    path = tmp_path / f"stars.{kind}"
    rows.to_csv(path) if kind == "csv" else rows.to_json(path)
    read = load_rows(section(path))
    found = labels_of(read, section(path), BertConfig(), None)
    data = encode(read, section(path), "SEQ_CLS", tokenizer(), found)
    assert [row["labels"] for row in data] == [2, 0, 1, 2]


def test_class_labels_keep_their_order_also_where_none_has_a_class():
    feature = datasets.ClassLabel(names=["pos", "neg", "other"])
    found = labels([1, 0], feature=feature)
    assert names(found) == ["pos", "neg", "other"]
    assert encoded([1, 0], found, feature) == [1, 0]
    # Other data may number the same classes in another way, or hold their names.
    assert encoded([1, 0], found, datasets.ClassLabel(names=["other", "neg"])) == [1, 2]
    assert encoded(["neg", "other"], found) == [1, 2]


def test_whole_numbers_are_the_same_class_in_every_type():
    found = labels([1, 2, 3])
    assert encoded([3.0, 1.0], found) == [2, 0]
    assert encoded(["3", "1"], found) == [2, 0]


def test_a_model_that_names_the_classes_keeps_its_order():
    """So that the outputs of its trained head mean what they did."""
    config = BertConfig(id2label={0: "POS", 1: "NEG"}, label2id={"POS": 0, "NEG": 1})
    found = labels(["neg", "pos"], config)
    assert names(found) == ["POS", "NEG"]
    assert encoded(["neg", "pos"], found) == [1, 0]
    assert names(labels(["neg", "pos", "x"], config)) == ["neg", "pos", "x"]
    assert names(labels(["good", "bad"], config)) == ["bad", "good"]


def test_words_name_and_order_the_classes():
    words = {0: "bad", 1: "good"}
    assert names(labels([1, 0], label_words=words)) == ["bad", "good"]
    assert encoded([1, 0], labels([1, 0], label_words=words)) == [1, 0]
    found = labels(["a", "b"], label_words={0: "b", 1: "a"})
    assert encoded(["a", "b"], found) == [1, 0]
    with pytest.raises(DataError, match=r"'2' .* none of the 2 classes in data\.label_words: bad"):
        encoded([2], labels([1, 0], label_words=words))


def test_a_label_that_training_does_not_hold_is_named():
    with pytest.raises(
        DataError,
        match=r"the label '4' in column 'label' is none of the 3 classes of the training data: "
        r"1, 2, 3\. Filter such rows out, or train on rows that have it",
    ):
        encoded([1, 4], labels([1, 2, 3]))
    feature = datasets.ClassLabel(names=["a", "b"])
    with pytest.raises(DataError, match="the label '-1' in column 'label'"):  # GLUE's test sets
        encoded([-1], labels([0, 1], feature=feature), feature)


def test_floats_are_not_guessed():
    with pytest.raises(
        DataError,
        match=r"'label' holds floating-point numbers \(1\.0, 2\.0\), .* label_kind='class' .* "
        "label_kind='number' for regression",
    ):
        labels([1.0, 2.0, 1.0])
    found = labels([1.0, 2.0, 1.0], label_kind="class")
    assert names(found) == ["1", "2"]
    assert encoded([1.0, 2.0], found) == [0, 1]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(DataError, match=r"inf in column 'label' is not finite.* filter such rows"):
        encoded([0.5, value], labels([0.5, value], label_kind="number"))


@pytest.mark.parametrize("options", [{"label_kind": "number"}, {"n_labels": 1}])
@pytest.mark.parametrize("values", [[0.5, 2.0], [3, 5]])
def test_numbers_have_one_output(values, options):
    found = labels(values, **options)
    assert isinstance(found, Numbers)
    assert found.head()["num_labels"] == 1
    assert found.head()["problem_type"] == "regression"
    got = encoded(values, found)
    assert got == values
    assert all(isinstance(value, float) for value in got)


def test_words_are_no_numbers():
    with pytest.raises(DataError, match=r"the label 'good' in column 'label' is no number"):
        encoded(["good"], Numbers("label"))
    with pytest.raises(DataError, match="'label' is empty in a row"):
        encoded([1.0, None], Numbers("label"))


@pytest.mark.parametrize("values", [["a", None], [1, None], [1.0, float("nan")]])
def test_empty_labels_are_named_by_row(values):
    with pytest.raises(DataError, match=r"'label' is empty in row 1 \(counted from 0\)"):
        labels(values)


def test_what_is_no_label():
    with pytest.raises(DataError, match="'label' holds List; expected one label a row"):
        labels([[0, 1], [1, 0]])
    with pytest.raises(
        DataError, match=r"'label' holds one class only \(7\), which teaches nothing"
    ):
        labels([7, 7])
    with pytest.raises(DataError, match="no column 'labe' of labels, did you mean 'label'"):
        labels([0, 1], label="labe")


def test_a_number_of_outputs_that_was_asked_for():
    assert names(labels([0, 2], n_labels=4)) == ["0", "1", "2", "3"]
    assert encoded([0, 2], labels([0, 2], n_labels=4)) == [0, 2]
    with pytest.raises(
        ConfigError,
        match=r"model\.n_labels=3, but there are 2 classes .*: bad, good\. Leave it out",
    ):
        labels(["good", "bad"], n_labels=3)


def test_streams_are_not_counted():
    def stream(values):
        return rows_of(values).to_iterable_dataset()

    config = BertConfig(num_labels=3)
    found = labels_of(stream([0, 2]), section(), config, None)
    assert isinstance(found, Classes)
    assert found.reader(stream([0, 2]))(2) == 2
    with pytest.raises(
        DataError, match=r"'pos' .* of the model \(the classes of a stream .* data\.label_words\)"
    ):
        found.reader(stream(["pos"]))("pos")
    words = section(label_words={0: "neg", 1: "pos"})
    found = labels_of(stream(["pos"]), words, config, None)
    assert found.reader(stream(["pos"]))("pos") == 1


def test_many_classes_are_not_all_listed():
    with pytest.raises(
        DataError, match=r"none of the 30 classes .* 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …"
    ):
        encoded([99], labels(range(30)))


def test_a_classifier_is_not_encoded_without_its_classes():
    with pytest.raises(ConfigError, match=r"SEQ_CLS needs to know the classes; pass labels="):
        encoded([0], None)


def test_numbers_with_several_outputs_are_refused():
    with pytest.raises(ConfigError, match=r"'number' takes one output, got model\.n_labels=3"):
        labels([0.5, 1.5], n_labels=3, label_kind="number")
