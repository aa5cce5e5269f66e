"""What tells the unfinished sums of one job apart from those of another."""

import os

import datasets
import pytest
from PIL import Image

from peft_gradinit.recipes import CalibrationSection, DataSection, MethodSection, ModelSection
from peft_gradinit_cli.work.jobs import Job
from tests.recipes.images import save_vit


def job(path, dtype="float32"):
    return Job(
        ModelSection(name="embedded:pico-llama", dtype=dtype),
        DataSection(path=str(path)),
        MethodSection(name="lora_ga"),
        CalibrationSection(),
    )


def test_sums_of_a_changed_file_or_another_dtype_are_not_continued(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "one"}')
    before = job(file).identity()
    assert job(file).identity() == before
    assert job(file, "bfloat16").identity() != before  # whose weights have the same hashes
    file.write_text('{"text": "two"}')
    os.utime(file, ns=(1, 1))
    assert job(file).identity() != before


def test_sums_of_a_changed_folder_are_not_continued(tmp_path):
    (tmp_path / "train").mkdir()
    file = tmp_path / "train" / "data.jsonl"
    file.write_text('{"text": "one"}')
    before = job(tmp_path).identity()
    assert job(tmp_path).identity() == before
    os.utime(file, ns=(1, 1))
    assert job(tmp_path).identity() != before


def test_data_of_the_hub_have_their_name_alone():
    assert job("someone/data").identity() == job("someone/data").identity()
    assert job("someone/data").identity() != job("someone/other").identity()


@pytest.mark.parametrize(("budget", "n"), [((), 128), (("--max-batches", 3), 24)])
def test_a_dry_run_reads_as_many_images_as_the_pass(budget, n, run, tmp_path):
    save_vit(tmp_path / "model")
    images = [Image.effect_noise((16, 16), 50) for _ in range(140)]
    rows = [{"image": image, "label": i % 3} for i, image in enumerate(images)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    more = ("--r", 2, "--target-modules", "query,value,q_proj,v_proj", *budget, "--json")
    arguments = ("calibrate", tmp_path / "model", tmp_path / "data", tmp_path / "out", *more)
    facts = run(*arguments)
    assert facts.code == 0, facts.err
    costs = run(*arguments, "--dry-run").json
    assert costs["n_sequences"] == facts.json["n_sequences"] == n
    assert costs["n_tokens"] == facts.json["n_tokens"]
    bare = run("calibrate", tmp_path / "model", "--dry-run", *more).json
    assert bare["n_sequences"] == n
