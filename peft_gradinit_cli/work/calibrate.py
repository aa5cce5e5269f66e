"""What `peft-gradinit calibrate` does."""

import dataclasses
from pathlib import Path
from typing import Any

from peft_gradinit.calibration import CalibrationResult
from peft_gradinit.errors import ConfigError
from peft_gradinit.layouts import process_state
from peft_gradinit.methods import METHODS
from peft_gradinit.recipes import Estimate
from peft_gradinit.records import LearningRate

from ..output import Listing, console, human_bytes, human_time, results_alone
from .arguments import Fields, device_of, job_of
from .jobs import Place


def run(
    *,
    model: Fields,
    data: Fields,
    method: Fields,
    calibration: Fields,
    place: Fields,
    device: str | None,
    processes: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure what a method needs, and keep it in a folder; or say what it would cost.

    Args:
        model: fields of the section.
        data: the same; the path can be missing from a dry run.
        method: the same, with targets and options as the command line has them.
        calibration: the same.
        place: fields of the place; the folder can be missing from a dry run.
        device: name of the device. Default: the first accelerator.
        processes: that would share the data of a dry run. Default: those that were launched.
        dry_run: say the costs and stop.
        as_json: print JSON.
    """
    _check(data["path"], place["folder"], method["name"], calibration["estimator"], dry_run)
    job = job_of(model=model, data=data, method=method, calibration=calibration)
    state = process_state()
    where = device_of(device or str(state.device or "cpu"))
    if dry_run:
        with results_alone():
            costs = job.estimate(where, processes or state.num_processes)
        if state.is_main_process:
            _show_estimate(costs, as_json)
        return
    there = Place(**place)
    with results_alone():
        result, measured = job.run(where, there, progress=state.is_main_process)
    if state.is_main_process:
        there.write(result, job)
    rate = job.learning_rate(measured, result)
    if state.is_main_process:
        config = {**job.said(measured), "calibration": str(there.folder)}
        _show_result(result, type(job.config()).__name__, config, rate, as_json)
    state.wait_for_everyone()


def _check(
    path: str | None, folder: Path | None, method: str, estimator: str, dry_run: bool
) -> None:
    if not dry_run and (path is None or folder is None):
        raise ConfigError(
            f"a calibration needs DATA and OUTPUT, got {path!r} and {str(folder)!r}; only --dry-run "
            "can do without."
        )
    names = [m.name for m in METHODS if m.needed() != "nothing"]
    if method not in names:
        raise ConfigError(f"method must be one of {names}, got {method!r}.")
    if estimator not in ("sketch", "dense"):
        raise ConfigError(f"estimator must be 'sketch' or 'dense', got {estimator!r}.")


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
        "time": f"{human_time(costs.seconds)} at the speed measured here",
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


def _show_result(
    result: CalibrationResult,
    name: str,
    config: dict[str, Any],
    rate: LearningRate | None,
    as_json: bool,
) -> None:
    facts = dataclasses.asdict(result.facts)
    if as_json:
        more = {"config": config, "learning_rate": rate.suggested if rate else None}
        facts = {"output": config["calibration"], **facts, "failures": result.failures, **more}
        Listing("", (), (), facts).show(True)
        return
    loss = "" if result.facts.loss is None else f", loss {result.facts.loss:.4f}"
    console.print(
        f"{len(result.readouts)} layers from {result.facts.n_sequences:,} sequences "
        f"({result.facts.n_tokens:,} tokens; ended by {result.facts.stopped_by}){loss}, "
        f"{human_time(result.facts.seconds)}",
        highlight=False,
    )
    for layer, reason in result.failures.items():
        console.print(f"not measured: {layer}: {reason}", highlight=False)
    arguments = ", ".join(f"{key}={value!r}" for key, value in config.items())
    lines = [f"{name}({arguments})"]
    if rate is not None:
        lines.append(
            f"learning_rate={rate.suggested:.1e}  # of AdamW, for this config's lora_alpha; "
            f"{rate.low:.1e} to {rate.high:.1e} are worth a try"
        )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
