"""Which statistics are worked on together. Tensors without values stand for those of a device."""

import torch

from peft_gradinit.statistics import SketchedGradient, TestMatrixPool, groups, in_groups

META = torch.device("meta")


def sketch(out_features: int = 200, device: torch.device = META) -> SketchedGradient:
    statistic = SketchedGradient(out_features, 150, width=60, seed=0, pool=TestMatrixPool())
    statistic.sums(device)
    return statistic


def grouped(statistics, sizes=None):
    """Indices of the groups, and what came back."""
    names = {id(statistic): i for i, statistic in enumerate(statistics)}
    seen = []

    def work(group):
        seen.append([names[id(statistic)] for statistic in group])
        return [names[id(statistic)] for statistic in group]

    return seen, in_groups(statistics, lambda s: s, work, sizes)


def test_statistics_of_one_kind_on_a_device_are_one_group():
    found, results = grouped([sketch(), sketch(100), sketch(), sketch()])

    assert found == [[0, 2, 3], [1]]
    assert results == [0, 1, 2, 3]


def test_what_is_read_in_different_size_or_is_elsewhere_is_apart():
    oriented, cpu = sketch(), sketch(device=torch.device("cpu"))
    oriented.orient()

    assert grouped([sketch(), sketch(), sketch()], [8, 4, 8])[0] == [[0, 2], [1]]
    assert grouped([sketch(), oriented, cpu])[0] == [[0], [1], [2]]


def test_a_stack_is_bounded(monkeypatch):
    three = 3 * sketch().n_bytes()
    monkeypatch.setattr(groups, "STACKED_BYTES", three)

    assert [len(group) for group in grouped([sketch() for _ in range(8)])[0]] == [3, 3, 2]


def test_on_the_cpu_everything_is_alone():
    cpu = torch.device("cpu")

    assert sorted(grouped([sketch(device=cpu), sketch(device=cpu)])[0]) == [[0], [1]]


def test_nothing_is_no_group():
    assert grouped([]) == ([], [])
