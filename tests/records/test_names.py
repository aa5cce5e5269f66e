"""The class that loads an adapter's base model, on the command line and on the card."""

import pytest
import torch
from peft import get_peft_model
from transformers import ViTForImageClassification

from peft_gradinit import PiSSAConfig
from peft_gradinit.records import base_class, label_count
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
    code = card.partition("```python\n")[2].partition("```")[0].replace("base-model", "../base")
    monkeypatch.chdir(tmp_path / "adapter")
    found: dict = {}
    exec(code, found)
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(found["model"].eval()(pixels).logits, adapted.eval()(pixels).logits)
    if names:
        assert found["model"].config.id2label == {0: "a", 1: "b", 2: "c"}
