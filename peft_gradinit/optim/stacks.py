"""Pairs of one shape as one batch, whole on every process, and the way back into parameters.

`A (r, in)` and `B (out, r)` of all pairs of one shape are stacked; the experts of a pair are members
of their own. FSDP2 keeps some rows of each factor on each process: the rows of a stack, of the
factors, their gradients and their state, are gathered in one collective, every process computes the
same step, and writes its rows back. A stack holds a bounded number of entries, and so do the copies
that a step makes.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import ConfigError

Layout = Literal["A", "B", "square", "weight"]
"""Shape of an entry of the state: of one of the factors, `(r, r)`, or `(out, in)`."""

Count = int | Tensor
"""Number of a step, from 1; of experts `(n, 1, 1)`, as each has its own."""

ENTRIES = 2**24
"""Entries of the pairs in one stack, at most."""

MASTER = "master"
"""Entry of the state that holds a half-precision factor in float32."""


class Stack(NamedTuple):
    """Pairs of one shape in the working precision.

    Attributes:
        A: `(n, r, in)`.
        B: `(n, out, r)`.
        gA: gradient of `A`; zeros if it has none.
        gB: gradient of `B`; zeros if it has none.
        scaling: what the products `B A` are multiplied by.
        steps: number of this step for the state kept with `A`, and for that kept with `B`.
        moves: whether `A` and `B` are written back; frozen factors are not.
        is_output: whether their layer gives the logits of a language model.
    """

    A: Float[Tensor, "n r in"]
    B: Float[Tensor, "n out r"]
    gA: Float[Tensor, "n r in"]
    gB: Float[Tensor, "n out r"]
    scaling: float
    steps: tuple[Count, Count]
    moves: tuple[bool, bool]
    is_output: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A pair in a group of parameters."""

    A: Any
    B: Any
    scaling: float
    n_experts: int
    is_output: bool = False

    @property
    def moves(self) -> tuple[bool, bool]:
        """Which of the factors has a gradient."""
        return self.A.grad is not None, self.B.grad is not None

    def key(self, state: Mapping[Any, Any]) -> tuple[Any, ...]:
        """Equal for pairs that can be stepped together."""
        steps: Any = ()
        if self.n_experts == 1:  # experts count for themselves
            steps = [state[f].get("step", 0) if f in state else 0 for f in (self.A, self.B)]
        kinds = [(tuple(f.shape), f.dtype, f.device, _placed(f)) for f in (self.A, self.B)]
        return *kinds, self.scaling, self.n_experts, self.is_output, self.moves, *steps


def stacks(slots: Sequence[Slot], state: Mapping[Any, Any], size: Any) -> Iterator[list[Slot]]:
    """The pairs with a gradient, those together that can be stepped together.

    Args:
        slots: all pairs of a group.
        state: the optimiser's.
        size: gives the number of entries that a pair counts for.

    Yields:
        Pairs of one kind, in the order of the first of each kind.
    """
    kinds: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        if any(slot.moves):
            kinds.setdefault(slot.key(state), []).append(slot)
    for members in kinds.values():
        n = max(1, ENTRIES // max(1, size(members[0])))
        yield from (members[i : i + n] for i in range(0, len(members), n))


def whole_rows(columns: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Stack tensors by name, `(n, rows, …)`; a collective if they are spread over processes."""
    if not isinstance(next(iter(columns.values()))[0], DTensor):
        return {name: torch.stack(list(tensors)) for name, tensors in columns.items()}
    parts = {name: _padded(tensors) for name, tensors in columns.items()}
    flat = torch.cat([part.reshape(-1) for part in parts.values()])
    like = next(iter(columns.values()))[0]
    mesh, dim = like.device_mesh, _dim_of_shards(like)
    flat = flat.to(mesh.device_type)
    gathered = DTensor.from_local(flat, mesh, like.placements, run_check=False).full_tensor()
    by_process = gathered.view(mesh.size(dim), -1)
    stacked = {}
    sizes = [part.numel() for part in parts.values()]
    for name, part in zip(parts, by_process.split(sizes, 1), strict=True):
        local = part.unflatten(1, parts[name].shape).movedim(0, 1)  # (n, processes, rows, …)
        stacked[name] = local.flatten(1, 2)[:, : columns[name][0].shape[0]]
    return stacked


@torch.no_grad()
def write_rows(targets: Sequence[Any], stacked: Tensor) -> None:
    """Copy a stack `(n, rows, …)` into tensors: all of its rows, or this process's."""
    if isinstance(targets[0], DTensor):
        mesh, dim = targets[0].device_mesh, _dim_of_shards(targets[0])
        rows = -(-stacked.shape[1] // mesh.size(dim))
        first = mesh.get_local_rank(dim) * rows
        stacked = stacked[:, first : first + rows]
        targets = [target.to_local() for target in targets]
    values = list(stacked.unbind(0))
    torch._foreach_copy_(list(targets), values)  # pyright: ignore[reportPrivateImportUsage]


def by_expert(stacked: Tensor, layout: Layout, n: int) -> Tensor:
    """A stack of parameters as a stack of matrices, `n` for each: `(pairs * n, …)`.

    `A (n * r, in)` has the experts one after the other, `B (out, r * n)` side by side for each rank.
    """
    if layout == "A":
        return stacked.unflatten(1, (n, -1)).flatten(0, 1)
    if layout == "B":
        return stacked.unflatten(2, (-1, n)).movedim(3, 1).flatten(0, 1)
    return stacked.flatten(0, 1)


def as_parameters(stacked: Tensor, layout: Layout, n: int) -> Tensor:
    """The inverse of `by_expert`."""
    apart = stacked.unflatten(0, (-1, n))
    if layout == "A":
        return apart.flatten(1, 2)
    return apart.movedim(1, 3).flatten(2, 3) if layout == "B" else apart


def working_dtype(parameter: Tensor) -> torch.dtype:
    """Float64 for float64, float32 for everything else."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def check_placed(parameter: Any, optimizer: str) -> None:
    """Refuse parameters that are cut in another way than FSDP2 does.

    Raises:
        ConfigError: if a parameter is cut by columns, or along several dimensions of a mesh.
    """
    if not isinstance(parameter, DTensor):
        return
    cut = [p for p in parameter.placements if not isinstance(p, Replicate)]
    if cut != [Shard(0)] or type(cut[0]) is not Shard:
        raise ConfigError(
            f"{optimizer} works with factors that FSDP2 has cut by rows, got placements "
            f"{parameter.placements}; for tensor parallelism use torch.optim.AdamW, for FSDP2 leave "
            "shard_placement_fn at its default."
        )


def _padded(tensors: Sequence[Any]) -> Tensor:
    """This process's rows of each, filled up with zeros to what the first process has."""
    like = tensors[0]
    rows = -(-like.shape[0] // like.device_mesh.size(_dim_of_shards(like)))
    local = torch.stack([tensor.to_local() for tensor in tensors])
    missing = local.new_zeros(local.shape[0], rows - local.shape[1], *local.shape[2:])
    return torch.cat([local, missing], 1)


def _dim_of_shards(parameter: DTensor) -> int:
    """Dimension of the mesh that the rows are spread over."""
    return next(i for i, p in enumerate(parameter.placements) if isinstance(p, Shard))


def _placed(parameter: Any) -> Any:
    if not isinstance(parameter, DTensor):
        return None
    return parameter.device_mesh, parameter.placements
