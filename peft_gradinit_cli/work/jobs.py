"""What a calibration of the command line is made of: what is measured, and where the result goes."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_gradinit import __version__
from peft_gradinit.calibration import FILE_NAME, CalibrationResult, Checkpoint, lengths_within
from peft_gradinit.errors import DataError, OutputError
from peft_gradinit.files import check_writable, write_json
from peft_gradinit.recipes import (
    CalibrationSection,
    DataSection,
    Estimate,
    Labels,
    MethodSection,
    ModelSection,
    Reader,
    adapter_config,
    calibration_of,
    empty_model,
    estimate,
    load_rows,
    sequence_length,
    task_of,
    untrained_modules,
)
from peft_gradinit.records import LearningRate
from peft_gradinit.starts import (
    compute_start,
    planned_targets,
    resolve_targets,
    with_converted_targets,
)
from peft_gradinit.tuners import calibrate as run_calibration

NO_DATA = "none"
"""In place of a path: an estimate takes sequences of the full length."""

PARTIAL_NAME, RECORD_NAME = "partial.safetensors", "calibration.json"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the result goes, and how.

    Attributes:
        folder: of the result.
        overwrite: replace a result that is there.
        resume: continue with the unfinished sums that are there.
        save_every: seconds between two saves of them.

    Raises:
        OutputError: if there is a result already, or the folder cannot be written to.
    """

    folder: Path
    overwrite: bool
    resume: bool
    save_every: float

    def __post_init__(self) -> None:
        if (self.folder / FILE_NAME).exists() and not self.overwrite:
            raise OutputError(
                f"{str(self.folder)!r} holds a calibration already; give another folder, or "
                "--overwrite."
            )
        check_writable(self.folder)

    @property
    def partial(self) -> Path:
        """Where the unfinished sums are kept."""
        return self.folder / PARTIAL_NAME

    def checkpoint(self, job: "Job") -> Checkpoint:
        """Where and how often the pass of a job saves its sums."""
        if not self.resume:
            self.partial.unlink(missing_ok=True)
        return Checkpoint(self.partial, job.identity(), self.save_every)

    def write(self, result: CalibrationResult, job: "Job") -> None:
        """Write the result, and what it was made from."""
        result.save(self.folder)
        record = {
            "peft_gradinit": __version__,
            "model": job.model.model_dump(),
            "data": job.reader.section.model_dump(),
            "labels": job.reader.labels and list(job.reader.labels.head()["id2label"].values()),
            "method": job.method.model_dump(),
            "calibration": job.calibration.model_dump(),
            "facts": dataclasses.asdict(result.facts),
        }
        write_json(self.folder / RECORD_NAME, record)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured on what.

    Attributes:
        model: which model, and how it is loaded.
        data: which data, and how they are read.
        method: tells the statistic, the targets and their ranks.
        calibration: budgets and estimator.
    """

    model: ModelSection
    data: DataSection
    method: MethodSection
    calibration: CalibrationSection

    def run(
        self, device: torch.device, place: Place, *, progress: bool
    ) -> tuple[CalibrationResult, nn.Module]:
        """Calibrate.

        Args:
            device: where the model runs.
            place: where the unfinished sums go.
            progress: show a progress bar.

        Returns:
            The result, and the model that it was measured on.
        """
        model, data = self._loaded(device, progress=progress, checkpoint=place.checkpoint(self))
        return run_calibration(model, self.config(model), data), model

    def start(self, device: torch.device, *, progress: bool) -> PeftModel:
        """Compute the start of an adapter.

        Args:
            device: where the model runs.
            progress: show a progress bar.

        Returns:
            The model with the adapter, as training would begin with it.
        """
        model, data = self._loaded(device, progress=progress)
        config = self.config(model, calibration=data)
        return cast("PeftModel", get_peft_model(model, config))

    def _loaded(self, device: torch.device, **more: Any) -> tuple[Any, Any]:
        """The model on its device, and the calibration with `more` arguments."""
        rows, reader = self._encoded(), self.reader
        model: Any = reader.load_model(self.model)
        if self.model.quantization is None:
            model.to(device)
        return model, calibration_of(rows, self.calibration, reader.processor, **more)

    def learning_rate(self, model: nn.Module, result: CalibrationResult) -> LearningRate | None:
        """What to train at from the start that the result gives; every process has to call it.

        Args:
            model: that was measured.
            result: of the measurement.

        Returns:
            The rate for AdamW and the config's own `lora_alpha`; `None` if the start has none.
        """
        config = with_converted_targets(self.config(model), model)
        start = compute_start(model, resolve_targets(model, config), config, result)
        return start.report(config.method, None, None).learning_rate

    def identity(self) -> str:
        """A text that differs between jobs whose unfinished sums must not be mixed.

        It holds the model's section, since a float32 model and its bfloat16 copy have the same
        fingerprint. For files of data it holds sizes and times, since they may have changed.
        """
        stamp = _stamps(Path(self.data.path))
        model, data = self.model.model_dump(), self.data.model_dump()
        return json.dumps([model, data, self.calibration.batch_size, stamp], sort_keys=True)

    def estimate(self, device: torch.device, n_processes: int = 1) -> Estimate:
        """What running it would cost; reads the data, if there are any, but no weights.

        Args:
            device: whose speed is measured.
            n_processes: that would share the data.

        Returns:
            The costs.
        """
        lengths, labels = self._lengths()
        model, config = empty_model(self.model, labels), self.config()
        return estimate(
            model,
            planned_targets(model, config),
            config.needs(),
            lengths,
            self.calibration,
            device=device,
            quantization=self.model.quantization,
            n_processes=n_processes,
        )

    def _lengths(self) -> tuple[list[int], Labels | None]:
        """Lengths of the sequences that will be read, and what the head is to give."""
        if self.data.path == NO_DATA:
            calibration = calibration_of((), self.calibration, None)
            return list(lengths_within(calibration, itertools.repeat(self._longest()))), None
        rows, reader = self._encoded(), self.reader
        calibration = calibration_of(rows, self.calibration, reader.processor)
        batches = (calibration.collate_fn([row]) for row in rows)
        return list(lengths_within(calibration, batches)), reader.labels

    def _longest(self) -> dict[str, torch.Tensor]:
        """A batch of one image, or of one sequence of the full length."""
        if task_of(self.model) == "IMAGE_CLS":
            return {"pixel_values": torch.zeros(1, 1)}
        length = sequence_length(self.data, self.model)
        return {"input_ids": torch.zeros(1, length, dtype=torch.long)}

    @functools.cached_property
    def reader(self) -> Reader:
        """How the rows are encoded."""
        return Reader.of(self.model, self.data, self._rows)

    @functools.cached_property
    def _rows(self) -> Any:
        datasets.disable_progress_bars()
        return load_rows(self.data)

    def _encoded(self) -> Any:
        rows = self._rows
        if isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()  # nothing is tokenised that is not read
        encoded = self.reader.encode(rows)
        if next(iter(encoded), None) is None:  # bad data are told before a model is loaded
            raise DataError(
                f"the data {self.data.path!r} have no usable row in the split {self.data.split!r}."
            )
        return encoded

    def config(self, model: nn.Module | None = None, calibration: Any = "unused") -> Any:
        """The config of the method.

        Args:
            model: as it was loaded; a new head is trained as well.
            calibration: what the start is computed from, where that is asked.

        Returns:
            The config.
        """
        untrained = () if model is None else untrained_modules(model)
        return adapter_config(self.method, task_of(self.model), calibration, untrained)

    def said(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of the config that are not its defaults, but for the calibration."""
        method, config = self.method, self.config(model)
        said: dict[str, Any] = {"r": method.r, "target_modules": method.target_modules}
        for name in ("task_type", "modules_to_save"):
            if (value := getattr(config, name)) is not None:
                said[name] = value
        return said | {k: v for k, v in method.options.items() if k not in said}


def _stamps(path: Path) -> list[list[Any]]:
    """Names, sizes and times of a file, or of the files in a folder."""
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
    facts = ((file.relative_to(path).as_posix(), file.stat()) for file in files)
    return [[name, of_file.st_size, of_file.st_mtime_ns] for name, of_file in facts]
