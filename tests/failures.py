"""Calibrations that fail half-way, and whether a model is as it was before them."""

import torch

from tests.helpers import quiet, token_batches


def snapshot(model):
    return (
        [(n, type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
        [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()],
        {n: t.clone() for n, t in model.state_dict().items()},
    )


def assert_as_before(model, before):
    modules, flags, weights = snapshot(model)
    assert (modules, flags) == before[:2]
    assert all(torch.equal(t, before[2][n]) for n, t in weights.items())


def failing_calibration(error, call=2):
    """The loss raises at its `call`-th use: 1 to 3 are the pass, later ones measure the drift."""
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == call:
            raise error
        return model(**batch).loss

    return quiet(token_batches(), loss_fn=loss_fn)
