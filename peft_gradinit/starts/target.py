"""`Target`: one weight matrix that gets an adapter."""

import dataclasses

from torch import Tensor, nn

from ..calibration import ExpertWeight, Measurable
from ..errors import TargetError
from .experts import expert_matrix
from .weights import linear_weight


@dataclasses.dataclass(frozen=True)
class Target:
    """One targeted module, or one expert of a targeted parameter.

    Attributes:
        name: full name in the base model; for an expert, the parameter's name and `[index]`.
        module: the base layer itself, without adapters around it.
        shape: `(out, in)` of its weight in the layout of `nn.Linear`; `None` for layers that are
            not linear.
        r: rank of its adapter.
        requested_r: rank that the config asked for; 0 for what `"auto+output"` adds.
        alpha: its `lora_alpha`; a lowered rank lowers it as well, so that the scaling stays.
        expert: the matrix of the parameter; `None` for layers.
        reason: why an allocation gave it its rank; empty if that is the rank asked for.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int] | None
    r: int
    requested_r: int
    alpha: float
    expert: ExpertWeight | None = None
    reason: str = ""

    def weight(self) -> Tensor:
        """The weight in the layout of `nn.Linear`, dequantised if need be, float32 and finite."""
        weight = linear_weight(self.module) if self.expert is None else expert_matrix(self.expert)
        if not weight.isfinite().all():
            raise TargetError(
                f"the weight of {self.name} has values that are not finite, which no start can be "
                "computed with; repair the base model, or add it to exclude_modules, or take it "
                "out of target_parameters."
            )
        return weight

    @property
    def adapted(self) -> str:
        """Full name of the module that the adapter is on, or of the parameter with all experts."""
        single = self.expert is None or self.expert.index is None
        return self.name if single else self.name.rpartition("[")[0]

    @property
    def measurable(self) -> Measurable:
        """The module or expert that a calibration pass measures."""
        return self.module if self.expert is None else self.expert
