"""PiSSA, OLoRA and PEFT's LoRA-GA, trained and converted: the same function on an untouched base."""

import json

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.loraga import preprocess_loraga

from peft_gradinit.analysis import convert, initial_update, recomputed_update, residual_update
from peft_gradinit.errors import AdapterError, ExportError
from peft_gradinit.records import read_adapter
from tests.helpers import logits, pico_gpt2, pico_llama, relative_error, token_batches, train_steps
from tests.saved.adapters import (
    logits_on_fresh_base,
    lora_config,
    overwriting_start,
    saved_lora,
)

pytestmark = [
    # PEFT's own: its converter cannot do rsLoRA with patterns, its hooks on a frozen first layer.
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]
SAME = 2e-5
"""Relative error of float32 logits: the two orders of summation differ by about 2e-6."""


def weight_of(model):
    modules = dict(model.named_modules())
    return lambda name: modules[name].weight.detach().float()


def converted(trained, start, folder, **options):
    return convert(trained, start, folder / "plain", **options)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_starts_from_the_weights_are_computed_again(tmp_path, start, use_rslora):
    config = lora_config(start, use_rslora=use_rslora, rank_pattern={"down_proj": 6})
    want, _ = overwriting_start(tmp_path, config)
    base = logits(pico_llama())
    trained = read_adapter(tmp_path / "trained")
    done = converted(trained, recomputed_update(trained, weight_of(pico_llama())), tmp_path)
    got = logits_on_fresh_base(tmp_path / "plain")
    assert relative_error(got, want) < SAME < 1e-2 < relative_error(base, want)
    assert set(done.ranks.values()) == {8, 12}
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert saved["use_rslora"] is False
    assert saved["lora_alpha"] == saved["r"] == 12


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_the_saved_start_serves_every_method(tmp_path, start):
    base, config = pico_llama(), lora_config(start)
    if start == "lora_ga":
        config = lora_config(start, lora_ga_config=peft.LoraGAConfig())
        preprocess_loraga(base, config, lambda: base(**token_batches()[0]).loss.backward())
    want, _ = overwriting_start(tmp_path, config, base)
    trained = read_adapter(tmp_path / "trained")
    converted(trained, initial_update(trained, read_adapter(tmp_path / "initial")), tmp_path)
    got = logits_on_fresh_base(tmp_path / "plain")
    assert relative_error(got, want) < SAME < 1e-3 < relative_error(logits(pico_llama()), want)


def test_the_overwritten_model_serves_peft_lora_ga(tmp_path):
    base = pico_llama()
    config = lora_config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(base, config, lambda: base(**token_batches()[0]).loss.backward())
    want, model = overwriting_start(tmp_path, config, base)
    trained = read_adapter(tmp_path / "trained")
    start = residual_update(trained, weight_of(pico_llama()), weight_of(model.unload()))
    converted(trained, start, tmp_path)
    assert relative_error(logits_on_fresh_base(tmp_path / "plain"), want) < SAME


def test_another_model_is_no_residual(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa"))
    trained = read_adapter(tmp_path / "trained")
    start = residual_update(trained, weight_of(pico_llama()), weight_of(pico_llama(seed=1)))
    with pytest.raises(AdapterError, match=r"differ in .* that rank 4 misses"):
        converted(trained, start, tmp_path)
    assert not (tmp_path / "plain").exists()


def test_conv1d_and_a_tied_head(tmp_path):
    config = LoraConfig(
        r=4, target_modules=["c_attn"], init_lora_weights="pissa", fan_in_fan_out=True
    )
    want, _ = overwriting_start(tmp_path, config, pico_gpt2())
    trained = read_adapter(tmp_path / "trained")
    modules = dict(pico_gpt2().named_modules())
    start = recomputed_update(trained, lambda name: modules[name].weight.detach().T)
    converted(trained, start, tmp_path)
    assert relative_error(logits_on_fresh_base(tmp_path / "plain", pico_gpt2()), want) < SAME


def test_bfloat16_differs_by_the_rounding_of_the_overwritten_weights(tmp_path):
    base = pico_llama().to(torch.bfloat16)
    want, _ = overwriting_start(tmp_path, lora_config("pissa"), base)
    trained = read_adapter(tmp_path / "trained")
    untouched = pico_llama().to(torch.bfloat16)
    converted(trained, recomputed_update(trained, weight_of(untouched)), tmp_path)
    got = logits_on_fresh_base(tmp_path / "plain", untouched)
    assert relative_error(got.float(), want.float()) < 2e-2


def test_truncation_says_what_it_loses(tmp_path):
    want, _ = overwriting_start(tmp_path, lora_config("pissa"))
    trained = read_adapter(tmp_path / "trained")
    start = recomputed_update(trained, weight_of(pico_llama()))
    done = converted(trained, start, tmp_path, rank=5)
    assert set(done.ranks.values()) == {5}
    for name, error in done.errors.items():
        exact = trained.layers[name].matrix() - start(name).matrix()
        kept = read_adapter(tmp_path / "plain").layers[name].matrix()
        assert 0 < error < 1
        assert relative_error(kept, exact) == pytest.approx(error, rel=1e-3)
    assert relative_error(logits_on_fresh_base(tmp_path / "plain"), want) < 0.5


def test_modules_trained_in_full_are_kept(tmp_path):
    config = lora_config("pissa", modules_to_save=["lm_head"])
    want, _ = overwriting_start(tmp_path, config)
    trained = read_adapter(tmp_path / "trained")
    assert trained.others
    converted(trained, recomputed_update(trained, weight_of(pico_llama())), tmp_path)
    assert relative_error(logits_on_fresh_base(tmp_path / "plain"), want) < SAME


def test_random_starts_and_untouched_bases_are_refused(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa_niter_2"))
    trained = read_adapter(tmp_path / "trained")
    with pytest.raises(AdapterError, match="cannot be computed again"):
        recomputed_update(trained, weight_of(pico_llama()))
    plain = read_adapter(saved_lora(tmp_path / "lora"))
    with pytest.raises(AdapterError, match="nothing to convert"):
        recomputed_update(plain, weight_of(pico_llama()))


def test_the_start_of_another_adapter_is_refused(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa"))
    trained = read_adapter(tmp_path / "trained")
    other = read_adapter(saved_lora(tmp_path / "r8", r=8))
    with pytest.raises(AdapterError, match="has rank 8 there and 4 here"):
        initial_update(trained, other)
    fewer = read_adapter(saved_lora(tmp_path / "fewer", target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="only one of them adapts"):
        initial_update(trained, fewer)


def test_what_is_there_is_kept(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa"))
    trained = read_adapter(tmp_path / "trained")
    start = recomputed_update(trained, weight_of(pico_llama()))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ExportError, match=r"thesis\.txt"):
            converted(trained, start, tmp_path, overwrite=overwrite)
    assert (tmp_path / "plain" / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["initial", "plain", "trained"]


def test_training_can_go_on_from_the_converted_adapter(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa"))
    trained = read_adapter(tmp_path / "trained")
    converted(trained, recomputed_update(trained, weight_of(pico_llama())), tmp_path)
    model = peft.PeftModel.from_pretrained(pico_llama(), tmp_path / "plain", is_trainable=True)
    losses = train_steps(model, 9, lr=1e-3)
    assert sum(losses[-3:]) < sum(losses[:3])  # the three batches, again
    again = get_peft_model(pico_llama(), lora_config())
    assert again.peft_config["default"].init_lora_weights is True


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_olora_on_weights_that_are_stored_the_other_way_needs_the_overwritten_base(tmp_path):
    """PEFT subtracts another matrix there than it starts from; the two bases tell which."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"transformer\.h\.\d+\.attn\.c_proj",
        init_lora_weights="olora",
        fan_in_fan_out=True,
    )
    want, model = overwriting_start(tmp_path, config, pico_gpt2())
    trained, initial = (read_adapter(tmp_path / name) for name in ("trained", "initial"))
    original, overwritten = dict(pico_gpt2().named_modules()), dict(model.named_modules())

    def weight(name):
        return original[name].weight.detach().T

    def residual(name):
        return overwritten[f"base_model.model.{name}"].base_layer.weight.detach().T

    for start in (
        lambda: initial_update(trained, initial),
        lambda: recomputed_update(trained, weight),
    ):
        with pytest.raises(AdapterError, match=r"store their weights \(in, out\).*--residual"):
            start()
    converted(trained, residual_update(trained, weight, residual), tmp_path)
    assert relative_error(logits_on_fresh_base(tmp_path / "plain", pico_gpt2()), want) < SAME


def test_random_factors_leave_nothing_to_convert(tmp_path):
    overwriting_start(tmp_path, lora_config(False))
    trained, initial = (read_adapter(tmp_path / name) for name in ("trained", "initial"))
    with pytest.raises(AdapterError, match=r"starts from random factors .* nothing to convert"):
        initial_update(trained, initial)
