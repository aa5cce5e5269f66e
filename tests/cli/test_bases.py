"""The base model of an adapter is the one that the adapter names, in the class that was adapted."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from peft_gradinit import PiSSAConfig, export_adapter
from peft_gradinit.records import SavedAdapter
from peft_gradinit_cli.work.bases import model_section
from tests.helpers import pico_llama

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = BertConfig(vocab_size=50, **SMALL)
VIT = ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL)
DISTILBERT = DistilBertConfig(vocab_size=50, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
ROBERTA = RobertaConfig(vocab_size=50, pad_token_id=49, **SMALL)
LORA = {"r": 2, "lora_alpha": 4}
IDS = {"input_ids": torch.arange(6).view(1, 6)}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 64).view(1, 1, 8, 8)}
CASES = {
    "tokens of a causal model": (
        *(pico_llama, LlamaForTokenClassification, IDS),
        {"task_type": "TOKEN_CLS", "target_modules": ["q_proj"]},
    ),
    "tokens of an encoder": (
        *(lambda: BertForMaskedLM(BERT), BertForTokenClassification, IDS),
        {"task_type": "TOKEN_CLS", "target_modules": ["query"]},
    ),
    "features": (
        *(lambda: BertModel(BERT), BertModel, IDS),
        {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query"]},
    ),
    "classes, with a layer before the head": (
        *(lambda: DistilBertForMaskedLM(DISTILBERT), DistilBertForSequenceClassification, IDS),
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
    ),
    "classes, with a head of two layers": (
        *(lambda: RobertaForMaskedLM(ROBERTA), RobertaForSequenceClassification, IDS),
        {"task_type": "SEQ_CLS", "target_modules": ["query"]},
    ),
    "images, without a task": (
        *(lambda: ViTModel(VIT), ViTForImageClassification, IMAGE),
        {"target_modules": r".*\.(query|q_proj)", "modules_to_save": ["classifier"]},
    ),
}


def _with_weights(adapted):
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.3)
    return adapted.eval()


def test_the_revision_is_that_of_the_model_that_is_named():
    config = LoraConfig(base_model_name_or_path="me/base", revision="abc123", task_type="SEQ_CLS")
    head = {"base_model.model.classifier.weight": torch.zeros(3, 8)}
    adapter = SavedAdapter("adapter", config, {}, head)
    named, other = (model_section(name, adapter) for name in ("me/base", "me/copy"))
    assert (named.revision, other.revision) == ("abc123", None)
    assert named.n_labels == 3


@pytest.mark.parametrize("config_class", [LoraConfig, PiSSAConfig])
@pytest.mark.parametrize("case", CASES)
def test_the_class_is_the_one_that_was_adapted(run, tmp_path, case, config_class):
    make, kind, inputs, options = CASES[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    labels = {} if kind is BertModel else {"num_labels": 5}
    base = kind.from_pretrained(tmp_path / "base", **labels)
    adapted = _with_weights(get_peft_model(base, config_class(**LORA, **options)))
    adapted.save_pretrained(tmp_path / "adapter")

    done = run("inspect", tmp_path / "adapter", "--base", tmp_path / "base", "--json")
    assert done.code == 0, done.err
    arguments = ("export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    done = run(*arguments, "--target", "merged")
    assert done.code == 0, done.err
    merged = kind.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        got, want = merged(**inputs)[0], adapted(**inputs)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["merged", "peft"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True),
        PiSSAConfig(**LORA, target_modules=["q_proj"], use_dora=True),
        LoraConfig(**LORA, target_modules=["embed_tokens"]),
    ],
    ids=["DoRA", "ours with DoRA", "embeddings"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_whatever_can_be_merged_can_be_exported(run, tmp_path, config, target):
    """The update need be no product of factors of linear layers; that is for servers."""
    pico_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, copy.deepcopy(config))
    for name, p in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "magnitude" in name:
            nn.init.normal_(p, std=0.3)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    arguments = ("export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    done = run(*arguments, "--target", target)
    assert done.code == 0, done.err
    assert ("rank: " in done.out) == (target == "peft")
    if target == "merged":
        got = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    else:
        fresh = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        got = PeftModel.from_pretrained(fresh, tmp_path / "out").eval()
    with torch.no_grad():
        logits, want = got(**IDS).logits, adapted(**IDS).logits
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()(**IDS).logits
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, want, atol=1e-3)


def test_servers_know_no_dora_and_the_error_says_what_to_do(run, tmp_path):
    config = LoraConfig(**LORA, target_modules=["q_proj"], use_dora=True)
    get_peft_model(pico_llama(), config).save_pretrained(tmp_path / "adapter")
    done = run("export", tmp_path / "adapter", tmp_path / "out", "--target", "serving")
    assert done.code == 1
    assert "export --target merged" in " ".join(done.err.split())


@pytest.mark.parametrize("config_class", [LoraConfig, PiSSAConfig])
def test_a_merged_classifier_keeps_its_classes_and_its_padding(run, tmp_path, config_class):
    """A decoder classifies the last token that is no padding, and its checkpoint may not name that."""
    pico_llama().save_pretrained(tmp_path / "base")
    names = {0: "calm", 1: "glad", 2: "sad"}
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names)
    base.config.pad_token_id = None
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"]}
    adapted = _with_weights(get_peft_model(base, config_class(**LORA, **options)))
    base.config.pad_token_id = 0  # after the adapter was made, as `Trainer` does
    export_adapter(adapted, tmp_path / "adapter", rank=LORA["r"])
    arguments = ("export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    done = run(*arguments, "--target", "merged")
    assert done.code == 0, done.err
    merged = LlamaForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    assert merged.config.id2label == names
    assert merged.config.label2id["sad"] == 2


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_base_gets_the_tokens_that_were_added(run, tmp_path):
    torch.manual_seed(0)
    pico_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    n_tokens = base.config.vocab_size + 3
    base.resize_token_embeddings(n_tokens)
    config = LoraConfig(
        **LORA,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    adapted = _with_weights(get_peft_model(base, config))
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = ("export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    done = run(*arguments, "--target", "merged")
    assert done.code == 0, done.err
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = {"input_ids": torch.tensor([[0, n_tokens - 1, n_tokens - 2]])}
    torch.testing.assert_close(merged(**ids).logits, adapted(**ids).logits, rtol=1e-4, atol=1e-5)


def test_tokens_whose_output_layer_is_unknown_are_refused(run, tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    base.resize_token_embeddings(base.config.vocab_size + 3)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapted = get_peft_model(base, LoraConfig(**LORA, **options, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    arguments = ("export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base")
    done = run(*arguments, "--target", "merged")
    assert done.code == 1
    assert "lacks the output layer 'lm_head'" in " ".join(done.err.split())


def _edited(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def classifier(tmp_path):
    """A base model without a task, and an adapter with a head."""
    pico_llama().save_pretrained(tmp_path / "base")
    base = LlamaForTokenClassification.from_pretrained(tmp_path / "base", num_labels=5)
    config = LoraConfig(**LORA, task_type="TOKEN_CLS", target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("target", ["merged", "peft"])
def test_entries_without_a_place_in_the_base_are_not_lost(run, classifier, target):
    adapter, out = classifier / "adapter", classifier / "out"
    _edited(adapter, task_type="CAUSAL_LM")
    done = run("export", adapter, out, "--base", classifier / "base", "--target", target)
    assert done.code == 1
    assert "score" in done.err
    assert "would be lost" in " ".join(done.err.split())
    assert not out.exists()


def test_neither_adapter_nor_checkpoint_may_leave_the_class_open(run, classifier):
    _edited(classifier / "adapter", task_type=None, auto_mapping=None)
    path = classifier / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
    done = run("inspect", classifier / "adapter", "--base", classifier / "base")
    assert done.code == 1
    assert "no task_type and no class of Transformers" in " ".join(done.err.split())
