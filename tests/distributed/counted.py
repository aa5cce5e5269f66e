"""What the processes of `tests/calibration/test_plan.py` run: passes whose collectives are counted."""

import torch.distributed as dist

from peft_gradinit import Calibration, EvaConfig, LoraGAConfig, calibrate
from peft_gradinit.layouts.world import Processes
from tests.helpers import pad, pico_llama, rows_of, token_batches

N = 37
WIDE = {"hidden_size": 192, "intermediate_size": 448, "num_hidden_layers": 1}


def config_of(config_cls):
    rho = {"rho": 1} if config_cls is EvaConfig else {}
    targets = ["q_proj", "k_proj", "down_proj"]  # k_proj is so narrow that it is kept whole
    return config_cls(r=4, target_modules=targets, **rho)


def batches():
    rows = rows_of(token_batches(n=N, batch_size=5, length=24, seed=3))
    return [pad(rows[i : i + 5]) for i in range(0, N, 5)]


class Counted:
    """Counts the payload of all collectives of tensors, by kind."""

    def __init__(self):
        self.bytes = {"sum": 0, "broadcast": 0}

    def watch(self):
        in_buckets = Processes._in_buckets

        def counting(world, tensors, collective):
            kind = "sum" if collective is dist.all_reduce else "broadcast"
            tensors = list(tensors)
            self.bytes[kind] += sum(t.numel() * t.element_size() for t in tensors)
            in_buckets(world, tensors, collective)

        Processes._in_buckets = counting


def passes():
    """For both statistics and both estimators: bytes sent, bytes held, targets and tokens."""
    found = {}
    counted = Counted()
    counted.watch()
    for config_cls in (LoraGAConfig, EvaConfig):
        for estimator in ("sketch", "dense"):
            counted.bytes = {"sum": 0, "broadcast": 0}
            calibration = Calibration(batches(), progress=False, estimator=estimator)
            result = calibrate(pico_llama(**WIDE), config_of(config_cls), calibration)
            facts = result.facts
            found[config_cls.__name__, estimator] = {
                **counted.bytes,
                "held": facts.state_bytes,
                "targets": result.fingerprint.targets,
                "read": (facts.n_sequences, facts.n_tokens),
            }
    return found
