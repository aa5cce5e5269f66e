"""Intruder dimensions: planted ones are found, and the mitigated adapter has them scaled."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_gradinit.analysis import find_intruders, mitigated_updates
from peft_gradinit.errors import AdapterError, ConfigError
from peft_gradinit.linalg import Factors, truncated_svd
from peft_gradinit.records import read_adapter, write_adapter
from tests.helpers import pico_llama, relative_error
from tests.saved.adapters import lora_config, overwriting_start, saved_lora


def weight_of(model):
    modules = dict(model.named_modules())
    return lambda name: modules[name].weight.detach().float()


def planted(folder, strength):
    """An adapter of rank 1 per layer, its direction spread evenly over the base's left vectors."""
    adapter, weight = read_adapter(saved_lora(folder / "lora")), weight_of(pico_llama())
    layers = {}
    for name in adapter.layers:
        base = truncated_svd(weight(name), min(weight(name).shape))
        u = base.U.sum(dim=1) / len(base.S) ** 0.5
        v = base.Vh.sum(dim=0) / len(base.S) ** 0.5
        layers[name] = Factors(v[None], strength * base.S[0] * u[:, None])
    write_adapter(folder / "planted", adapter, layers)
    return read_adapter(folder / "planted"), weight


def test_a_planted_direction_is_found_and_removed(tmp_path):
    adapter, weight = planted(tmp_path, strength=20.0)
    lines = find_intruders(adapter, weight)
    assert all(line.positions == (1,) for line in lines)
    write_adapter(tmp_path / "mitigated", adapter, mitigated_updates(lines))
    mitigated = read_adapter(tmp_path / "mitigated")
    for line in lines:
        tuned = weight(line.name) + adapter.layers[line.name].matrix()
        first = truncated_svd(tuned, 1)
        want = tuned - first.matrix()
        got = weight(line.name) + mitigated.layers[line.name].matrix()
        assert relative_error(got, want) < 1e-4
    assert not any(line.positions for line in find_intruders(mitigated, weight, top=1))


def test_a_factor_scales_and_one_keeps(tmp_path):
    adapter, weight = planted(tmp_path, strength=20.0)
    for factor in (0.5, 1.0):
        for line in find_intruders(adapter, weight, factor=factor):
            tuned = weight(line.name) + adapter.layers[line.name].matrix()
            want = tuned + (factor - 1) * truncated_svd(tuned, 1).matrix()
            assert relative_error(weight(line.name) + line.mitigated.matrix(), want) < 1e-4


def test_small_updates_have_no_intruders(tmp_path):
    adapter, weight = planted(tmp_path, strength=1e-3)
    lines = find_intruders(adapter, weight, top=3)
    assert not any(line.positions for line in lines)
    assert all(line.mitigated is adapter.layers[line.name] for line in lines)


def test_the_mitigated_adapter_loads_as_plain_lora(tmp_path):
    adapter, weight = planted(tmp_path, strength=20.0)
    lines = find_intruders(adapter, weight, factor=0.25, rank=1)
    assert all(line.mitigated.r == 1 and line.error < 1 for line in lines)
    write_adapter(tmp_path / "out", adapter, mitigated_updates(lines))
    model = PeftModel.from_pretrained(pico_llama(), tmp_path / "out")
    merged = dict(model.merge_and_unload().named_modules())
    for line in lines:
        want = weight(line.name) + line.mitigated.matrix()
        assert relative_error(merged[line.name].weight, want) < 1e-5


def test_bad_options_and_overwritten_bases_are_refused(tmp_path):
    adapter, weight = planted(tmp_path, strength=1.0)
    for options in ({"top": 0}, {"threshold": 0.0}, {"factor": 1.5}):
        with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
            find_intruders(adapter, weight, **options)
    overwriting_start(tmp_path, lora_config("pissa"))
    with pytest.raises(AdapterError, match="convert"):
        find_intruders(read_adapter(tmp_path / "trained"), weight)
    assert torch.is_tensor(weight("model.layers.0.self_attn.q_proj"))


@pytest.mark.filterwarnings("ignore:.*MultiheadAttention")
def test_the_two_layers_of_an_attention_keep_one_rank(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"att": nn.MultiheadAttention(16, 2), "other": nn.Linear(16, 16)})

    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["att"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    names = sorted(adapter.layers)
    assert len(names) == 2
    shapes = {n: (u.B.shape[0], u.A.shape[1]) for n, u in adapter.layers.items()}
    layers = {
        n: Factors(torch.ones(i + 3, shapes[n][1]), torch.ones(shapes[n][0], i + 3))
        for i, n in enumerate(names)
    }
    write_adapter(tmp_path / "written", adapter, layers)
    got = read_adapter(tmp_path / "written").layers
    assert {update.r for update in got.values()} == {4}
    for name, update in layers.items():
        assert relative_error(got[name].matrix(), update.matrix()) < 1e-6
    loaded = PeftModel.from_pretrained(base(), tmp_path / "written")
    assert loaded.base_model.model["att"].r["default"] == 4
