"""Targets are the modules that PEFT itself would adapt; unservable ones are refused or named."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_gradinit import PiSSAConfig, SVFitConfig, load_for_training
from peft_gradinit.errors import TargetError
from peft_gradinit.linalg.product import frobenius_of_product
from peft_gradinit.records import records_of
from peft_gradinit.starts.targets import resolve_targets
from tests.helpers import (
    adapted,
    anchors,
    base_weights,
    logits,
    lora_ga,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    same_factors,
    same_weights,
    train_steps,
)

SELECTIONS = [
    {"target_modules": "all-linear"},
    {"target_modules": r".*layers\.1\..*(q|down)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: "-".join(s) + str(len(str(s))))
def test_targets_are_those_of_pefts_own_lora(selection):
    plain = get_peft_model(pico_llama(), LoraConfig(**selection, task_type="CAUSAL_LM"))
    ours = adapted(pico_llama(), lora_ga(**selection))
    assert ours.targeted_module_names == plain.targeted_module_names
    assert sorted(anchors(ours)) == sorted(plain.targeted_module_names)
    assert ours.peft_config["default"].target_modules == plain.peft_config["default"].target_modules
    frozen = {n for n, p in plain.named_parameters() if not p.requires_grad}
    assert {n for n, p in ours.named_parameters() if not p.requires_grad} == frozen


def test_finding_the_targets_changes_neither_model_nor_config():
    model, config = pico_llama(), lora_ga()
    before = base_weights(model)
    modules = [type(m) for m in model.modules()]
    resolve_targets(model, config)
    assert same_weights(before, base_weights(model))
    assert [type(m) for m in model.modules()] == modules
    assert config.target_modules == "all-linear"


def test_targets_that_match_nothing_give_pefts_error():
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        adapted(pico_llama(), lora_ga(target_modules=["q_pro"]))


@pytest.mark.parametrize(
    ("make", "targets"),
    [(pico_llama, ["q_proj", "embed_tokens"]), (pico_gpt2, ["c_attn", "wpe"])],
    ids=["llama", "gpt2"],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_embeddings_are_refused_or_start_plain_and_reload(make, targets, tmp_path):
    with pytest.raises(TargetError, match=r"starts linear layers.*Embedding"):
        adapted(make(), lora_ga(target_modules=targets))
    with pytest.warns(UserWarning, match=rf"{targets[1]}.*Embedding.*a plain LoRA start"):
        peft_model = adapted(make(), lora_ga(target_modules=targets, uncalibrated="lora"))
    assert relative_error(logits(peft_model), logits(make())) <= 1e-5
    lines = {line.name: line for line in peft_model.base_model.init_report["default"].modules}
    (embedding,) = [line for name, line in lines.items() if name.endswith(targets[1])]
    assert (embedding.method, embedding.start_norm) == ("lora", 0.0)
    assert "Embedding" in embedding.fallback
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


class Classifier(nn.Module):
    """A convolution and two linear layers, with a loss of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 16, 3)
        self.hidden = nn.Linear(16, 24)
        self.out = nn.Linear(24, 10)

    def forward(self, x):
        return self.out(self.hidden(self.conv(x).mean((2, 3)).relu()).relu())


def image_batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 6, 6, generator=generator), torch.arange(4) + i) for i in range(3)]


def image_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_convolutions_are_refused_or_start_plain_and_reload(tmp_path):
    options = {"target_modules": ["conv", "hidden"], "task_type": None}
    calibration = quiet(image_batches(), loss_fn=image_loss)
    with pytest.raises(TargetError, match=r"\{'conv': 'Conv2d'\}"):
        adapted(Classifier(), lora_ga(calibration=calibration, **options))
    config = lora_ga(calibration=calibration, uncalibrated="lora", **options)
    with pytest.warns(UserWarning, match="'conv': 'Conv2d'.*a plain LoRA start"):
        peft_model = adapted(Classifier(), config)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    for batch in image_batches():
        image_loss(peft_model, batch).backward()
        optimizer.step()
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Classifier(), tmp_path)
    x = image_batches()[0][0]
    assert relative_error(loaded(x), peft_model(x)) <= 1e-5
    assert relative_error(loaded(x), Classifier()(x)) > 1e-3


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.hidden = nn.Linear(8, 9)

    def forward(self, x):
        return self.hidden(self.conv(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("loaded_by", ["plain-peft", "load-for-training"])
@pytest.mark.filterwarnings("ignore:.*a plain LoRA start")
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_padding_of_a_grouped_convolution_goes_into_each_group(loaded_by, tmp_path):
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    calibration = quiet([(x, torch.arange(5))], loss_fn=image_loss)
    options = {"target_modules": ["conv", "hidden"], "task_type": None, "uncalibrated": "lora"}
    peft_model = adapted(Grouped(), lora_ga(calibration=calibration, **options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert relative_error(peft_model(x), Grouped()(x)) > 1e-2
    peft_model.save_pretrained(tmp_path)
    if loaded_by == "plain-peft":
        loaded = PeftModel.from_pretrained(Grouped(), tmp_path)
    else:
        loaded = load_for_training(Grouped(), tmp_path)
    assert relative_error(loaded(x), peft_model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("make", "target"),
    [(lambda: pico_llama(tie_word_embeddings=True), "q_proj"), (pico_gpt2, "c_attn")],
    ids=["llama", "gpt2"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_tied_head_is_started_and_the_embedding_stays(make, target, tmp_path):
    model = make()
    before, untouched = base_weights(model), logits(make())
    peft_model = adapted(model, lora_ga(target_modules=[target, "lm_head"]))
    assert "lm_head" in anchors(peft_model)
    assert relative_error(logits(peft_model), untouched) <= 1e-5
    train_steps(peft_model)
    assert same_weights(before, base_weights(peft_model))
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
@pytest.mark.filterwarnings("ignore:the calibration found fewer directions")
def test_patterns_of_lowered_ranks_match_that_layer_only():
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "x": nn.ModuleDict({"a": nn.Linear(40, 40)})})
    model.forward = lambda x: model["x"]["a"](x) + model["a"](x[..., :8]).mean()
    data = [(torch.randn(3, 40, generator=torch.Generator().manual_seed(i)),) for i in range(3)]
    calibration = quiet(data, loss_fn=lambda m, batch: m(batch[0]).square().mean())
    config = lora_ga(calibration=calibration, target_modules=["a"], r=6, task_type=None)
    peft_model = adapted(model, config)
    saved = config.saved_config(records_of(peft_model)["default"])
    assert saved.rank_pattern == {"^a": 4}
    assert peft_model.base_model.model["a"].r == {"default": 2}
    assert peft_model.base_model.model["x"]["a"].r == {"default": 6}


def test_modules_trained_in_full_by_another_adapter_are_off():
    peft_model = adapted(
        pico_llama(), lora_ga(target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    train_steps(peft_model)
    peft_model.add_adapter("second", lora_ga(target_modules=["v_proj"]))
    assert peft_model.base_model.init_report["second"].drift <= 1e-5
    alone = adapted(pico_llama(), lora_ga(target_modules=["v_proj"]))
    assert same_factors(anchors(peft_model, "second"), anchors(alone)), "the trained head was on"


def test_norm_of_a_product_needs_no_product():
    B, A = torch.randn(30, 3), torch.randn(3, 20)
    assert frobenius_of_product(B, A) == pytest.approx((B @ A).norm().item(), rel=1e-6)


@pytest.mark.parametrize("config_cls", [PiSSAConfig, SVFitConfig])
def test_a_layer_that_torch_reads_without_running_it_is_named(config_cls):
    layer = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True)
    config = config_cls(r=4, target_modules="all-linear")
    with pytest.warns(match=r"reads the weight of 0\.self_attn\.out_proj itself and never runs"):
        get_peft_model(nn.Sequential(layer), config)
