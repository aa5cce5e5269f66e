"""Metrics for `evaluate` that need no network: `evaluate.load` would fetch their code."""

from typing import Any

import datasets
import evaluate
import numpy as np

from ..errors import ConfigError


class _Metric(evaluate.Metric):
    """A metric of predictions and references."""

    kind = "int64"

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value(self.kind) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions and references of one length",
            features=datasets.Features(features),
        )


class Accuracy(_Metric):
    """Share of right predictions."""

    def _compute(
        self, *, predictions: Any = (), references: Any = (), **_: Any
    ) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(_Metric):
    """F1 of each class that occurs, averaged over the classes."""

    def _compute(
        self, *, predictions: Any = (), references: Any = (), **_: Any
    ) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(predicted, true):
            hits = np.sum((predicted == label) & (true == label))
            scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
        return {"macro_f1": float(np.mean(scores))}


class Matthews(_Metric):
    """Correlation of predicted and true classes, as GLUE scores CoLA; 0 where one is constant."""

    def _compute(
        self, *, predictions: Any = (), references: Any = (), **_: Any
    ) -> dict[str, float]:
        predicted, true = np.asarray(predictions), np.asarray(references)
        labels = np.union1d(predicted, true)
        p = (predicted[:, None] == labels).astype(float)
        t = (true[:, None] == labels).astype(float)
        p, t = p - p.mean(0), t - t.mean(0)
        scale = np.sqrt((p * p).sum() * (t * t).sum())
        return {"matthews": float((p * t).sum() / scale) if scale > 0 else 0.0}


class ExactMatch(_Metric):
    """Share of texts that are the reference, but for space around them."""

    kind = "string"

    def _compute(
        self, *, predictions: Any = (), references: Any = (), **_: Any
    ) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([p.strip() == r.strip() for p, r in pairs]))}


_BUILT_IN: dict[str, Any] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "matthews": Matthews,
    "exact_match": ExactMatch,
}


def compute(names: list[str], predictions: Any, references: Any) -> dict[str, float]:
    """Compute metrics by name.

    Args:
        names: built in, or on the Hub.
        predictions: classes or texts.
        references: of the same kind and length.

    Returns:
        Their values; metrics with several give several.
    """
    found: dict[str, float] = {}
    for name in names:
        found |= _computed(name, predictions, references)
    return found


def check_metrics(names: list[str], *, of_numbers: bool = False) -> None:
    """Refuse metrics that are neither built in nor to be had from the Hub, or compare no numbers.

    Args:
        names: as for `compute`.
        of_numbers: whether the model is of regression.

    Raises:
        ConfigError: if a metric cannot be used.
    """
    for name in names:
        if of_numbers and name in _BUILT_IN:
            raise ConfigError(
                f"the metric {name!r} compares classes or texts, but the labels are numbers; take "
                "one of the Hub that compares numbers, such as 'mse', or leave it out."
            )
        _metric(name)


def _metric(name: str) -> Any:
    try:
        return _BUILT_IN[name]() if name in _BUILT_IN else evaluate.load(name)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the metric {name!r} cannot be loaded: {error}; built in are {sorted(_BUILT_IN)}, "
            "others come from the Hub."
        ) from error


def _computed(name: str, predictions: Any, references: Any) -> dict[str, float]:
    metric = _metric(name)
    try:
        return metric.compute(predictions=predictions, references=references) or {}
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the metric {name!r} cannot be computed: {error}; choose one for what this model gives."
        ) from error
