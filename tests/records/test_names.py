"""The class that loads an adapter's base model, on the command line and on the card."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTForImageClassification,
)

from peft_gradinit import PiSSAConfig, export_adapter
from peft_gradinit.records import base_class, label_count, padding_token
from tests.recipes.images import save_vit

OF_TRANSFORMERS = "transformers.models.vit.modeling_vit"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"task_type": "TOKEN_CLS"}, "AutoModelForTokenClassification"),
        ({"task_type": "SEQ_CLS"}, "AutoModelForSequenceClassification"),
        ({"task_type": "FEATURE_EXTRACTION"}, "AutoModel"),
        ({"task_type": "CAUSAL_LM", "auto_mapping": {}}, "AutoModelForCausalLM"),
        (
            {
                "task_type": None,
                "auto_mapping": {
                    "base_model_class": "ViTModel",
                    "parent_library": OF_TRANSFORMERS,
                },
            },
            "ViTModel",
        ),
        ({"auto_mapping": {"base_model_class": "Net", "parent_library": "__main__"}}, None),
        ({"auto_mapping": None}, None),
        ({}, None),
    ],
)
def test_the_class_is_that_of_the_task_or_the_one_that_peft_noted(config, name):
    assert base_class(config) == name


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        ({"base_model.model.score.weight": (3, 16)}, 3),
        ({"classifier.weight": (3, 16), "pre_classifier.weight": (16, 16)}, 3),
        ({"classifier.dense.weight": (16, 16), "classifier.out_proj.weight": (3, 16)}, 3),
        ({"classifier.1.weight": (3, 16), "classifier.1.bias": (3,)}, 3),
        ({"model.layers.0.self_attn.out_proj.weight": (16, 16)}, None),
        ({"lm_head.weight": (50, 16)}, None),
        ({}, None),
    ],
)
def test_the_classes_are_those_of_the_last_layer_of_the_head(shapes, count):
    assert label_count(shapes) == count


def test_the_card_names_the_class_of_a_model_without_a_task(tmp_path):
    save_vit(tmp_path / "base")
    model = ViTForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    adapter = PiSSAConfig(r=2, target_modules=r".*\.(query|q_proj)", modules_to_save=["classifier"])
    get_peft_model(model, adapter).save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "from transformers import ViTForImageClassification" in card
    assert "ViTForImageClassification.from_pretrained(" in card
    assert "num_labels=3" in card


@pytest.mark.parametrize("names", ["abc", None])
def test_the_code_on_the_card_of_a_classifier_runs(names, tmp_path, monkeypatch):
    """Over a checkpoint whose head has another size; the classes have their names again."""
    save_vit(tmp_path / "base")  # two outputs
    head = {"id2label": dict(enumerate(names))} if names else {"num_labels": 3}
    model = ViTForImageClassification.from_pretrained(
        tmp_path / "base", **head, ignore_mismatched_sizes=True
    ).eval()
    adapter = PiSSAConfig(r=2, target_modules=r".*\.(query|q_proj)", modules_to_save=["classifier"])
    adapted = get_peft_model(model, adapter)
    adapted.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    loaded = loaded_by(card, tmp_path / "adapter", monkeypatch)
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded(pixels).logits, adapted.eval()(pixels).logits)
    if names:
        assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}


def loaded_by(card, folder, monkeypatch):
    """The model of the code on a card in `folder`, beside which its base lies."""
    code = card.partition("```python\n")[2].partition("```")[0].replace("base-model", "../base")
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code, found)
    return found["model"].eval()


@pytest.mark.parametrize(
    ("way", "config_class"),
    [("saved", PiSSAConfig), ("serving", PiSSAConfig), ("serving", LoraConfig)],
)
def test_the_code_on_the_card_of_a_decoder_classifies_batches(
    way, config_class, tmp_path, monkeypatch
):
    """Over a checkpoint that names no padding token; the trained model got one from its tokenizer."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=1, **small)
    base = LlamaForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    head = {} if way == "serving" else {"task_type": "SEQ_CLS"}
    adapted = get_peft_model(base, config_class(r=2, target_modules=["q_proj"], **head)).eval()
    base.config.pad_token_id = 0  # after the adapter was made, as `Trainer` does
    if way == "serving":
        export_adapter(adapted, tmp_path / "adapter", "serving")
    else:
        adapted.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
    loaded = loaded_by(card, tmp_path / "adapter", monkeypatch)
    assert torch.allclose(loaded(ids).logits, adapted(ids).logits, atol=1e-6)


def test_only_classifiers_of_sequences_need_a_padding_token():
    config = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8)
    assert padding_token(BertForSequenceClassification(config)) == 0
    assert padding_token(BertForTokenClassification(config)) is None
    assert padding_token(torch.nn.Linear(2, 2)) is None
