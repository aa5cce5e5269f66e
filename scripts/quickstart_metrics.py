"""Metrics for `evaluate` that need no hub: `evaluate.load` would fetch their code."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score

_FEATURES = datasets.Features({
    "predictions": datasets.Value("int64"),
    "references": datasets.Value("int64"),
})


class _Classification(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predicted and true class indices",
            features=_FEATURES,
        )


class Accuracy(_Classification):
    """Share of right predictions."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_Classification):
    """F1 of each class, averaged over the classes."""

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro"))}
