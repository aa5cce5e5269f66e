"""What tells the unfinished sums of one job apart from those of another."""

import os

from peft_gradinit.recipes import CalibrationSection, DataSection, MethodSection, ModelSection
from peft_gradinit_cli.work.jobs import Job


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
    assert job(tmp_path).identity() == job(tmp_path).identity()
