"""The stand-in does what an accelerator does: other values would make all its tests worthless."""

import copy
import io

import pytest
import torch
from torch import Tensor

from tests.devices.backend import counted, without

ONE, OTHER = "standin:0", "standin:1"


def of_two_devices() -> dict[str, tuple]:
    a, b = torch.ones(4, 3, device=ONE), torch.ones(3, 2)
    return {
        "a product with the CPU": (torch.mm, a, b),
        "a product with the other": (torch.mm, a, b.to(OTHER)),
        "a sum": (torch.add, a, torch.ones(4, 3)),
        "a concatenation": (torch.cat, [a, torch.ones(4, 3)]),
        "an index of a CPU tensor": (Tensor.__getitem__, b, torch.tensor([0], device=ONE)),
        "a write into memory": (Tensor.addmm_, a, a, torch.ones(3, 3)),
    }


@pytest.mark.parametrize("case", of_two_devices())
def test_devices_do_not_mix(case):
    function, *arguments = of_two_devices()[case]
    with pytest.raises((RuntimeError, IndexError), match="device"):
        function(*arguments)


def test_what_cuda_allows_is_allowed():
    a = torch.arange(6.0, device=ONE).view(2, 3)
    assert torch.equal((a * torch.tensor(2.0)).cpu(), a.cpu() * 2)  # a number on the CPU
    assert torch.equal(a[torch.tensor([1])].cpu(), a.cpu()[[1]])  # an index on the CPU
    assert torch.equal(a.to(OTHER).cpu(), a.cpu())


def test_values_are_those_of_the_cpu():
    x = torch.randn(6, 5)
    for function in (torch.linalg.svd, torch.linalg.qr, lambda t: torch.linalg.eigh(t.T @ t)):
        for there, here in zip(function(x.to(OTHER)), function(x), strict=True):
            assert there.device == torch.device(OTHER)
            assert torch.equal(there.cpu(), here)


def test_gradients_flow_over_two_devices():
    w = torch.randn(5, 3)
    x = torch.randn(2, 3)

    def gradients(one: str, other: str) -> tuple[Tensor, ...]:
        a, b = x.to(one).requires_grad_(), w.to(other).requires_grad_()
        loss = torch.nn.functional.linear(a.to(other), b).relu().sum()
        return torch.autograd.grad(loss, (a, b))

    there = gradients(ONE, OTHER)
    assert [str(g.device) for g in there] == [ONE, OTHER]
    for got, want in zip(there, gradients("cpu", "cpu"), strict=True):
        assert torch.equal(got.cpu(), want)


def test_views_share_memory():
    views = (lambda a: a[1], lambda a: a.T, lambda a: a.view(12), lambda a: a.unfold(0, 2, 1))
    for view in (*views, torch.diagonal, lambda a: a.split([1, 3])[1]):
        there, here = torch.zeros(4, 3, device=ONE), torch.zeros(4, 3)
        view(there).fill_(1.0)
        view(here).fill_(1.0)
        assert torch.equal(there.cpu(), here)
    assert torch.empty(0, device=OTHER).resize_(7).shape == (7,)


def test_new_memory_holds_garbage():
    assert not torch.isclose(torch.empty(8, device=ONE), torch.zeros((), device=ONE)).any()


def test_generators_belong_to_devices():
    torch.manual_seed(0)
    one = torch.rand(3, device=ONE), torch.rand(3, device=OTHER)
    torch.manual_seed(0)
    torch.rand(3)  # of the CPU's
    assert torch.equal(torch.rand(3, device=OTHER), one[1])
    assert torch.equal(torch.rand(3, device=ONE), one[0])
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=ONE, generator=torch.Generator())


def test_objects_survive_copies_and_files():
    a = torch.randn(3, 2, device=OTHER)
    file = io.BytesIO()
    torch.save({"a": a}, file)
    file.seek(0)
    for same in (copy.deepcopy(a), torch.load(file)["a"]):
        assert same.device == a.device
        assert torch.equal(same, a)


def test_work_is_counted():
    a = torch.ones(4, 4, device=ONE)
    with counted() as nothing:
        a.T[:2], a[:2].view(2, 2, 2)
    assert (nothing.kernels, nothing.waits) == (0, 0)
    with counted() as some:
        b = (a @ a + a).to("cpu")
        b.to(ONE)
        a.sum().item()
        a.nonzero()
    assert some.by_name == {"aten::mm": 1, "aten::add": 1, "aten::sum": 1, "aten::nonzero": 1}
    assert some.waits == 3
    assert (some.to_device, some.from_device) == (1, 2)


def test_memory_is_counted_by_device():
    before = torch.standin.memory_allocated(OTHER)
    torch.standin.reset_peak_memory_stats(OTHER)
    a = torch.zeros(1000, device=OTHER)
    assert torch.standin.memory_allocated(OTHER) - before == 4000
    del a
    assert torch.standin.memory_allocated(OTHER) == before
    assert torch.standin.max_memory_allocated(OTHER) - before == 4000


def test_it_can_refuse_what_mps_refuses():
    a = torch.eye(3, device=ONE)
    with without("aten::_linalg_eigh", float64=False):
        with pytest.raises(TypeError, match="float64"):
            a.double()
        with pytest.raises(TypeError, match="float64"):
            torch.zeros(3, device=ONE, dtype=torch.float64)
        with pytest.raises(NotImplementedError, match="eigh"):
            torch.linalg.eigh(a)
    assert torch.linalg.eigh(a.double())[0].dtype == torch.float64
