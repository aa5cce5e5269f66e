"""Layers and losses that the taps cannot serve are refused by name; the rest is counted once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_gradinit.errors import CalibrationError
from tests.calibration.input_passes import measure as measure_inputs
from tests.calibration.passes import FLOAT32, gradients, linears, worst_error


class ReturnsATuple(nn.Linear):
    """As the router of Llama 4."""

    def forward(self, x):
        return super().forward(x), x


class Net(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.outer, self.inner, self.head = nn.Linear(6, 5), layer(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.inner(self.outer(x).tanh())
        return self.head((h[0] if isinstance(h, tuple) else h).tanh())


def batches():
    torch.manual_seed(1)
    return [(torch.randn(4, 6), torch.randint(0, 3, (4,)))]


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("run", [gradients, measure_inputs])
def test_layer_that_returns_a_tuple_is_refused_by_name(run):
    message = r"^inner \(ReturnsATuple\) returns a tuple where .* exclude_modules=\['inner'\]"
    with pytest.raises(CalibrationError, match=message):
        run(Net(ReturnsATuple), batches(), loss_fn=loss_of)


def slope(model, x, **options):
    """The gradient of the output with respect to the input, as in force fields."""
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(model(x).square().sum(), x, **options)[0]


def test_losses_of_second_order_are_refused_by_name():
    def loss_fn(model, batch):
        return slope(model, batch[0], create_graph=True).square().mean()

    message = r"differentiates the output of \w+ by itself .*Use plain LoRA"
    with pytest.raises(CalibrationError, match=message):
        gradients(Net(), batches(), loss_fn=loss_fn)
    with pytest.raises(CalibrationError, match=r"differentiates by itself.*without gradients"):
        measure_inputs(Net(), batches(), loss_fn=loss_fn)


def test_only_the_backward_of_the_pass_counts():
    def loss_fn(model, batch):
        size = slope(model, batch[0]).norm()  # a number, not differentiated again
        return loss_of(model, batch) * (1 + size)

    model, (batch,) = Net(), batches()
    weights = [module.weight for module in linears(model).values()]
    found = torch.autograd.grad(loss_fn(model, batch), weights)
    want = dict(zip(linears(model), found, strict=True))
    assert worst_error(gradients(model, [batch], loss_fn=loss_fn), want) < FLOAT32
