"""Tests in turn: `--share 2/4` runs the second quarter, so that CI sees all of them in four days."""

import re
import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", help="run the K-th of N shares of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := config.getoption("--share"):
        names = in_share([item.nodeid for item in items], share)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
        items[:] = [item for item in items if item.nodeid in names]


def in_share(names: list[str], share: str) -> set[str]:
    """Those of a share. A test stays in its share when others come or go."""
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    k, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= k <= n:
        raise pytest.UsageError(f"--share: expected K/N with 1 <= K <= N, got {share!r}.")
    return {name for name in names if zlib.crc32(name.encode()) % n == k - 1}
