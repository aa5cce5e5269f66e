"""One statistic for all layers that are given the same inputs, such as query, key and value.

Which layers those are is not asked of the model: it is seen in the tensors. Every layer points to a
statistic, at first all of a kind to the same empty one. A layer that adds a tensor to a statistic
which others point to gets a copy with the tensor added; when another of them adds the same tensor
to the same statistic, it is pointed to that copy, and nothing is computed. So layers share as long
as all they were ever given was the same, whatever the routing, and part for good when it was not.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..statistics import InputStatistic

N_RECENT = 4
"""Tensors remembered during a forward: the layers that share one run close to each other."""


class _Added(NamedTuple):
    to: InputStatistic
    x: Tensor  # held, so that no other tensor gets its address
    identity: tuple[object, ...] | None
    result: InputStatistic


class SharedInputs:
    """Statistics by layer; layers with the same inputs share one.

    Args:
        statistics: empty accumulators by layer name; one object for all layers that may share.
    """

    def __init__(self, statistics: Mapping[str, InputStatistic]) -> None:
        self._of = dict(statistics)
        self._users = Counter(id(s) for s in self._of.values())
        self._recent: deque[_Added] = deque(maxlen=N_RECENT)

    def __getitem__(self, name: str) -> InputStatistic:
        """The statistic of a layer."""
        return self._of[name]

    def distinct(self) -> list[InputStatistic]:
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
            x: the tensor that it was given; not modified.
            rows: selects the tokens that count; the same for all layers until `forget()`.
        """
        mine, identity = self._of[name], _identity(x)
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

    def part(self, groups: Iterable[Collection[str]]) -> None:
        """Let only layers of one group share a statistic.

        Args:
            groups: names of layers, each in one group; those of a group share one already.
        """
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
        counts = [[s.n_tokens, s.n_calls] for s in distinct]
        return tensors, {"of": {n: order[id(s)] for n, s in self._of.items()}, "counts": counts}

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state()` of an earlier process."""
        found: dict[int, InputStatistic] = {}
        for name, i in numbers["of"].items():
            if i not in found:
                n_tokens, n_calls = numbers["counts"][i]
                own = {k[len(f"{i}.") :]: t for k, t in tensors.items() if k.startswith(f"{i}.")}
                found[i] = self._of[name].copy()
                found[i].load_state_dict({**own, "n_tokens": n_tokens, "n_calls": n_calls})
        self._of = {name: found[i] for name, i in numbers["of"].items()}
        self._users = Counter(id(s) for s in self._of.values())

    def forget(self) -> None:
        """End a forward: release its tensors."""
        self._recent.clear()

    def _point(self, name: str, statistic: InputStatistic) -> None:
        self._users[id(self._of[name])] -= 1
        self._of[name] = statistic
        self._users[id(statistic)] += 1


def _identity(x: Tensor) -> tuple[object, ...] | None:
    """The same for the same tensor, unless it was written to in between."""
    if x.is_inference():
        return None  # its writes are not counted
    return (x.data_ptr(), x._version, x.dtype, x.device, x.shape, x.stride())
