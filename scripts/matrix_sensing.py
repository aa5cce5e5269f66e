"""The matrix-sensing experiment of the LoRA-One paper: what a start does in a linear model.

    python scripts/matrix_sensing.py

A linear layer `W0`, 100 x 100, is to become `W0 + Delta` with `Delta` of rank 4 and singular values
1, 3/4, 1/2, 1/4, from 1,600 Gaussian inputs; adapters of rank 8, plain gradient descent (1,000
steps at 1/16) and preconditioned gradient descent (100 steps at 1/2). Prints the risk
`|B A - anchor - Delta|_F^2 / 2` at the end: median and range over the seeds.

LoRA-GA takes its start `B0 A0`, of rank 8, out of the function, so that `B A` would have to reach
`Delta + B0 A0`, of rank 12 in general: the column `floor` is the best that rank 8 can do. Without the
subtraction the same factors have no floor.

Directions are named as in `LoraGAConfig`. The paper writes `x (W0 + A B)`: its `A` is on the side of the
inputs, as PEFT's is, but left singular vectors of its gradient are our right ones. Its LoRA-GA (`A` from
`u_1..u_r`, `B` from `v_{r+1}..v_{2r}`) is our `ArB2r`, the default. `A2rBr` has no floor here, since
the gradient `-Delta X^T X / N` has the target's column space exactly: with `B0` from there, `Delta + B0 A0`
has rank 8. That holds in a linear model without noise; it says nothing of other gradients.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peft_gradinit.linalg import truncated_svd
from peft_gradinit.methods.lora_ga import lora_ga_factors
from peft_gradinit.methods.lora_one import lora_one_factors

DIMENSION, RANK, TARGET_RANK, N_INPUTS = 100, 8, 4, 1600
GAMMA = 4.0  # of LoRA-GA, as in the authors' notebook
DESCENTS = {"gradient descent": (1 / 16, 1000, None), "preconditioned": (0.5, 100, 1e-3)}


@dataclass
class Problem:
    """One draw of the experiment, float64.

    Attributes:
        delta: the update to find.
        second_moment: `X^T X / N` of the inputs.
    """

    delta: Tensor
    second_moment: Tensor

    @classmethod
    def draw(cls, seed: int) -> "Problem":
        """Draw the target's singular vectors and the inputs."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(DIMENSION, DIMENSION, generator=generator).double()
        svd = truncated_svd(draw, TARGET_RANK)
        values = torch.arange(TARGET_RANK, 0, -1).double() / TARGET_RANK
        X = torch.randn(N_INPUTS, DIMENSION, generator=generator).double()
        return cls((svd.U * values) @ svd.Vh, X.T @ X / N_INPUTS)

    def gradient(self, update: Tensor) -> Tensor:
        """Gradient of the loss with respect to the weight, at `W0 + update`."""
        return (update - self.delta) @ self.second_moment

    def risk(self, update: Tensor) -> float:
        """`|update - Delta|_F^2 / 2`."""
        return (update - self.delta).square().sum().item() / 2


def starts(problem: Problem, seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """`A0`, `B0` and the anchor that is subtracted, by name."""
    G = problem.gradient(torch.zeros_like(problem.delta))
    triplets = truncated_svd(G, 2 * RANK)
    generator = torch.Generator().manual_seed(seed)
    bound = DIMENSION**-0.5  # PEFT's default for A
    A = (2 * torch.rand(RANK, DIMENSION, generator=generator).double() - 1) * bound
    none = torch.zeros_like(problem.delta)
    length = DIMENSION**0.25 / GAMMA**0.5
    A_ga, B_ga = lora_ga_factors(triplets, direction="ArB2r", lengths=(length, length))
    A_swapped, B_swapped = lora_ga_factors(triplets, direction="A2rBr", lengths=(length, length))
    spectral = lora_one_factors(triplets.truncate(RANK), gamma=1 / triplets.S[0].item())
    return {
        "LoRA": (A, torch.zeros(DIMENSION, RANK).double(), none),
        "LoRA-One (spectral)": (*spectral, none),
        "LoRA-GA, ArB2r": (A_ga, B_ga, B_ga @ A_ga),
        "LoRA-GA, A2rBr": (A_swapped, B_swapped, B_swapped @ A_swapped),
        "LoRA-GA, ArB2r, without subtraction": (A_ga, B_ga, none),
    }


def descend(
    problem: Problem, A: Tensor, B: Tensor, anchor: Tensor, descent: str
) -> tuple[Tensor, Tensor]:
    """Train the factors and return them."""
    lr, n_steps, ridge = DESCENTS[descent]
    eye = torch.eye(RANK).double()
    for _ in range(n_steps):
        G = problem.gradient(B @ A - anchor)
        grad_A, grad_B = B.T @ G, G @ A.T
        if ridge is not None:
            grad_A = torch.linalg.solve(B.T @ B + ridge * eye, grad_A)
            grad_B = torch.linalg.solve(A @ A.T + ridge * eye, grad_B.T).T
        A, B = A - lr * grad_A, B - lr * grad_B
    return A, B


def floor(problem: Problem, anchor: Tensor) -> float:
    """The smallest risk that factors of rank `RANK` can reach."""
    return torch.linalg.svdvals(problem.delta + anchor)[RANK:].square().sum().item() / 2


def run(seed: int) -> dict[str, dict[str, float]]:
    """Final risks and floors, by start."""
    problem = Problem.draw(seed)
    results = {}
    for name, (A0, B0, anchor) in starts(problem, seed).items():
        results[name] = {"floor": floor(problem, anchor)}
        for descent in DESCENTS:
            A, B = descend(problem, A0, B0, anchor, descent)
            results[name][descent] = problem.risk(B @ A - anchor)
    return results


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    runs = [run(seed) for seed in range(parser.parse_args().seeds)]
    table = Table(title=f"risk at the end, median (range) over {len(runs)} seeds")
    table.add_column("start")
    columns = [*DESCENTS, "floor"]
    for column in columns:
        table.add_column(column, justify="right")
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [r[name][column] for r in runs]
            middle = statistics.median(values)
            cells.append(f"{middle:.1e} ({min(values):.0e} to {max(values):.0e})")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
