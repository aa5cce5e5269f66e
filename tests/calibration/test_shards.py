"""A loader whose sharding is undone keeps everything else that it was made with."""

import functools

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, get_worker_info

from peft_gradinit.calibration import unsharded

N = 11


class Stream(IterableDataset):
    """Numbers, all of them in every worker until `set_start` gives each its own."""

    def __init__(self, n):
        self.start, self.step, self.n = 0, 1, n

    def __iter__(self):
        return iter(range(self.start, self.n, self.step))


def set_start(worker):
    info = get_worker_info()
    stream = getattr(info.dataset, "dataset", info.dataset)
    stream.start, stream.step = worker, info.num_workers


class Backwards(DistributedSampler):
    def __iter__(self):
        return iter(range(len(self.dataset))[:: -self.num_replicas][self.rank :])


def read(loader):
    return torch.cat(list(loader)).tolist()


def test_workers_start_as_the_users_loader_starts_them():
    plain = DataLoader(Stream(N), batch_size=2, num_workers=2, worker_init_fn=set_start)
    prepared = prepare_data_loader(plain, num_processes=2, process_index=1, put_on_device=False)
    assert sorted(read(unsharded(prepared))) == list(range(N))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_sampler_of_a_kind_of_its_own_keeps_its_order(rank):
    sampler = Backwards(range(N), num_replicas=2, rank=rank)
    loader = DataLoader(range(N), batch_size=4, sampler=sampler)
    assert read(unsharded(loader)) == list(range(N))[::-1]
    assert (sampler.num_replicas, sampler.rank) == (2, rank)


def test_a_plain_sampler_reads_every_sample_once_in_the_order_of_its_epoch():
    samplers = [DistributedSampler(range(N), 2, rank, seed=3) for rank in (0, 1)]
    for sampler in samplers:
        sampler.set_epoch(5)
    orders = [read(unsharded(DataLoader(range(N), 4, sampler=sampler))) for sampler in samplers]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == list(range(N))
    alternating = [list(sampler) for sampler in samplers]
    assert orders[0][::2] == alternating[0][: len(orders[0][::2])]


@pytest.mark.parametrize(
    "options",
    [{"drop_last": True}, {"timeout": 5, "num_workers": 1, "prefetch_factor": 3}],
    ids=str,
)
def test_what_the_loader_was_made_with_is_kept(options):
    generator, collate = torch.Generator(), functools.partial(torch.tensor, dtype=torch.int32)
    plain = DataLoader(Stream(N), 4, generator=generator, collate_fn=collate, **options)
    prepared = prepare_data_loader(plain, num_processes=2, process_index=0, put_on_device=False)
    whole = unsharded(prepared)
    assert whole.generator is generator
    assert whole.collate_fn is collate
    assert all(getattr(whole, name) == value for name, value in options.items())
