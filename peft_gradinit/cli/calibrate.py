"""`peft-gradinit calibrate`: a model, data, and a result directory."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from accelerate import PartialState

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..recipes import CalibrationSection, DataSection, MethodSection, ModelSection, section_of
from ..recipes.estimate import Estimate
from . import options
from .jobs import NO_DATA, Job, Place
from .output import Listing, console, human_bytes


def calibrate(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or embedded:pico-llama.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Hub name, folder, .jsonl, .json, .parquet, .csv, .txt, or embedded:docstrings."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the result.")] = None,
    method: Annotated[
        str, typer.Option(help=options.method_help(), rich_help_panel=options.ADAPTER)
    ] = "lora_ga",
    r: Annotated[int, typer.Option("--r", min=1, rich_help_panel=options.ADAPTER)] = 8,
    target_modules: Annotated[
        str,
        typer.Option(
            help="As in LoraConfig; several names are separated by commas.",
            rich_help_panel=options.ADAPTER,
        ),
    ] = "all-linear",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Further field of the method's config, KEY=VALUE; can be repeated.",
            rich_help_panel=options.ADAPTER,
        ),
    ] = None,
    task: options.Task = None,
    revision: Annotated[str | None, typer.Option(rich_help_panel=options.MODEL)] = None,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=options.MODEL)
    ] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="4bit or 8bit (bitsandbytes).", rich_help_panel=options.MODEL)
    ] = None,
    seed_of_head: Annotated[
        int, typer.Option(help="Of a new classification head.", rich_help_panel=options.MODEL)
    ] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="Default: the first accelerator.", rich_help_panel=options.MODEL),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Configuration of a Hub dataset.", rich_help_panel=options.DATA),
    ] = None,
    split: Annotated[str, typer.Option(rich_help_panel=options.DATA)] = "train",
    streaming: Annotated[
        bool,
        typer.Option(help="Read a Hub dataset without downloading.", rich_help_panel=options.DATA),
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Column, or template with {columns}.", rich_help_panel=options.DATA),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The same; without loss.", rich_help_panel=options.DATA)
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="The same; with loss.", rich_help_panel=options.DATA)
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(help="Column of chats, for the chat template.", rich_help_panel=options.DATA),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of classes.", rich_help_panel=options.DATA)
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a template.", rich_help_panel=options.DATA)
    ] = None,
    assistant_only_loss: Annotated[bool, typer.Option(rich_help_panel=options.DATA)] = False,
    max_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sequence.", rich_help_panel=options.DATA)
    ] = 1024,
    packing: Annotated[
        bool, typer.Option(help="Fill the sequences.", rich_help_panel=options.DATA)
    ] = False,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Budget. Default: 65,536.")] = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Budget.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Does not change the result.")] = 8,
    estimator: Annotated[
        str, typer.Option(help="sketch, or dense for exact statistics of small models.")
    ] = "sketch",
    seed: Annotated[int, typer.Option(help="Of the sketches.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Say what it would cost, and stop. Needs no weights, and without DATA takes "
            "sequences of --max-length tokens."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="That share the data, for --dry-run. Default: those launched."),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(min=0, help="Seconds between two saves of the unfinished sums; see --resume."),
    ] = 60.0,
    resume: Annotated[bool, typer.Option(help="Continue after a kill, to the same result.")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what a method needs, and keep it in a folder.

    The folder is what `calibration=` of a config takes: `LoraGAConfig(…, calibration="FOLDER")`.
    Under `accelerate launch -m peft_gradinit.cli calibrate …` every process reads its share.

    Try it without a network:

        peft-gradinit calibrate embedded:pico-llama embedded:docstrings out/calibration --max-tokens 4096

    What it would cost, from the config of a model alone:

        peft-gradinit calibrate configs/shapes/llama-3-70b --dry-run --processes 8
    """
    if not dry_run and (data is None or output is None):
        raise ConfigError(
            f"a calibration needs DATA and OUTPUT, got {data!r} and {str(output)!r}; only --dry-run "
            "can do without."
        )
    if method not in options.method_names():
        raise ConfigError(f"method must be one of {options.method_names()}, got {method!r}.")
    if estimator not in ("sketch", "dense"):
        raise ConfigError(f"estimator must be 'sketch' or 'dense', got {estimator!r}.")
    job = Job(
        model=section_of(
            ModelSection,
            name=model,
            task=task,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            seed=seed_of_head,
        ),
        data=section_of(
            DataSection,
            path=data or NO_DATA,
            name=name,
            split=split,
            streaming=streaming,
            text=text,
            prompt=prompt,
            completion=completion,
            messages=messages,
            label=label,
            chat_template=chat_template,
            assistant_only_loss=assistant_only_loss,
            max_length=max_length,
            packing=packing,
        ),
        method=section_of(
            MethodSection,
            name=method,
            r=r,
            target_modules=_names(target_modules),
            options=_options(option or []),
        ),
        calibration=CalibrationSection(
            max_tokens=max_tokens,
            max_batches=max_batches,
            batch_size=batch_size,
            estimator=estimator,
            seed=seed,
        ),
    )
    state = PartialState()
    where = _device(device or str(state.device or "cpu"))
    if dry_run:
        costs = job.estimate(where, processes or state.num_processes)
        if state.is_main_process:
            _show_estimate(costs, as_json)
        return
    assert output is not None  # noqa: S101 checked above
    place = Place(output, overwrite=overwrite, resume=resume, save_every=save_every)
    result = job.run(where, place, progress=state.is_main_process)
    if state.is_main_process:
        place.write(result, job)
        _show_result(result, output, job, as_json)
    state.wait_for_everyone()


def _show_estimate(costs: Estimate, as_json: bool) -> None:
    if as_json:
        Listing("", (), (), dataclasses.asdict(costs)).show(as_json=True)
        return
    facts = {
        "reads": f"{costs.n_sequences:,} sequences, {costs.n_tokens:,} tokens",
        "measures": f"{costs.n_targets:,} matrices",
        "memory": f"{human_bytes(costs.weight_bytes)} of weights, "
        f"{human_bytes(costs.statistic_bytes)} of statistics, about "
        f"{human_bytes(costs.activation_bytes)} of activations",
        "volume": f"{human_bytes(costs.result_bytes)} on disk",
        "between processes": _traffic(costs),
        "arithmetic": f"{costs.flops:.2e} FLOP, {costs.statistic_flops:.2e} of them for statistics",
        "time": f"about {costs.seconds:.3g} s at the speed measured here",
        "whole matrices instead": f"{human_bytes(costs.dense_bytes)} of statistics, "
        f"{human_bytes(costs.dense_summed_bytes)} summed, {costs.dense_flops:.2e} FLOP",
    }
    Listing("", (), (), facts).show(as_json=False)


def _traffic(costs: Estimate) -> str:
    if costs.n_processes == 1:
        return "nothing: one process"
    sent = costs.agreed_bytes + costs.broadcast_bytes
    return (
        f"{human_bytes(costs.summed_bytes)} summed, {human_bytes(sent)} broadcast, "
        f"{costs.n_processes} processes"
    )


def _show_result(result: CalibrationResult, output: Path, job: Job, as_json: bool) -> None:
    facts = dataclasses.asdict(result.facts)
    if as_json:
        Listing("", (), (), {"output": str(output), **facts, "failures": result.failures}).show(
            True
        )
        return
    loss = "" if result.facts.loss is None else f", loss {result.facts.loss:.4f}"
    name = type(job.config()).__name__
    console.print(
        f"{len(result.triplets)} layers from {result.facts.n_sequences:,} sequences "
        f"({result.facts.n_tokens:,} tokens; ended by {result.facts.stopped_by}){loss}, "
        f"{result.facts.seconds:.1f} s",
        highlight=False,
    )
    for layer, reason in result.failures.items():
        console.print(f"not measured: {layer}: {reason}", highlight=False)
    console.print(
        f"{name}(r={job.method.r}, target_modules={job.method.target_modules!r}, "
        f'calibration="{output}")',
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _names(text: str) -> str | list[str]:
    """Plain names become a list, in which PEFT looks for suffixes; else it is one regular expression."""
    if text == "all-linear" or not re.fullmatch(r"[\w.,]+", text):
        return text
    return text.split(",")


def _device(name: str) -> torch.device:
    """A device by its name.

    Args:
        name: from the command line.

    Returns:
        The device.

    Raises:
        ConfigError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--device {name!r} cannot be used here ({reason}); `peft-gradinit doctor` lists what "
            "can."
        ) from error
    return device


def _options(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE, the value as YAML.

    Args:
        pairs: from the command line.

    Returns:
        The values by key.

    Raises:
        ConfigError: if a pair has no `=`, or a value is not YAML.
    """
    return dict(map(_key_and_value, pairs))


def _key_and_value(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"--option takes KEY=VALUE, got {pair!r}.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--option {pair!r}: the value is not YAML: {reason}.") from error
