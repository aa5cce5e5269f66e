"""Short ways to run a pass over inputs, and its oracle by plain hooks."""

import math

import torch

from peft_gradinit.calibration import Inputs
from peft_gradinit.calibration import measure as measure_need
from peft_gradinit.statistics import Fingerprint
from tests.calibration.passes import linears, shape_of
from tests.helpers import overlap, quiet, token_batches

RANK = 4
CLOSE = 1e-4
"""A float32 pass against float64 sums of the same inputs."""


def measure(model, data, modules=None, rank=RANK, **options):
    """Components of the inputs of every linear layer; options go where they belong."""
    modules = linears(model) if modules is None else modules
    own = {k: options.pop(k) for k in ("centered", "use_labels", "settle")
           if k in options}  # fmt: skip
    calibration = quiet(data, **{"estimator": "dense", **options})
    targets = {n: [*shape_of(m), rank] for n, m in modules.items()}
    fingerprint = Fingerprint("inputs", {}, targets, calibration.measurement_options())
    return measure_need(model, modules, calibration, fingerprint, Inputs(**own))


def exact(model, batches, keep, centered=True):
    """Eigenpairs of every layer's inputs at the tokens that `keep(batch)` marks, by plain hooks."""
    seen = {name: [] for name in linears(model)}
    for batch in batches:
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, name=name, batch=batch: seen[name].append(args[0][keep(batch)])
            )
            for name, module in linears(model).items()
        ]
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
    found = {}
    for name, parts in seen.items():
        x = torch.cat(parts).double()
        x = x - x.mean(0) if centered else x
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        found[name] = (vectors.flip(1).T[:RANK], values.flip(0)[:RANK], values.sum().item())
    return found


def agree(result, want):
    """Whether components, their variances and the totals are those of the oracle."""
    assert result.triplets.keys() == want.keys()
    return all(
        overlap(result.triplets[name].Vh.double(), Vh) > 1 - CLOSE
        and torch.allclose(result.triplets[name].S.double().square(), variance, rtol=CLOSE)
        and math.isclose(result.energy[name], total, rel_tol=CLOSE)
        for name, (Vh, variance, total) in want.items()
    )


def same(a, b):
    """Whether two results hold the same components."""
    assert a.triplets.keys() == b.triplets.keys()
    return all(
        overlap(a.triplets[n].Vh, b.triplets[n].Vh) > 1 - CLOSE
        and torch.allclose(a.triplets[n].S, b.triplets[n].S, rtol=CLOSE)
        for n in a.triplets
    )


def unpadded(batch):
    return batch["attention_mask"].bool()


def predicting(batch):
    """Tokens whose next label is kept."""
    keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
    keep[:, :-1] = batch["labels"][:, 1:] != -100
    return keep


def masked_prompts():
    """Batches in which the first six tokens of every sequence carry no label."""
    batches = token_batches()
    for batch in batches:
        batch["labels"][:, :6] = -100
    return batches
