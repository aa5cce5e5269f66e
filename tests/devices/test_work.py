"""What a pass and a step ask of the device: kernels, and waiting for values.

Kernels are counted for one more layer and one more batch, beyond those of the model itself, so that
neither factorisations nor the model are among them.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_gradinit.calibration.capture.experts import Parameter, Product
from peft_gradinit.statistics import SketchedGradient, TestMatrixPool, in_groups
from tests.devices.backend import Counts, counted
from tests.devices.models import ONE, measured, wide
from tests.helpers import pico_llama, token_batches
from tests.methods.rows import WITH_GRADIENTS, with_data

pytestmark = pytest.mark.slow

N_LINEAR = 7
"""Linear layers of a block."""

FEWER, MORE = 14, 18
"""Batches of two sequences; sketches are oriented before the first and after the last of them."""

Run = Callable[[nn.Module, list], None]


def of_one_layer(run: Run, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Kernels, and waits, of one more linear layer in one more batch."""

    def of(n_layers: int, n_batches: int) -> Counts:
        model = pico_llama(hidden_size=256, intermediate_size=512, num_hidden_layers=n_layers)
        data = token_batches(2 * n_batches, 2, length=16)
        model = model.to(ONE, dtype)
        with counted() as counts:
            run(model, data)
        return counts

    table = [[of(layers, batches) for batches in (FEWER, MORE)] for layers in (1, 2)]

    def slope(name: str) -> float:
        (a, b), (c, d) = [[getattr(counts, name) for counts in row] for row in table]
        return ((d - c) - (b - a)) / (MORE - FEWER) / N_LINEAR

    return slope("kernels"), slope("waits")


def alone(with_gradients: bool) -> Run:
    """The model without a calibration: a forward, and the gradient with respect to its inputs."""

    def run(model: nn.Module, data: list) -> None:
        model.requires_grad_(False)
        for batch in data:
            values = {name: tensor.to(ONE) for name, tensor in batch.items()}
            embedded = model.get_input_embeddings()(values.pop("input_ids"))
            with torch.set_grad_enabled(with_gradients):
                embedded.requires_grad_(with_gradients)
                loss = model(inputs_embeds=embedded, **values).loss
            if with_gradients:
                torch.autograd.grad(loss, embedded)

    return run


@functools.cache
def of_model_alone(with_gradients: bool, dtype: torch.dtype) -> float:
    return of_one_layer(alone(with_gradients), dtype)[0]


def of_pass(method: str, **options) -> Run:
    return lambda model, data: (measured(method, model, data, **options), None)[1]


KERNELS = {"lora_ga": (4.1, 5.9), "lora_one": (4.1, 5.9), "eva": (6.3, 8.4), "corda": (4.5, 6.2)}
"""Of a layer and a batch at most, in float32 and in half precision, where sums are a kernel of their
own. A sketch multiplies four times: inputs and output gradients by test columns, and what comes out by
the others."""


@with_data
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["sketch", "dense"])
def test_a_layer_costs_few_kernels_and_no_wait(method, estimator, dtype):
    kernels, waits = of_one_layer(of_pass(method, estimator=estimator), dtype)
    of_model = of_model_alone(method in WITH_GRADIENTS, dtype)
    assert kernels - of_model <= KERNELS[method][dtype == torch.bfloat16]
    assert waits == 0


@with_data
def test_a_batch_costs_few_waits(method):
    """Two for the number of labels and the loss; one for the tokens that count."""

    def waits(run: Run, n_batches: int) -> int:
        model = wide().to(ONE)
        with counted() as counts:
            run(model, token_batches(2 * n_batches, 2, length=16))
        return counts.waits

    with_gradients = method in WITH_GRADIENTS
    own = [waits(of_pass(method), n) - waits(alone(with_gradients), n) for n in (FEWER, MORE)]
    assert own[1] - own[0] <= (2 if with_gradients else 1) * (MORE - FEWER)


@with_data
def test_reading_a_layer_costs_few_waits(method):
    def waits(n_layers: int) -> int:
        size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": n_layers}
        model = pico_llama(**size).to(ONE)
        with counted() as counts:
            measured(method, model, token_batches(6, 2, length=16))
        return counts.waits

    assert (waits(3) - waits(1)) / 2 / N_LINEAR <= 5


def test_layers_of_one_shape_are_factored_together():
    def kernels(n_layers: int) -> int:
        sketches = [
            SketchedGradient(300, 260, width=64, seed=0, pool=TestMatrixPool())
            for _ in range(n_layers)
        ]
        for sketch in sketches:
            sketch.add(torch.randn(90, 260, device=ONE), torch.randn(90, 300, device=ONE))
            sketch.count(90)
        with counted() as counts:
            in_groups(sketches, lambda sketch: sketch, turned)
        return counts.kernels

    def turned(group: list[SketchedGradient]) -> list[SketchedGradient]:
        group[0].orient_alike(group)
        return group

    few, many = kernels(2), kernels(10)
    assert many - few <= 8 * 8  # what each layer keeps; a reconstruction has 50 kernels


def of_experts(**options) -> Product:
    """A product of token rows with four experts."""
    names = {index: f"experts[{index}]" for index in range(4)}
    parameter = Parameter(nn.Module(), "experts", False, "experts", names)
    return Product(parameter, torch.empty(0, device=ONE), **options)


@pytest.mark.parametrize(
    ("rows", "options", "waits"),
    [
        ((12, 5), {"experts": None, "ends": [2, 2, 9, 12]}, 1),  # sorted rows, as grouped kernels
        ((3, 4, 5), {"experts": [3, 0, 3]}, 1),  # blocks of rows, each with its expert
        ((4, 3, 5), {"experts": None}, 2),  # a block for each expert; zeros were routed elsewhere
        ((12, 5), {"experts": 2}, 0),
    ],
)
def test_rows_are_split_by_expert_with_few_waits(rows, options, waits):
    given = {
        name: torch.tensor(value, device=ONE) if isinstance(value, list) else value
        for name, value in options.items()
    }
    x, dy = torch.randn(rows, device=ONE), torch.randn(rows, device=ONE)
    with counted() as counts:
        parts = list(of_experts(**given).parts(x, dy))
    assert counts.waits == waits
    assert sum(len(part) for _, (part, _) in parts) == 12
