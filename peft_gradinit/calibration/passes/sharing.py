"""The statistics of a pass by layer; one for all layers that are given the same inputs.

Query, key and value, for instance, share one. Gradients are never shared.

Which layers have the same inputs is found by comparing tensors, not from the model's code. Each
layer points to a statistic, at first all of a kind to the same empty one. If a layer adds a tensor
to a statistic that others point to as well, it gets a copy with the tensor added. If another of
them then adds the same tensor to the same statistic, it is pointed to that copy, and nothing is
computed. So layers share as long as all their inputs were the same, whatever the routing, and are
separated for good when they were not.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...layouts import Processes
from ...statistics import Statistic

N_RECENT = 4
"""Tensors remembered during a forward; few, since layers with the same input run close together."""


class _Added(NamedTuple):
    to: Any
    x: Tensor  # held, so that no other tensor gets its address
    identity: tuple[object, ...] | None
    result: Any


class LayerStatistics:
    """Statistics by layer; layers that are given the same inputs may share one.

    Args:
        statistics: empty accumulators by layer name; one object for all layers that may share.
    """

    def __init__(self, statistics: Mapping[str, Statistic]) -> None:
        self._of = dict(statistics)
        self._users = Counter(id(s) for s in self._of.values())
        self._recent: deque[_Added] = deque(maxlen=N_RECENT)

    def __getitem__(self, name: str) -> Any:
        """The statistic of a layer."""
        return self._of[name]

    def pop(self, names: Sequence[str]) -> Any:
        """Remove layers that share a statistic, and return it; it is freed with the last of them."""
        statistic = self[names[0]]
        for name in names:
            del self._of[name]
        self._users[id(statistic)] -= len(names)
        return statistic

    def distinct(self) -> list[Any]:
        """Every statistic once."""
        return list({id(s): s for s in self._of.values()}.values())

    def groups(self) -> list[list[str]]:
        """Names of the layers that share a statistic, for every statistic."""
        names: dict[int, list[str]] = {}
        for name, statistic in self._of.items():
            names.setdefault(id(statistic), []).append(name)
        return list(names.values())

    def add(self, name: str, x: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        """Add the inputs of a layer.

        Args:
            name: the layer.
            x: its input; not modified.
            rows: selects the tokens that count; the same for all layers until `forget()`.
        """
        mine, identity = self[name], _identity(x)
        for added in self._recent:
            if identity is not None and added.to is mine and added.identity == identity:
                self._point(name, added.result)
                return
        if self._users[id(mine)] == 1 and all(a.result is not mine for a in self._recent):
            mine.add(rows(x))
            return
        result = mine.copy()
        result.add(rows(x))
        self._point(name, result)
        self._recent.append(_Added(mine, x, identity, result))

    def agree(self, world: Processes) -> list[Any]:
        """Make layers share a statistic only where they share one on every process.

        Returns every statistic once: of the same layers in the same order on every process.
        """
        keys = world.gather({name: i for i, group in enumerate(self.groups()) for name in group})
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in keys[0]:
            groups.setdefault(tuple(of[name] for of in keys), []).append(name)
        self.part(groups.values())
        return self.distinct()

    def part(self, groups: Iterable[Collection[str]]) -> None:
        """Make only layers of one group share a statistic; those of a group share one already."""
        for group in groups:
            shared = self[next(iter(group))]
            if self._users[id(shared)] > len(group):
                own = shared.copy()
                for name in group:
                    self._point(name, own)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers to continue from, and which layers share; between two forwards."""
        distinct = self.distinct()
        order = {id(s): i for i, s in enumerate(distinct)}
        tensors = {
            f"{i}.{name}": tensor
            for i, statistic in enumerate(distinct)
            for name, tensor in statistic.tensors().items()
        }
        counts = [[s.weight, s.n_calls] for s in distinct]
        return tensors, {"of": {n: order[id(s)] for n, s in self._of.items()}, "counts": counts}

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state()` of an earlier process."""
        found: dict[int, Statistic] = {}
        for name, i in numbers["of"].items():
            if i not in found:
                weight, n_calls = numbers["counts"][i]
                own = {k[len(f"{i}.") :]: t for k, t in tensors.items() if k.startswith(f"{i}.")}
                found[i] = self._of[name].copy()
                found[i].load_state_dict({**own, "weight": weight, "n_calls": n_calls})
        self._of = {name: found[i] for name, i in numbers["of"].items()}
        self._users = Counter(id(s) for s in self._of.values())

    def forget(self) -> None:
        """End a forward: release its tensors."""
        self._recent.clear()

    def _point(self, name: str, statistic: Statistic) -> None:
        self._users[id(self._of[name])] -= 1
        self._of[name] = statistic
        self._users[id(statistic)] += 1


def _identity(x: Tensor) -> tuple[object, ...] | None:
    """The same for the same tensor, unless it was written to in between."""
    if x.is_inference():
        return None  # its writes are not counted
    return (x.data_ptr(), x._version, x.dtype, x.device, x.shape, x.stride())
