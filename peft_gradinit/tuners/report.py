"""`InitReport`: what an initialisation did to each module, and what it cost."""

import dataclasses
import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from ..calibration import PassFacts
from .guidance import LearningRate


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """One module's line, or one expert's.

    Attributes:
        name: full name in the base model; of an expert, its parameter's with `[index]`.
        method: the method, or `"lora"` where it fell back to a plain start.
        r: rank of the adapter.
        requested_r: rank that the config asked for.
        captured_energy: share of the gradient's squared norm (EVA: of the inputs' variance) in the
            triplets used, 0 to 1.
        start_norm: `|s B0 A0|_F / |W|_F`.
        fallback: why the start is not the method's, or why the rank was lowered; empty if neither.
        learning_rate: to begin with for AdamW, from the factors' lengths; `None` for plain starts, and in
            reports of version 0.1.
    """

    name: str
    method: str
    r: int
    requested_r: int
    captured_energy: float | None
    start_norm: float
    fallback: str
    learning_rate: float | None = None


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """What the step that a method starts with does to the loss on the calibration data.

    Attributes:
        loss_before: of the base model.
        loss_after: at the start.
        scale: what the step was scaled by; 1 if it lowers the loss as it is.
    """

    loss_before: float
    loss_after: float
    scale: float


class ReportsByAdapter:
    """A tuner whose configs hold reports.

    Attributes:
        init_report: an `InitReport` by adapter name; absent for deferred adapters, and for loaded
            ones unless `load_for_training` brought it along.
    """

    peft_config: dict[str, Any]

    @property
    def init_report(self) -> dict[str, "InitReport"]:
        """Reports of this model's adapters, by adapter name."""
        reports = {n: getattr(c, "init_report", None) for n, c in self.peft_config.items()}
        return {name: report for name, report in reports.items() if report is not None}


@dataclasses.dataclass(frozen=True)
class InitReport:
    """What an initialisation did; prints as a table.

    Attributes:
        method: name of the method.
        modules: one line per target.
        facts: what happened during the pass.
        drift: relative change of the model's output on the first sequence, `|y - y0| / |y0|`;
            `None` if there was no data to measure it on.
        step: the built-in step's effect on the loss, for methods that take one and were given
            data; else `None`.
    """

    method: str
    modules: tuple[ModuleReport, ...]
    facts: PassFacts
    drift: float | None
    step: StepCheck | None = None

    def ranks(self) -> dict[str, int]:
        """The rank of every module, by full name; `json.dumps` takes it."""
        return {line.name: line.r for line in self.modules}

    @property
    def learning_rate(self) -> LearningRate | None:
        """Where to begin, the median over the ranks of all modules; `None` if none is known."""
        return LearningRate.of_layers((m.learning_rate, m.r) for m in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InitReport":
        """Undo `to_dict`."""
        return cls(
            method=values["method"],
            modules=tuple(ModuleReport(**line) for line in values["modules"]),
            facts=PassFacts(**values["facts"]),
            drift=values["drift"],
            step=StepCheck(**values["step"]) if values.get("step") else None,
        )

    def summary(self) -> str:
        """A few lines about the whole."""
        facts = self.facts
        rate = self.learning_rate
        drift = "not measured" if self.drift is None else f"{self.drift:.1e}"
        loss = "" if facts.loss is None else f", loss {facts.loss:.4f}"
        return (
            f"{self.method}: {len(self.modules)} modules from {facts.n_sequences:,} sequences "
            f"({facts.n_tokens:,} tokens, {facts.loss_weight:,.0f} with loss; ended by "
            f"{facts.stopped_by}){loss}\n"
            f"time {facts.seconds:.2f} s, statistics {facts.state_bytes / 2**20:.1f} MiB, peak memory "
            f"+{facts.peak_bytes / 2**20:.0f} MiB, drift of the output {drift}"
            + (f"\n{self._step()}" if self.step else "")
            + (f"\nlearning rate to begin with {rate}" if rate else "")
        )

    def _step(self) -> str:
        step = self.step
        if step is None:
            return ""
        scaled = "" if step.scale == 1 else f" (scaled by {step.scale:g})"
        return f"built-in step{scaled}: loss {step.loss_before:.4f} to {step.loss_after:.4f}"

    def table(self) -> Table:
        """The modules as a rich table; the experts of a parameter share a line, with medians."""
        table = Table(title=None, box=None, pad_edge=False)
        for column in ("module", "method"):
            table.add_column(column, overflow="fold")
        for column in ("r", "energy", "|sB0A0|/|W|"):
            table.add_column(column, justify="right")
        table.add_column("note", overflow="fold")
        for line in by_parameter(self.modules):
            energy = "" if line.captured_energy is None else f"{line.captured_energy:.1%}"
            table.add_row(
                line.name, line.method, str(line.r), energy, f"{line.start_norm:.3f}", line.fallback
            )
        return table

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        lines = (line.rstrip() for line in captured.get().splitlines())
        return self.summary() + "\n\n" + "\n".join(lines)


def by_parameter(lines: Iterable[ModuleReport]) -> list[ModuleReport]:
    """The lines, those of the experts of one parameter as one, with medians.

    Args:
        lines: one for each layer and expert.

    Returns:
        One for each layer and parameter, whose name ends with the range of its experts.
    """
    groups: dict[str, list[ModuleReport]] = {}
    for line in lines:
        is_expert = line.name.endswith("]")
        groups.setdefault(line.name.rpartition("[")[0] if is_expert else line.name, []).append(line)
    return [of[0] if of[0].name == name else _of_experts(name, of) for name, of in groups.items()]


def _of_experts(parameter: str, lines: list[ModuleReport]) -> ModuleReport:
    started = [line for line in lines if line.captured_energy is not None]
    first = next(iter(started), lines[0])
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line.fallback:
            index = line.name.removeprefix(parameter)
            reasons.setdefault(line.fallback, []).append(index)
    notes = [
        reason if len(which) == len(lines) else f"{', '.join(which)}: {reason}"
        for reason, which in reasons.items()
    ]
    energies = [line.captured_energy for line in started if line.captured_energy is not None]
    return dataclasses.replace(
        first,
        name=f"{parameter}[0-{len(lines) - 1}]",
        captured_energy=statistics.median(energies) if energies else None,
        start_norm=statistics.median(line.start_norm for line in started or lines),
        fallback="; ".join(notes),
    )
