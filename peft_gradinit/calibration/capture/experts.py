"""Matrices inside a parameter, such as those of experts, and products of token rows with them."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class ExpertWeight:
    """One matrix inside a parameter.

    Attributes:
        module: the module that holds the parameter and multiplies by it.
        parameter: the parameter's name in that module.
        index: number of the matrix in a parameter with three dimensions; `None` for a parameter
            with two dimensions, which is one matrix.
        transposed: whether the matrix is assumed to be stored as `(in, out)`. If the module
            multiplies the other way round, the measurement still is of the matrix `(out, in)`
            defined by this assumption.
    """

    module: nn.Module
    parameter: str
    index: int | None
    transposed: bool


Measurable = nn.Module | ExpertWeight
"""What a pass can measure: linear layers, and expert weights."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter whose products are observed; `label` is its full name, for messages.

    `names` are the names of its matrices, by index. For the others see `ExpertWeight`.
    """

    module: nn.Module
    attribute: str
    transposed: bool
    label: str
    names: Mapping[int, str]

    def tensor(self) -> Any:
        """The tensor that the module multiplies by now; offloading and sharding exchange it."""
        return getattr(self.module, self.attribute)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of token rows with matrices of a parameter.

    Attributes:
        parameter: the parameter.
        x: the other factor, as the module passed it.
        experts: the matrix of all rows, or of each block of rows; `None`: block `i` is multiplied
            by matrix `i`.
        ends: where the blocks end, for rows sorted by expert; `None`: the first dimension of `x`
            counts blocks.
        columns: whether tokens are columns of `x` and of the result.
        swapped: whether the module multiplies the other way round than `ExpertWeight` assumes.
    """

    parameter: Parameter
    x: Tensor
    experts: int | Tensor | None
    ends: Tensor | None = None
    columns: bool = False
    swapped: bool = False

    def parts(self, *tensors: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
        """Split tensors by expert: `x` (or its saved copy), the result, or the result's gradient.

        Yields the name of each matrix that has rows, and `(rows, features)` for each tensor. Where
        blocks are a dimension, rows of zeros are tokens that were not routed there, and left out.
        """
        names = self.parameter.names
        turned = [self._turned(t) for t in tensors]
        if isinstance(self.experts, int):
            rows = [t.reshape(-1, t.shape[-1]) for t in turned]
            if len(rows[0]):
                yield names[self.experts], rows
            return
        rows, ends = self._sorted(turned)
        start = 0
        for index, end in enumerate(ends.tolist()):  # the only value that is asked of the device
            if end > start:
                yield names[index], [t[start:end] for t in rows]
            start = end

    def _sorted(self, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Rows in the order of their experts, and where the rows of each expert end."""
        if self.ends is not None:
            return tensors, self.ends
        rows, experts = self._of_blocks(tensors)
        order = experts.argsort(stable=True)
        every = torch.arange(len(self.parameter.names), device=experts.device)
        ends = torch.searchsorted(experts[order], every, right=True)
        return [t[order] for t in rows], ends

    def _turned(self, tensor: Tensor) -> Tensor:
        if not self.columns:
            return tensor
        return tensor.mT if tensor.dim() > 1 else tensor[None]

    def _of_blocks(self, tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Rows and their experts, where the first dimension counts blocks."""
        blocks, device = self.experts, tensors[0].device
        if not isinstance(blocks, Tensor):
            blocks = torch.arange(len(self.parameter.names), device=device)
        tensors = [t if t.dim() == 3 else t.expand(len(blocks), *t.shape) for t in tensors]
        experts = blocks.to(device)[:, None].expand(-1, tensors[0].shape[1]).flatten()
        rows = [t.reshape(-1, t.shape[-1]) for t in tensors]
        if self.experts is not None:
            return rows, experts
        routed = rows[0].ne(0).any(dim=1).nonzero()[:, 0]
        return [t[routed] for t in rows], experts[routed]


def parameters_of(weights: Mapping[str, ExpertWeight]) -> list[Parameter]:
    """The parameters that hold some matrices, each once; of each, `weights` has all matrices."""
    grouped: dict[tuple[int, str], dict[str, ExpertWeight]] = {}
    for name, weight in weights.items():
        grouped.setdefault((id(weight.module), weight.parameter), {})[name] = weight
    found = []
    for group in grouped.values():
        first_name, first = next(iter(group.items()))
        label = first_name if first.index is None else first_name.rpartition("[")[0]
        names = {weight.index or 0: name for name, weight in group.items()}
        found.append(Parameter(first.module, first.parameter, first.transposed, label, names))
    return found


def why_unreached(module: Measurable, n_batches: int) -> str:
    """Why a layer that was never used in the pass cannot be measured."""
    if isinstance(module, ExpertWeight) and module.index is not None:
        return f"no token was routed to it in {n_batches} batches"
    return f"it never ran in {n_batches} batches"
