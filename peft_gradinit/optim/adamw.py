"""AdamW for what is in no pair: heads, biases, norms, DoRA's magnitudes, embeddings."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from .stacks import MASTER, working_dtype

BETAS = (0.9, 0.999)
EPS = 1e-8


@torch.no_grad()
def adamw_step(group: dict[str, Any], state: MutableMapping[Any, Any]) -> None:
    """Step the parameters of a group that have a gradient; half-precision ones by float32 copies."""
    parameters = [p for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    for parameter in parameters:
        if parameter not in state:
            state[parameter] = _fresh(parameter)
    entries = [state[p] for p in parameters]
    masters = [master_of(p, s) for p, s in zip(parameters, entries, strict=True)]
    adamw(
        masters,
        [p.grad.to(m.dtype) for p, m in zip(parameters, masters, strict=True)],
        [s["exp_avg"] for s in entries],
        [s["exp_avg_sq"] for s in entries],
        [],
        [s["step"] for s in entries],
        amsgrad=False,
        beta1=BETAS[0],
        beta2=BETAS[1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=EPS,
        maximize=False,
    )
    for parameter, master in zip(parameters, masters, strict=True):
        if master is not parameter:
            parameter.copy_(master)


def master_of(parameter: Any, entry: dict[str, Any]) -> Tensor:
    """The parameter, or its float32 copy if it is of half precision.

    Where the parameter is no longer the copy's rounded value, it has been written by others, and the
    copy follows.
    """
    if parameter.dtype == working_dtype(parameter):
        return parameter
    wide = parameter.to(working_dtype(parameter))
    if MASTER not in entry:
        entry[MASTER] = wide.clone()
    else:
        same = entry[MASTER].to(parameter.dtype) == parameter
        entry[MASTER].copy_(torch.where(same, entry[MASTER], wide))
    return entry[MASTER]


def _fresh(parameter: Any) -> dict[str, Any]:
    moments = [torch.zeros_like(parameter, dtype=working_dtype(parameter)) for _ in range(2)]
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": moments[0],
        "exp_avg_sq": moments[1],
    }
