"""The start of an adapter in the logs of a run."""

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..records import InitReport
from .optimizers import is_supervised

if TYPE_CHECKING:
    from transformers import Trainer

_PREFIX = "calibration"


def log_start(trainer: "Trainer", reports: Mapping[str, InitReport], *, report: bool) -> None:
    """Log what each start was: numbers for all, and ranks as a table where there is such a thing.

    Args:
        trainer: the trainer, in whose `state.log_history` the entries are in any case.
        reports: reports on the starts, by adapter name.
        report: whether they go to what `report_to` names.
    """
    history: list[Any] = trainer.state.log_history
    for name, start in reports.items():
        prefix = _PREFIX if len(reports) == 1 else f"{_PREFIX}/{name}"
        numbers = _numbers(start)
        if not is_supervised(trainer):  # for which no rate is suggested
            numbers.pop("learning_rate", None)
        entry = {f"{prefix}/{key}": value for key, value in numbers.items()}
        ranks = {f"{prefix}/ranks": start.ranks()}
        if report:
            trainer.log(dict(entry))
            history[-1].update(ranks)
            if trainer.is_world_process_zero():
                _tables(trainer, f"{prefix}/ranks", start)
        else:
            history.append({**entry, **ranks, "step": trainer.state.global_step})


def log_head_rate(trainer: "Trainer", rate: float, *, report: bool) -> None:
    """Log the rate that was found for the heads; `report` as in `log_start`."""
    entry = {f"{_PREFIX}/head_learning_rate": rate}
    if report:
        trainer.log(entry)
    else:
        trainer.state.log_history.append({**entry, "step": trainer.state.global_step})


def logged_rate(trainer: "Trainer", adapter_name: str) -> float | None:
    """The rate of an adapter's start that the run has logged; `None` if it has not."""
    keys = (f"{_PREFIX}/learning_rate", f"{_PREFIX}/{adapter_name}/learning_rate")
    found = [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
    return found[-1] if found else None


def _numbers(start: InitReport) -> dict[str, float]:
    """What a logger can draw; what the start lacks is left out."""
    energies = [m.captured_energy for m in start.modules if m.captured_energy is not None]
    rate = start.learning_rate
    numbers: dict[str, Any] = {
        "loss": start.facts.loss if start.facts else None,
        "loss_after_step": start.step.loss_after if start.step else None,
        "seconds": start.facts.seconds if start.facts else None,
        "tokens": start.facts.n_tokens if start.facts else None,
        "energy": statistics.mean(energies) if energies else None,
        "learning_rate": rate.suggested if rate else None,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _tables(trainer: "Trainer", name: str, start: InitReport) -> None:
    """Give TensorBoard and Weights & Biases the ranks; others have no tables."""
    found: list[Any] = list(trainer.callback_handler.callbacks)
    callbacks = {type(callback).__name__: callback for callback in found}
    board, wandb = callbacks.get("TensorBoardCallback"), callbacks.get("WandbCallback")
    if board is not None and board.tb_writer is not None:
        rows = [f"| {module} | {r} |" for module, r in start.ranks().items()]
        board.tb_writer.add_text(name, "\n".join(["| module | rank |", "|---|---:|", *rows]))
    if wandb is not None and wandb._wandb is not None:
        rows = [[module, r] for module, r in start.ranks().items()]
        wandb._wandb.log({name: wandb._wandb.Table(columns=["module", "rank"], data=rows)})
