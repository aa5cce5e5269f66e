"""Layers that are cut over processes which all read the same data (tensor parallelism).

A layer whose weight is cut by rows gives each process a part of its output; one that is cut by
columns receives a part of its input. Both are put together before a statistic gets them, so that
every process of such a group measures the same. Different groups read different data.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

DIMENSION = "tp"
"""Name that Transformers gives to the dimension of the mesh."""


def whole_features(module: nn.Module, x: Tensor, dy: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gather all features of a layer's input `(…, in)` and its output's gradient `(…, out)`.

    A collective if the layer is cut. `dy` is `None` if it is not wanted.
    """
    cut = _cut(module)
    if cut is None:
        return x, dy
    dim, group = cut
    if dim == 1:
        return _joined(x, group), dy
    return x, None if dy is None else _joined(dy, group)


def replicas(model: nn.Module) -> list[list[int]] | None:
    """Ranks that read different data, one list for each part; `None` without tensor parallelism."""
    for mesh in _meshes(model):
        dim = mesh.mesh_dim_names.index(DIMENSION)
        return mesh.mesh.movedim(dim, 0).reshape(mesh.size(dim), -1).tolist()
    return None


def _meshes(model: nn.Module) -> Iterator[Any]:
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            if DIMENSION in (mesh.mesh_dim_names or ()):
                yield mesh


def _cut(module: nn.Module) -> tuple[int, Any] | None:
    """Dimension of the weight that is cut, and the processes that hold its parts."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, DTensor):
        return None
    mesh = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    if DIMENSION not in names:
        return None
    placement = weight.placements[names.index(DIMENSION)]
    return (placement.dim, mesh.get_group(DIMENSION)) if isinstance(placement, Shard) else None


def _joined(part: Tensor, group: Any) -> Tensor:
    size = torch.tensor([part.shape[-1]], device=part.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    widths = [int(s) for s in sizes]
    padded = nn.functional.pad(part, (0, max(widths) - part.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p[..., :n] for p, n in zip(parts, widths, strict=True)], dim=-1)
