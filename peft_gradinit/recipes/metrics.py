"""Metrics by name: scikit-learn's, and those of the Hub by `evaluate`."""

from collections.abc import Callable
from typing import Any, Literal

import sklearn.metrics
from huggingface_hub.constants import HF_HUB_OFFLINE

from ..errors import ConfigError


def _macro_f1(references: Any, predictions: Any) -> Any:
    return sklearn.metrics.f1_score(references, predictions, average="macro")


def _exact_match(references: Any, predictions: Any) -> Any:
    """Share of texts that are the reference, but for space around them."""
    stripped = [[text.strip() for text in texts] for texts in (references, predictions)]
    return sklearn.metrics.accuracy_score(*stripped)


_Metric = Callable[[Any, Any], Any]
_OF_CLASSES: dict[str, _Metric] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "macro_f1": _macro_f1,
    "matthews": sklearn.metrics.matthews_corrcoef,
}
_OF_TEXTS: dict[str, _Metric] = {**_OF_CLASSES, "exact_match": _exact_match}
_OF_NUMBERS: dict[str, _Metric] = {
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
    "r2": sklearn.metrics.r2_score,
}
_BY_KIND = {"classes": _OF_CLASSES, "texts": _OF_TEXTS, "numbers": _OF_NUMBERS}
_BUILT_IN = _OF_TEXTS | _OF_NUMBERS


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


def names_given(names: list[str]) -> list[str] | None:
    """What `compute` calls the values of metrics; `None` if only those of the Hub know."""
    return names if all(name in _BUILT_IN for name in names) else None


def check_metrics(names: list[str], kind: Literal["classes", "texts", "numbers"]) -> None:
    """Refuse metrics that are neither built in nor to be had from the Hub, or compare something else.

    Args:
        names: as for `compute`.
        kind: what is compared.

    Raises:
        ConfigError: if a metric cannot be used.
    """
    known = _BY_KIND[kind]
    for name in names:
        if name not in _BUILT_IN:
            _of_the_hub(name)
        elif name not in known:
            raise ConfigError(
                f"the metric {name!r} is not for {kind}, which are compared; take one of "
                f"{sorted(known)}, or leave it out."
            )


def _of_the_hub(name: str) -> Any:
    """A metric of the Hub.

    Args:
        name: of it.

    Returns:
        An `evaluate` metric.

    Raises:
        ConfigError: if it cannot be had.
    """
    network = " The network is switched off (HF_HUB_OFFLINE)." if HF_HUB_OFFLINE else ""
    try:
        import evaluate  # not needed for those that are built in

        return evaluate.load(name)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the metric {name!r} cannot be loaded: {error}; built in are {sorted(_BUILT_IN)}, "
            f"others come from the Hub by the package `evaluate`.{network}"
        ) from error


def _computed(name: str, predictions: Any, references: Any) -> dict[str, float]:
    try:
        if name in _BUILT_IN:
            return {name: float(_BUILT_IN[name](references, predictions))}
        metric = _of_the_hub(name)
        return metric.compute(predictions=predictions, references=references) or {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the metric {name!r} cannot be computed: {error}; choose one for what this model gives."
        ) from error
