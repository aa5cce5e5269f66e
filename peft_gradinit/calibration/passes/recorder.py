"""What a pass does differently for each kind of statistic."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from ...errors import CalibrationError
from ...layouts import Processes, check_loaded, execution_device
from ..capture import Measurable
from ..feed import Step, first_sequence
from ..spec import Calibration
from .memory import MemoryGauge
from .reduction import keep_on_first, orient, sum_over
from .sharing import LayerStatistics


class Recorder(ABC):
    """Runs the model on the steps of a pass and fills statistics.

    Attributes:
        layers: the statistics by layer.
        weight: of the data that counted so far, on this process.
        loss_sum: sum of the losses, each times its weight; `None` if no loss is computed.
        probe: the first sequence of the data as a batch; `None` before the first step.
    """

    computes_loss: ClassVar[bool]

    def __init__(
        self,
        model: nn.Module,
        layers: LayerStatistics,
        calibration: Calibration,
        need: Any,
        world: Processes,
        targets: Mapping[str, Sequence[int]],
    ) -> None:
        self.model = model
        self.layers = layers
        self.calibration = calibration
        self.need = need
        self.world = world
        self.targets = targets
        self.runs_all = world.size > 1 and calibration.must_run_equally(model)
        self.device = execution_device(model)
        self.memory = MemoryGauge(model)
        self.weight = 0.0
        self.loss_sum: float | None = 0.0 if self.computes_loss else None
        self.on_batch: Callable[[Any, float, float], None] | None = None
        self.probe: Any = None

    def check_model(self) -> None:
        """Refuse a model that cannot run (`CalibrationError`, naming the weight)."""
        check_loaded(self.model)
        for name, parameter in self.model.named_parameters() if self.computes_loss else ():
            if parameter.is_inference():
                raise CalibrationError(
                    f"{name} was created under torch.inference_mode() and can take part in no "
                    "backward; load the model outside inference mode."
                )

    @abstractmethod
    def watching(self, modules: Mapping[str, Measurable]) -> AbstractContextManager[Any]:
        """Make the model's layers hand over their inputs or gradients while the block runs."""

    @abstractmethod
    def add(self, step: Step) -> None:
        """Run a step, and add it to every statistic if it counts."""

    @abstractmethod
    def nothing_counted(self, n_sequences: int) -> str:
        """The error message for data in which no token counted."""

    def orient(self) -> bool:
        """Orient the sketches by the data of all processes, and say whether the pass may end."""
        every = self.layers.agree(self.world)
        some = every if self.need.may_settle else [s for s in every if s.can_orient]
        orient(some, self.device, self.world)
        settled = self.need.may_settle and self.world.gather(self.is_settled())[0]
        keep_on_first(some, self.world)
        return settled

    def is_settled(self) -> bool:
        """Whether the last orientation changed little enough for the pass to end."""
        return False

    def finish(self) -> None:
        """Add up what all processes measured."""
        (self.weight,) = self.world.total(self.weight)
        if self.loss_sum is not None:
            (self.loss_sum,) = self.world.total(self.loss_sum)
        sum_over(self.layers.agree(self.world), self.device, self.world)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers to continue from, at the end of a batch."""
        tensors, numbers = self.layers.state()
        return tensors, {"layers": numbers, "weight": self.weight, "loss_sum": self.loss_sum}

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state()` of an earlier process."""
        self.layers.resume(tensors, numbers["layers"])
        self.weight, self.loss_sum = numbers["weight"], numbers["loss_sum"]

    def _keep_probe(self, batch: Any) -> None:
        if self.probe is None:
            # A loss of the user's may be of several sequences together.
            cut = self.calibration.loss_fn is None
            self.probe = first_sequence(batch) if cut else batch
