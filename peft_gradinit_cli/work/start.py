"""What `peft-gradinit start` does."""

import json
import math
import shlex
from pathlib import Path
from typing import cast

import yaml

from peft_gradinit.errors import ConfigError
from peft_gradinit.export import check_directory, export_adapter
from peft_gradinit.layouts import process_state
from peft_gradinit.methods import METHODS
from peft_gradinit.records import InitReport, init_report
from peft_gradinit.starts import GradInitConfig

from ..output import Listing, console, results_alone
from .arguments import Fields, device_of, job_of

CONTINUED = {
    "PEFT": """\
PeftModel.from_pretrained(model, {python}, is_trainable=True)
TrainingArguments(learning_rate={rate})""",
    "LLaMA-Factory": """\
adapter_name_or_path: {yaml}
learning_rate: {rate}""",
    "axolotl": """\
lora_model_dir: {yaml}
learning_rate: {rate}""",
    "ms-swift": "--adapters {shell} --learning_rate {rate}",
    "unsloth": """\
FastLanguageModel.from_pretrained({python})
SFTConfig(learning_rate={rate})""",
}
"""How training continues from a saved adapter, by framework; lines to paste.

The folder is written as the language of the line has it: Python, YAML, or a shell's.
"""


def run(
    *,
    model: Fields,
    data: Fields,
    method: Fields,
    calibration: Fields,
    folder: Path,
    overwrite: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Compute a start and save it as a plain LoRA adapter that any framework continues from.

    Args:
        model: fields of the section.
        data: the same.
        method: the same, with targets and options as the command line has them.
        calibration: the same.
        folder: of the adapter.
        overwrite: replace an adapter that is there.
        device: name of the device. Default: the first accelerator.
        as_json: print JSON.
    """
    _check_method(method["name"])
    check_directory(folder, overwrite=overwrite)
    job = job_of(model=model, data=data, method=method, calibration=calibration)
    state = process_state()
    where = device_of(device or str(state.device or "cpu"))
    with results_alone():
        peft_model = job.start(where, progress=state.is_main_process)
    if state.is_main_process:
        export_adapter(peft_model, folder, overwrite=overwrite)
        _show(cast("InitReport", init_report(peft_model)), folder, as_json)
    state.wait_for_everyone()


def _check_method(name: str) -> None:
    """Refuse methods whose saved form is another adapter than the one that they train.

    Args:
        name: of the method.

    Raises:
        ConfigError: if there is no such method, or a plain adapter would be another run.
    """
    kinds = {m.name: m for m in METHODS}
    plain = [
        n for n, kind in kinds.items() if issubclass(kind, GradInitConfig) and not kind.anchored
    ]
    if name in plain:
        return
    if name not in kinds:
        raise ConfigError(f"method must be one of {plain}, got {name!r}.")
    kind = kinds[name]
    config = kind.__name__
    trained = "two factors of r ranks and keeps their start fixed beside them"
    if not kind.anchored:
        trained = "r numbers a layer, and both factors of a plain LoRA would train"
    raise ConfigError(
        f"{kind.method} trains {trained}; a framework that continues from its plain adapter would "
        f"train something else. Use one of {plain}, or {config} itself: the documentation says how, "
        "under 'Other frameworks'."
    )


def _show(report: InitReport, folder: Path, as_json: bool) -> None:
    rate = report.learning_rate
    if as_json:
        facts = {"output": str(folder), "learning_rate": rate and rate.suggested}
        facts |= {"method": report.method, "ranks": report.ranks(), "drift": report.drift}
        Listing("", (), (), facts).show(as_json=True)
        return
    for line in (report.summary(), "", f"written: {folder}, a plain LoRA adapter"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for name, lines in CONTINUED.items():
        console.print(f"\n[bold]{name}[/]")
        text = lines.format(**_written(str(folder)), rate=f"{rate.suggested:.1e}" if rate else "")
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _written(text: str) -> dict[str, str]:
    """A text by the languages of `CONTINUED`."""
    return {
        "python": json.dumps(text, ensure_ascii=False),
        "yaml": yaml.safe_dump(text, allow_unicode=True, width=math.inf).splitlines()[0],
        "shell": shlex.quote(text),
    }
