"""Tests in turn: `--share 2/4` runs the second quarter, so that CI sees all of them in eight days."""

import argparse
import re
import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", type=share_of, metavar="K/N", help="run the K-th of N shares of the tests"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := config.getoption("--share"):
        names = in_share([item.nodeid for item in items], *share)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
        items[:] = [item for item in items if item.nodeid in names]


def share_of(text: str) -> tuple[int, int]:
    """What is given as the option, `K/N`, as numbers."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    k, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= k <= n:
        raise argparse.ArgumentTypeError(f"expected K/N with 1 <= K <= N, got {text!r}")
    return k, n


def in_share(names: list[str], k: int, n: int) -> set[str]:
    """Those of the K-th of N shares. A test stays in its share when others come or go."""
    return {name for name in names if zlib.crc32(name.encode()) % n == k - 1}
