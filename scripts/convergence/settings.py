"""What a task's file in `configs/` beside this one says."""

import hashlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent / "configs"


class Section(BaseModel):
    """Unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def key(self) -> str:
        """Tells settings apart; a new field leaves the settings that do not have it where they are."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()[:12]


class Pretraining(Section):
    """How the model came to be that is fine-tuned, if it is made here.

    Attributes:
        model: fields of the model's config.
        weights: folder of `bases/` with what came of it. Processors differ in the last digit, and training
            magnifies that: models that two machines pretrain end elsewhere, and so do all runs from them.
            Default: pretrained here.
    """

    weights: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    steps: int = 0
    batch_size: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    seed: int = 0


class Training(Section):
    """A fine-tuning run: AdamW, warmup and cosine to zero, gradients clipped at 1 as in `Trainer`.

    Attributes:
        evaluations: on how many equidistant steps the test loss is measured.
        head_learning_rate: of a head that is trained beside the adapter. `null`: that of the adapter, as
            `Trainer` has it.
    """

    steps: int
    batch_size: int
    warmup_steps: int
    evaluations: int
    head_learning_rate: float | None = 1e-3

    def head_rate(self, lr: float) -> float:
        """The head's learning rate in a run whose adapter has `lr`."""
        return lr if self.head_learning_rate is None else self.head_learning_rate


class Settings(Section):
    """One task.

    Attributes:
        adapter: `r` and `lora_alpha` of all low-rank methods; scaled as rsLoRA does, save for plain
            LoRA.
        recipe: with `task: recipe`, a file of `configs/`, whose model and data are taken.
        max_length: tokens of a sequence of `functions` and `reference`.
        labels_per_row: of the training rows so many tokens have a loss. Default: all that have one.
        n_test: held-out rows; a recipe says itself what is held out.
        folds: with more than one, the held-out rows are one of that many parts of all rows, another for
            the next seed.
        distinct_texts: whether `docstrings` leaves out texts that several modules have.
        n_calibration: sequences or images that starts are computed from, of the training data.
        search_seeds: how many seeds the search for the learning rate averages over.
        seeds: how many others the best rate is run with; only these are reported.
    """

    task: Literal["docstrings", "topics", "digits", "functions", "reference", "recipe"]
    recipe: Path | None = None
    pretraining: Pretraining = Pretraining()
    training: Training
    adapter: dict[str, int] = Field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    max_length: int = 96
    labels_per_row: int | None = None
    distinct_texts: bool = False
    n_calibration: int
    n_test: int = 0
    folds: int = 1
    search_seeds: int = 1
    seeds: int = 3

    @property
    def searched(self) -> range:
        """Seeds of the search for the learning rate."""
        return range(self.search_seeds)

    @property
    def reported(self) -> range:
        """Seeds of the figures, none of which has chosen a learning rate."""
        return range(self.search_seeds, self.search_seeds + self.seeds)


def load_settings(name: str) -> Settings:
    """Settings of a task by its name, or by the path of a file."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.exists():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise SystemExit(f"{path} is no task; known: {known}")
    return Settings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
