"""The card: what it says, what it keeps, what it never says; and the picture in it."""

import builtins
import json
import os

import pytest
import torch
import yaml
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from peft_gradinit import PiSSAConfig, SVFitConfig, load_for_training
from peft_gradinit.errors import AdapterError
from peft_gradinit.records.card import complete_card
from peft_gradinit.records.hub import hub_id
from peft_gradinit.records.picture import draw_layers
from peft_gradinit.records.publishing import published, unsaved
from tests.exports import config, trained
from tests.helpers import logits, pico_llama, quiet, token_batches, train_steps


def saved(directory, method="lora_ga", name="default", model=None, **options):
    peft_model = trained(method, model, name, **options)
    peft_model.save_pretrained(directory)
    return peft_model


def card(directory):
    return ModelCard.load(directory / "README.md")


def test_saving_writes_the_whole_card(tmp_path):
    saved(tmp_path, "lora_one")
    text = card(tmp_path).text
    assert text.startswith("\n# LoRA-One adapter\n")
    assert "| built-in step | loss 4.57" in text
    assert "| captured energy by layer | median " in text
    assert "More Information Needed" not in text
    assert (tmp_path / "gradinit.png").exists()


def test_rank_of_lora_ga_is_explained(tmp_path):
    saved(tmp_path)
    assert "| rank | 8: the 4 that were trained, and as many that subtract" in card(tmp_path).text


def test_saving_again_changes_nothing(tmp_path):
    peft_model = saved(tmp_path)
    before = (tmp_path / "README.md").read_text()
    peft_model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == before


def test_a_card_that_somebody_filled_in_is_kept(tmp_path):
    template = ModelCard.from_template(ModelCardData(license="mit"), model_summary="Writes odes.")
    template.save(tmp_path / "README.md")
    saved(tmp_path)
    done = card(tmp_path)
    assert "Writes odes." in done.text
    assert done.data.license == "mit"
    assert "**LoRA-GA** ([arXiv:2407.05000]" in done.text
    assert done.text.index("## LoRA-GA") < done.text.index("### Framework versions")


def test_what_is_ours_goes_and_what_is_not_stays(tmp_path):
    template = ModelCard.from_template(ModelCardData(license="mit"), model_summary="Writes odes.")
    template.save(tmp_path / "README.md")
    saved(tmp_path, "lora_one")
    unsaved(tmp_path)
    assert not {"gradinit.json", "gradinit.png"} & {path.name for path in tmp_path.iterdir()}
    done = card(tmp_path)
    assert "Writes odes." in done.text
    assert done.data.license == "mit"
    assert "LoRA-One" not in done.text
    assert not {"peft_gradinit", "lora-one"} & set(done.data.tags)
    unsaved(tmp_path)  # nothing is there to be removed
    assert card(tmp_path).text == done.text


def test_a_card_with_nothing_else_goes(tmp_path):
    saved(tmp_path, "lora_one")
    (tmp_path / "gradinit.json").write_text("damaged")
    unsaved(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_local_base_is_not_named_but_stays_loadable(tmp_path):
    pico_llama().save_pretrained(tmp_path / "secret-base")
    base = type(pico_llama()).from_pretrained(tmp_path / "secret-base")
    peft_model = saved(tmp_path / "out", model=base.eval())
    for name in ("README.md", "gradinit.json"):
        assert "secret-base" not in (tmp_path / "out" / name).read_text()
    # As with PEFT: AutoPeftModel finds the local base. It goes when the directory is published.
    config_of = LoraConfig.from_pretrained
    assert config_of(tmp_path / "out").base_model_name_or_path == str(tmp_path / "secret-base")
    published(tmp_path / "out", "me/adapter")
    assert config_of(tmp_path / "out").base_model_name_or_path is None
    assert 'from_pretrained(model, "me/adapter")' in card(tmp_path / "out").text
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "out")
    assert torch.allclose(logits(plain), logits(peft_model), atol=1e-6)


def test_adapters_that_are_saved_one_by_one_keep_their_base(tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    base = type(pico_llama()).from_pretrained(tmp_path / "base")
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base.eval(), PiSSAConfig(**options), "one")
    model.add_adapter("two", PiSSAConfig(**options))
    for name in ("one", "two", "two"):
        model.save_pretrained(tmp_path / "out", selected_adapters=[name])
    configs = [LoraConfig.from_pretrained(tmp_path / "out" / name) for name in ("one", "two")]
    assert {one.base_model_name_or_path for one in configs} == {str(tmp_path / "base")}
    assert all(f'subfolder="{name}"' in card(tmp_path / "out").text for name in ("one", "two"))


@pytest.mark.parametrize("way", ["transformers", "by hand", "by hand, of the folder's name"])
def test_the_readme_of_a_project_is_left_alone(way, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    folder = tmp_path / "out"
    config = PiSSAConfig(r=4, target_modules=["q_proj"])
    if way == "transformers":
        model = pico_llama()
        model.add_adapter(config)
        model.save_pretrained(folder)
    else:
        model = get_peft_model(pico_llama(), config, "out" if "name" in way else "default")
        tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(folder)
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert (folder / "gradinit.json").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "gradinit.json", "README.md"])
def test_a_fifo_in_place_of_a_file_is_not_opened(file, tmp_path):
    saved(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    with pytest.raises((AdapterError, OSError), match="is a FIFO"):
        published(tmp_path)


def test_checkpoints_in_a_published_directory_stay_as_they_are(tmp_path):
    pico_llama().save_pretrained(tmp_path / "base")
    base = type(pico_llama()).from_pretrained(tmp_path / "base").eval()
    peft_model = trained("lora_ga", base)
    peft_model.save_pretrained(tmp_path / "out")
    peft_model.save_pretrained(tmp_path / "out" / "checkpoint-1")
    checkpoint = tmp_path / "out" / "checkpoint-1"
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    published(tmp_path / "out", "me/adapter")
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert "me/adapter" in card(tmp_path / "out").text


def test_cards_of_two_adapters_have_a_section_each(tmp_path):
    peft_model = trained("lora_ga")
    peft_model.add_adapter("german", config("lora_ga", r=2))
    peft_model.save_pretrained(tmp_path)
    text = card(tmp_path).text
    assert text.count("## LoRA-GA") == 2
    assert 'subfolder="german"' in text
    assert "](german/gradinit.png)" in text


def test_compact_form_says_what_it_needs(tmp_path):
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    get_peft_model(pico_llama(), SVFitConfig(**options, save_format="compact")).save_pretrained(
        tmp_path
    )
    text = card(tmp_path).text
    assert "compact form that needs `peft_gradinit`" in text
    assert "import peft_gradinit" in text


def test_plain_peft_adapters_get_no_section(tmp_path):
    trained("lora").save_pretrained(tmp_path)
    assert "peft_gradinit" not in card(tmp_path).text
    complete_card(tmp_path)
    assert "peft_gradinit" not in card(tmp_path).text


def test_dataset_is_named_where_it_is_known(tmp_path):
    rows = [
        {"input_ids": row.tolist(), "labels": row.tolist()}
        for row in token_batches(8, 8, 12)[0]["input_ids"]
    ]
    url = "hf://datasets/someone/odes@0123abc/data/train-00000.parquet"
    info = DatasetInfo(download_checksums={url: {"num_bytes": 1, "checksum": None}})
    data = Dataset.from_list(rows, info=info)
    peft_model = get_peft_model(pico_llama(), config("lora_ga", calibration=quiet(data)))
    peft_model.save_pretrained(tmp_path)
    assert card(tmp_path).data.datasets == ["someone/odes"]


def test_resumed_adapter_keeps_its_facts(tmp_path):
    saved(tmp_path / "first", "eva")
    live = load_for_training(pico_llama(), tmp_path / "first")
    train_steps(live, 1)
    live.save_pretrained(tmp_path / "second")
    first, second = card(tmp_path / "first").text, card(tmp_path / "second").text
    assert second == first


def test_metadata_is_valid_and_has_each_tag_once(tmp_path):
    base = pico_llama()
    base.add_model_tags(["poetry"])
    saved(tmp_path, model=base)
    front = (tmp_path / "README.md").read_text().split("---")[1]
    data = yaml.safe_load(front)
    assert data["library_name"] == "peft"
    assert data["tags"] == sorted(set(data["tags"]))
    assert {"lora", "lora-ga", "peft_gradinit", "poetry", "transformers"} <= set(data["tags"])
    assert "base_model" not in data


@pytest.mark.parametrize("method", ["lora_ga", "svfit"])
def test_tags_reach_cards_that_others_write(method):
    base = pico_llama()
    base.add_model_tags(["poetry"])
    peft_model = trained(method, base)
    title = {"lora_ga": "lora-ga", "svfit": "svfit"}[method]
    assert peft_model.model_tags == ["poetry", "lora", title, "peft_gradinit"]
    assert base.model_tags == ["poetry"]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("gpt2", "gpt2"),
        ("me/model", "me/model"),
        ("/home/me/model", None),
        ("./model", None),
        ("a/b/c", None),
        ("", None),
        (None, None),
    ],
)
def test_names_on_the_hub_are_told_from_paths(name, known, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_id(name) == known
    if known:
        (tmp_path / name).mkdir(parents=True)
        assert hub_id(name) is None  # transformers would load the directory


RANKS = {
    f"model.layers.{i}.self_attn.{n}_proj": r for i in range(3) for n, r in (("q", 4), ("k", i))
}


def test_picture_is_drawn_where_layers_differ(tmp_path):
    energy = dict.fromkeys(RANKS, 0.5)
    assert draw_layers(tmp_path / "both.png", RANKS, energy, "title")
    assert draw_layers(tmp_path / "ranks.png", RANKS, dict.fromkeys(RANKS), "title")
    assert (tmp_path / "both.png").stat().st_size < 60_000
    assert not draw_layers(tmp_path / "none.png", dict.fromkeys(RANKS, 4), {}, "title")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both.png", "ranks.png"]


def axes_drawn(ranks, energy, folder, monkeypatch):
    from matplotlib.figure import Figure

    kept, savefig = [], Figure.savefig

    def keep(self, path, **options):
        kept.extend(self.axes)
        savefig(self, path, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert draw_layers(folder / "x.png", ranks, energy, "title")
    assert [path.name for path in folder.iterdir()] == ["x.png"]
    return kept


def rows_drawn(ranks, folder, monkeypatch):
    """Rows of the map by kind."""
    axis = axes_drawn(ranks, {}, folder, monkeypatch)[0]
    kinds = [label.get_text() for label in axis.get_yticklabels()]
    return dict(zip(kinds, axis.images[0].get_array().tolist(), strict=True))


def test_what_is_not_captured_is_apart_on_a_log_axis(tmp_path, monkeypatch):
    energy = {n: 0.99 if "q_proj" in n else 0.9999 for n in RANKS}
    energy["model.layers.2.self_attn.k_proj"] = 1.0
    _, left_out, *_ = axes_drawn(RANKS, energy, tmp_path, monkeypatch)
    assert left_out.get_yscale() == "log"
    drawn = {line.get_label(): list(line.get_ydata()) for line in left_out.lines}
    assert drawn == {
        "self_attn.q_proj": pytest.approx([1e-2] * 3),
        "self_attn.k_proj": pytest.approx([1e-4, 1e-4, 1e-6]),
    }
    assert left_out.get_title() == "energy not captured by the start"


def test_picture_shows_every_layer(tmp_path, monkeypatch):
    drawn = rows_drawn(RANKS, tmp_path, monkeypatch)
    assert drawn == {"self_attn.q_proj": [4, 4, 4], "self_attn.k_proj": [0, 1, 2]}


def test_kinds_that_end_alike_have_lines_of_their_own_and_experts_are_averaged(
    tmp_path, monkeypatch
):
    ranks = {f"bert.layer.{i}.attention.output.dense": 1 + i for i in range(2)}
    ranks |= {f"bert.layer.{i}.output.dense": 5 + i for i in range(2)}
    ranks |= {f"bert.layer.{i}.experts.{j}.up": 2 * i + j for i in range(2) for j in (0, 2)}
    assert rows_drawn(ranks, tmp_path, monkeypatch) == {
        "attention.output.dense": [1, 2],
        "layer.output.dense": [5, 6],
        "experts.up": [1, 3],
    }


def test_saving_works_without_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    saved(tmp_path)
    assert not (tmp_path / "gradinit.png").exists()
    assert "gradinit.png" not in card(tmp_path).text
    assert json.loads((tmp_path / "gradinit.json").read_text())["method"] == "LoRA-GA"
