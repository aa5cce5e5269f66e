"""Losses are found where `Trainer` finds them, and errors of the model stay what they are."""

import sys

import pytest
import torch
from torch import nn

from peft_gradinit.errors import DataError
from tests.calibration.passes import FLOAT32, gradients, worst_error


class Net(nn.Module):
    """A model of the user's, with an output of the form that `output_of` makes."""

    def __init__(self, output_of):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.output_of = nn.Linear(6, 3), output_of

    def forward(self, x, labels=None):
        logits = self.a(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return self.output_of(loss, logits)


OUTPUTS = {
    "dict": lambda loss, logits: {"loss": loss, "logits": logits},
    "tuple": lambda loss, logits: (logits,) if loss is None else (loss, logits),
    "list": lambda loss, logits: [loss, logits],
}


def batch_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, labels = torch.randn(4, 6, generator=generator), torch.tensor([0, 1, 2, 0])
    return {"x": x, "labels": labels}


@pytest.mark.parametrize("form", OUTPUTS)
def test_the_loss_of_dicts_and_tuples_is_that_of_the_trainer(form):
    model, batch = Net(OUTPUTS[form]), batch_of()
    loss = nn.functional.cross_entropy(model.a(batch["x"]), batch["labels"])
    (want,) = torch.autograd.grad(loss, [model.a.weight])
    assert worst_error(gradients(model, [batch]), {"a": want}) < FLOAT32


@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_without_a_loss_are_refused(form):
    with pytest.raises(DataError, match=r"Net returned no loss .* add 'labels'"):
        gradients(Net(OUTPUTS[form]), [{"x": batch_of()["x"]}])


def test_an_error_of_the_model_stays_what_it_is_and_names_the_batch():
    class Failing(Net):
        def forward(self, x, labels=None):
            if x.isnan().any():
                raise ZeroDivisionError("of the user")
            return super().forward(x, labels)

    bad = {**batch_of(), "x": torch.full((4, 6), torch.nan)}
    model = Failing(OUTPUTS["dict"])
    with pytest.raises(ZeroDivisionError, match=r"^of the user") as caught:
        gradients(model, [batch_of(), batch_of(), bad])
    assert caught.traceback[-1].name == "forward"
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["It was raised in calibration batch 3."]
