"""`InitReport`: the start of each module, and the cost of computing it."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..calibration import PassFacts
from .table import as_text, table_of

if TYPE_CHECKING:
    from rich.table import Table

FACTOR = 2.0
"""The best rate lay within this factor of the suggestion for LoRA, and for LoRA-GA starts as long
as LoRA's; for other methods within a factor of 3.4 (SVFit 8)."""


class LearningRate(NamedTuple):
    """A learning rate for AdamW.

    Attributes:
        suggested: the rate to begin with.
        low: lower end of a search; the rate for long runs.
        high: upper end of a search.
    """

    suggested: float
    low: float
    high: float

    @classmethod
    def of_layers(cls, layers: Iterable[tuple[float | None, int]]) -> "LearningRate | None":
        """One rate for all layers: the median, each layer counted as often as it has ranks.

        Args:
            layers: rate and rank of each; layers without a rate are left out.

        Returns:
            The rate and the range to search; `None` if no layer has a rate.
        """
        rates = [rate for rate, r in layers if rate is not None for _ in range(r)]
        if not rates:
            return None
        rate = statistics.median(rates)
        return cls(rate, rate / FACTOR, rate * FACTOR)

    def __str__(self) -> str:
        return f"{self.suggested:.1e} ({self.low:.1e} to {self.high:.1e})"


@dataclasses.dataclass(frozen=True)
class ModuleReport:
    """The report on one module, or on one expert.

    Attributes:
        name: full name in the base model; for an expert, its parameter's name with `[index]`.
        method: the method, or `"lora"` for a plain start in its place.
        r: rank of the adapter.
        requested_r: rank that the config asked for.
        captured_energy: share of the gradient's squared norm (EVA: of the inputs' variance) in the
            triplets used, 0 to 1.
        start_norm: `|s B0 A0|_F / |W|_F`.
        fallback: why the start is not the method's, or why the rank was lowered; empty if neither.
        learning_rate: to begin with for AdamW, from the factors' lengths; `None` for plain starts
            and in reports of version 0.1.
    """

    name: str
    method: str
    r: int
    requested_r: int
    captured_energy: float | None
    start_norm: float
    fallback: str
    learning_rate: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModuleReport":
        """Undo `dataclasses.asdict`, also from JSON, which has no infinity."""
        norm = values["start_norm"]
        return cls(**{**values, "start_norm": math.inf if norm is None else norm})


@dataclasses.dataclass(frozen=True)
class StepCheck:
    """How the built-in step of a method changes the loss on the calibration data.

    Attributes:
        loss_before: loss of the base model.
        loss_after: loss at the start.
        scale: factor that the step was shortened by; 1 if it lowers the loss as it is.
    """

    loss_before: float
    loss_after: float
    scale: float


@dataclasses.dataclass(frozen=True)
class InitReport:
    """Report on an initialisation; prints as a table.

    Attributes:
        method: name of the method.
        modules: one line per target.
        facts: data, time and memory of the pass; `None` for methods that read no data.
        drift: relative change of the model's output on the first sequence, `|y - y0| / |y0|`;
            `None` if there was no data to measure it on.
        step: effect of the built-in step on the loss; `None` for methods without one and for
            starts without data.
    """

    method: str
    modules: tuple[ModuleReport, ...]
    facts: PassFacts | None
    drift: float | None
    step: StepCheck | None = None

    def ranks(self) -> dict[str, int]:
        """The rank of every module, by full name; `json.dumps` takes it."""
        return {line.name: line.r for line in self.modules}

    @property
    def learning_rate(self) -> LearningRate | None:
        """The rate to begin with: the median over all modules' ranks; `None` if none has a rate."""
        return LearningRate.of_layers((m.learning_rate, m.r) for m in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InitReport":
        """Undo `to_dict`."""
        return cls(
            method=values["method"],
            modules=tuple(ModuleReport.from_dict(line) for line in values["modules"]),
            facts=PassFacts(**values["facts"]) if values["facts"] else None,
            drift=values["drift"],
            step=StepCheck(**values["step"]) if values.get("step") else None,
        )

    def summary(self) -> str:
        """A few lines about the whole start."""
        drift = "not measured" if self.drift is None else f"{self.drift:.1e}"
        lines = [f"{self.method}: {len(self.modules)} modules from their weights alone"]
        if facts := self.facts:
            loss = "" if facts.loss is None else f", loss {facts.loss:.4f}"
            lines = [
                (
                    f"{self.method}: {len(self.modules)} modules from {facts.n_sequences:,} "
                    f"sequences ({facts.n_tokens:,} tokens, {facts.loss_weight:,.0f} with loss; "
                    f"ended by {facts.stopped_by}){loss}"
                ),
                (
                    f"time {facts.seconds:.2f} s, statistics {facts.state_bytes / 2**20:.1f} MiB, "
                    f"peak memory +{facts.peak_bytes / 2**20:.0f} MiB, drift of the output {drift}"
                ),
            ]
        if step := self.step:
            scaled = "" if step.scale == 1 else f" (scaled by {step.scale:g})"
            losses = f"loss {step.loss_before:.4f} to {step.loss_after:.4f}"
            lines.append(f"built-in step{scaled}: {losses}")
        if rate := self.learning_rate:
            lines.append(f"learning rate to begin with {rate}")
        return "\n".join(lines)

    def table(self) -> "Table":
        """The modules as a rich table; the experts of a parameter share a line, with medians."""
        columns = [("module", False), ("method", False), ("r", True), ("energy", True)]
        columns += [("|sB0A0|/|W|", True), ("note", False)]
        rows = []
        for line in by_parameter(self.modules):
            energy = "" if line.captured_energy is None else f"{line.captured_energy:.1%}"
            numbers = (str(line.r), energy, f"{line.start_norm:.3f}")
            rows.append((line.name, line.method, *numbers, line.fallback))
        return table_of(columns, rows)

    def __str__(self) -> str:
        return f"{self.summary()}\n\n{as_text(self.table())}"


def by_parameter(lines: Iterable[ModuleReport]) -> list[ModuleReport]:
    """The lines with all experts of a parameter merged into one, whose numbers are medians."""
    groups: dict[str, list[ModuleReport]] = {}
    for line in lines:
        is_expert = line.name.endswith("]")
        groups.setdefault(line.name.rpartition("[")[0] if is_expert else line.name, []).append(line)
    return [
        group[0] if group[0].name == name else _of_experts(name, group)
        for name, group in groups.items()
    ]


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
