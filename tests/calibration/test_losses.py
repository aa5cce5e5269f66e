"""Losses are found where `Trainer` finds them, and errors of the model stay what they are."""

import collections
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import YolosConfig, YolosForObjectDetection

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


def test_batches_that_the_forward_does_not_take_are_named():
    batch = batch_of()
    with pytest.raises(DataError, match=r"of 2 parts does not fit Linear.forward\(input.*loss_fn="):
        gradients(nn.Linear(6, 3), [(batch["x"], batch["labels"])])
    with pytest.raises(DataError, match=r"'labels'\] does not fit Net.forward\(x, .*: missing"):
        gradients(Net(OUTPUTS["dict"]), [{"labels": batch["labels"], "inputs": batch["x"]}])


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


FORMS = {
    "defaultdict": lambda batch: collections.defaultdict(list, batch),
    "read-only": types.MappingProxyType,
    "numpy": dict,
}


@pytest.mark.parametrize("form", FORMS)
def test_batches_and_weights_of_other_kinds_are_read(form):
    batches = [{k: v[:n] for k, v in batch_of(n).items()} for n in (4, 2)]

    def loss_fn(model, batch):
        loss = nn.functional.cross_entropy(model(batch["x"])["logits"], batch["labels"])
        return (loss, np.float32(len(batch["x"]))) if form == "numpy" else loss

    want = gradients(Net(OUTPUTS["dict"]), batches)
    got = gradients(Net(OUTPUTS["dict"]), [FORMS[form](b) for b in batches], loss_fn=loss_fn)
    assert worst_error(got, want) < FLOAT32


def test_labels_of_a_detector_are_dicts_of_each_image():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": [32, 32], "patch_size": 16}
    config = YolosConfig(**sizes, num_detection_tokens=4, num_labels=3, initializer_range=0.3)
    of_image = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": [of_image, of_image]}
    model = YolosForObjectDetection(config).eval()
    name = "vit.encoder.layer.0.attention.attention.value"
    model(**batch).loss.backward()
    want = model.get_submodule(name).weight.grad
    got = gradients(model, [batch], {name: model.get_submodule(name)})
    assert worst_error(got, {name: want}) < FLOAT32
