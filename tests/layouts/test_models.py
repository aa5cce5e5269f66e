"""Models that are not a plain stack of layers: shared and tied ones, two parts, images."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft_gradinit import load_for_training
from peft_gradinit.calibration.feed.tokens import loss_weight
from peft_gradinit.errors import CalibrationError, ConfigError
from tests.calibration.passes import FLOAT32, gradients, linears, worst_error
from tests.helpers import VOCABULARY, pico_llama, quiet, relative_error, token_batches
from tests.methods.rows import (
    INFO,
    config_of,
    every_method,
    with_data,
    with_gradients,
)

# What PEFT says of tied targets: merging would write to the embedding; saving copies it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

IMAGE = VOCABULARY - 1
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SEQ2SEQ = {"vocab_size": VOCABULARY, "d_model": 48}


def albert():
    config = AlbertConfig(**{**TEXT, "num_hidden_layers": 3, "embedding_size": 16})
    return AlbertForMaskedLM(config)


def t5():
    sizes = {"d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**SEQ2SEQ, **sizes, decoder_start_token_id=0))


def bart():
    parts = ("encoder", "decoder")
    sizes = {f"{p}_{k}": v for p in parts for k, v in {"layers": 2, "attention_heads": 4}.items()}
    sizes |= {f"{p}_ffn_dim": 64 for p in parts}
    return BartForConditionalGeneration(BartConfig(**SEQ2SEQ, **sizes, max_position_embeddings=64))


def vit():
    return ViTForImageClassification(ViTConfig(**VISION, num_labels=10))


def clip():
    text = {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))


def llava():
    vision, text = CLIPVisionConfig(**VISION), LlamaConfig(**TEXT)
    options = {"image_token_index": IMAGE, "image_seq_length": 4}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, **options)
    )


def translations():
    return [{**batch, "labels": batch["labels"].roll(1, 1)} for batch in token_batches()]


def photographs():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=generator),
            "labels": torch.randint(0, 10, (4,), generator=generator),
        }
        for _ in range(3)
    ]


def pairs():
    """Texts of an end token each, and images, for CLIP."""
    images = [batch["pixel_values"] for batch in photographs()]
    batches = []
    for batch, pixels in zip(token_batches(), images, strict=True):
        ids, mask = batch["input_ids"].clamp(min=3), batch["attention_mask"]
        ids[torch.arange(len(ids)), mask.sum(1) - 1] = 2
        batches.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    return batches


def captioned():
    """An image of four tokens before each text."""
    batches = []
    for batch, images in zip(token_batches(), photographs(), strict=True):
        n = len(images["pixel_values"])
        ids = torch.cat([torch.full((n, 4), IMAGE), batch["input_ids"].clamp(max=IMAGE - 1)], 1)
        labels = torch.cat([torch.full((n, 4), -100), batch["labels"].clamp(max=IMAGE - 1)], 1)
        mask = torch.cat([torch.ones(n, 4, dtype=torch.long), batch["attention_mask"]], 1)
        tokens = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append({**tokens, "pixel_values": images["pixel_values"]})
    return batches


def contrastive(model, batch):
    return model(**batch, return_loss=True).loss


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its data and how it is trained."""

    make: Callable[[], nn.Module]
    data: Callable[[], list[dict[str, Any]]]
    loss_fn: Callable | None = None
    exclude: str | None = None
    targets: str | list[str] = "all-linear"
    head: str | None = None

    def model(self):
        torch.manual_seed(0)
        return self.make().eval()

    def loss(self, model, batch):
        return model(**batch).loss if self.loss_fn is None else self.loss_fn(model, batch)

    def config(self, method, **options):
        values = {"task_type": None, "target_modules": self.targets, **options}
        if self.exclude:
            values.setdefault("exclude_modules", self.exclude)
        if INFO[method].needed() != "nothing":
            values.setdefault("calibration", quiet(self.data(), loss_fn=self.loss_fn))
        return config_of(method, **values)


def tied_llama():
    return pico_llama(tie_word_embeddings=True)


LAST_VISION_LAYER = r".*vision_tower.*layers\.2\..*"
"""Llava takes the features of the layer before the last, so that the last one is never used."""

LAYOUTS = {
    "shared": Case(albert, token_batches, head="predictions.decoder"),
    "tied": Case(tied_llama, token_batches, targets=["q_proj", "lm_head"], head="lm_head"),
    "encoder_decoder": Case(t5, translations, head="lm_head"),
    "vision": Case(vit, photographs),
    "two_towers": Case(clip, pairs, loss_fn=contrastive),
    "vision_language": Case(llava, captioned, exclude=LAST_VISION_LAYER),
}
MORE = {"bart": Case(bart, translations, head="lm_head")}
CASES = {**LAYOUTS, **MORE}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def untied(model, head):
    """With a head of its own, so that autograd's gradient is that of the head's use alone."""
    if head is not None:
        layer = model.get_submodule(head)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


def oracle(case):
    """Mean gradient of every linear layer that the loss reaches, by plain autograd."""
    model = untied(case.model(), case.head)
    modules, total, weight = linears(model), {}, 0
    for batch in case.data():
        n = loss_weight(model, batch)
        weights = [m.weight for m in modules.values()]
        loss = case.loss(model, batch) * n
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        for name, gradient in zip(modules, found, strict=True):
            if gradient is not None:
                total[name] = total.get(name, 0) + gradient
        weight += n
    transposed = {n for n, m in modules.items() if not isinstance(m, nn.Linear)}
    return {n: (g.T if n in transposed else g) / weight for n, g in total.items()}


def outputs(case, model):
    """The first output of float values on the first batch, in eval mode."""
    was_training = model.training
    with torch.no_grad():
        batch = case.data()[0]
        out = (
            model.eval()(**batch)
            if case.loss_fn is None
            else model.eval()(**batch, return_loss=True)
        )
    model.train(was_training)
    return out.logits if hasattr(out, "logits") else out.logits_per_image


def train(case, model, n=7):
    model.eval()  # without dropout, so that losses compare
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(n):
        loss = case.loss(model, case.data()[step % 3])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@every_case
@pytest.mark.parametrize("freeze", [False, True], ids=["trainable", "frozen"])
def test_captured_gradients_are_those_of_autograd(case, freeze):
    want = oracle(case)
    model = case.model()
    if freeze:
        model.requires_grad_(False)
    modules = {n: m for n, m in linears(model).items() if n in want}
    assert len(modules) > 4
    assert all(g.norm() > 0 for g in want.values())
    got = gradients(model, case.data(), modules, loss_fn=case.loss_fn)
    assert worst_error(got, want) < FLOAT32


@every_case
@every_method
def test_every_method_starts_trains_and_comes_back(method, case, tmp_path):
    model = case.model()
    peft_model = get_peft_model(model, case.config(method))
    base = outputs(case, case.model())
    kept = relative_error(outputs(case, peft_model), base) <= FLOAT32
    assert kept == INFO[method].preserves_output
    losses = train(case, peft_model)
    if method != "svfit":  # whose few numbers need a larger rate
        assert losses[-1] < losses[0]  # three batches: the last is the first
    trained = outputs(case, peft_model)
    assert relative_error(trained, base) > 10 * FLOAT32
    with peft_model.disable_adapter():
        assert torch.equal(outputs(case, peft_model), base)
    peft_model.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, load_for_training):
        again = load(case.model(), tmp_path)
        assert relative_error(outputs(case, again), trained) < FLOAT32


# Shared layers -----------------------------------------------------------------------------------


def test_a_layer_used_several_times_has_one_adapter():
    peft_model = get_peft_model(LAYOUTS["shared"].model(), LAYOUTS["shared"].config("lora_ga"))
    names = [line.name for line in peft_model.base_model.init_report["default"].modules]
    assert sum("attention.query" in name for name in names) == 1


@with_data
def test_tied_adapters_are_refused(method):
    with pytest.raises(ConfigError, match=r"ensure_weight_tying=True: tied adapters cannot have"):
        LAYOUTS["tied"].config(method, ensure_weight_tying=True)


@every_method
def test_a_tied_head_is_started_and_the_embedding_stays(method):
    case = LAYOUTS["tied"]
    peft_model = get_peft_model(case.model(), case.config(method))
    train(case, peft_model)
    base = peft_model.base_model.model
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base.lm_head.weight, tied_llama().lm_head.weight)


# Layers that the loss does not reach -------------------------------------------------------------


@with_gradients
def test_layers_that_the_loss_does_not_use_are_named(method):
    case = LAYOUTS["vision_language"]
    with pytest.raises(CalibrationError, match=r"could not calibrate 6 of") as raised:
        get_peft_model(case.model(), case.config(method, exclude_modules=None))
    message = str(raised.value)
    assert len(re.findall(r"vision_tower\.(?:vision_model\.)?encoder\.layers\.2\.", message)) == 6
    assert message.count("it never ran in 3 batches, or the loss does not use it") == 6
    assert "layers.1." not in message


def text_only():
    return [{k: v.clamp(max=IMAGE - 1) for k, v in b.items()} for b in token_batches()]


@with_data
def test_a_tower_that_never_runs_is_named(method):
    case, data = LAYOUTS["vision_language"], quiet(text_only())
    with pytest.raises(CalibrationError, match=r"could not calibrate 14 of") as raised:
        get_peft_model(case.model(), case.config(method, calibration=data))
    message = str(raised.value)
    assert message.count("vision_tower") == 12
    assert message.count("multi_modal_projector") == 2
    language = get_peft_model(
        case.model(),
        case.config(method, calibration=data, exclude_modules=r".*(vision_tower|projector).*"),
    )
    names = [line.name for line in language.base_model.init_report["default"].modules]
    assert all("language_model" in name for name in names)
    assert len(names) == 14


@with_gradients
def test_a_tower_run_without_gradients_is_named(method):
    """As many recipes do for a frozen tower."""
    case = LAYOUTS["vision_language"]
    model = case.model()
    tower = model.model.vision_tower
    forward = tower.forward
    tower.forward = lambda *args, **kwargs: torch.no_grad()(forward)(*args, **kwargs)
    with pytest.raises(CalibrationError, match=r"vision_tower.*ran without gradients"):
        get_peft_model(model, case.config(method))
    peft_model = get_peft_model(model, case.config(method, exclude_modules=r".*vision_tower.*"))
    assert train(case, peft_model)[-1] > 0


@with_gradients
def test_a_frozen_tower_can_have_a_plain_start(method):
    case = LAYOUTS["vision_language"]
    config = case.config(method, exclude_modules=None, uncalibrated="lora")
    with pytest.warns(UserWarning, match=r"gives 6 targets a plain LoRA start .*vision_tower"):
        peft_model = get_peft_model(case.model(), config)
    lines = peft_model.base_model.init_report["default"].modules
    assert sum(line.method == "lora" for line in lines) == 6


def test_batches_of_images_and_texts_are_not_cut():
    """Two sequences and two images: both may be of the first."""
    case = LAYOUTS["vision_language"]
    model, batch = case.model(), case.data()[0]
    first = {k: v[:1] for k, v in batch.items()}
    ids = torch.cat([torch.full((1, 4), IMAGE), first["input_ids"]], 1)
    mask = torch.ones_like(ids)
    other = torch.randint(1, IMAGE, ids.shape)
    two = {
        "input_ids": torch.cat([ids, other]),
        "attention_mask": torch.cat([mask, mask]),
        "labels": torch.cat([ids.masked_fill(ids == IMAGE, -100), other]),
        "pixel_values": batch["pixel_values"][:2],
    }
    data = quiet([two], max_tokens=5)
    config = case.config("lora_ga", calibration=data)
    report = get_peft_model(model, config).base_model.init_report["default"]
    assert report.facts.n_sequences == 2
    assert report.drift < FLOAT32
