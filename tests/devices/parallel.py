"""What the processes of `test_parallel` run; importing it loads the stand-in."""

import torch
import torch.distributed as dist
from torch import nn

from tests.devices import backend, collectives

if not hasattr(torch, backend.NAME):
    backend.load()
collectives.register()

from peft_gradinit import calibrate  # noqa: E402
from tests.devices.models import ONE, OTHER, measured, over_two, products, started, wide  # noqa: E402
from tests.helpers import quiet, token_batches  # noqa: E402
from tests.methods.rows import WITH_DATA, config_of  # noqa: E402

N_PROCESSES = 3


def batches():
    return token_batches(36, 4, seed=3)


def place() -> str:
    """Processes of one machine have different devices."""
    return (ONE, OTHER)[dist.get_rank() % 2] if dist.is_initialized() else "cpu"


def few_targets():
    """Fewer layers than processes: some have none to factor."""
    return {m: _of_two_layers(m) for m in WITH_DATA}


def _of_two_layers(method: str):
    model = wide().to(place())
    config = config_of(method, data=None, target_modules=["up_proj"])
    return products(calibrate(model, config, quiet(batches())))


def over_devices():
    """Every process has its model on two devices."""
    place_all = over_two if dist.is_initialized() else lambda model: model
    return {m: products(measured(m, place_all(wide()), batches())) for m in WITH_DATA}


class Branches(nn.Module):
    """Two branches on two devices; a batch runs through one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(160, 160)
        self.one = nn.Linear(160, 160)
        self.other = nn.Linear(160, 160)

    def forward(self, x, branch, labels):
        h = torch.tanh(self.first(x))
        layer = self.other if branch.item() else self.one
        device = layer.weight.device
        return {"loss": (layer(h.to(device)) - labels.to(device)).square().mean()}


def branches():
    """Data of a process's own: a layer that it never runs is on another device than the first one."""
    model = Branches()
    if dist.is_initialized():
        model = model.to(ONE)
        model.other.to(OTHER)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(8, 160, generator=generator) for _ in range(4 * N_PROCESSES)]
    wanted = torch.randn(160, 2, generator=generator) @ torch.randn(2, 160, generator=generator)
    data = [  # what is to be learned has as many directions as are asked for
        {"x": x, "branch": torch.tensor([i % N_PROCESSES == 1]), "labels": x @ wanted}
        for i, x in enumerate(rows)
    ]
    if dist.is_initialized():
        data = data[dist.get_rank() :: N_PROCESSES]
    config = {"target_modules": ["one", "other"], "task_type": None, "r": 2}
    return {
        m: products(calibrate(model, config_of(m, data=None, **config), quiet(data)))
        for m in WITH_DATA
    }


def starts():
    """The factors of adapters, where every process brings its weights to a device of its own."""
    return {m: started(m, wide().to(place()), data=quiet(batches()))[1] for m in WITH_DATA}


def everything():
    """All of it, since to start three processes takes longer than what they run."""
    functions = (few_targets, over_devices, branches, starts)
    return {function.__name__: function() for function in functions}
