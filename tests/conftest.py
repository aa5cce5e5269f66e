"""Settings for all tests: offline, few threads, one seed."""

import os

import pytest
import torch

from tests.shares import pytest_addoption, pytest_collection_modifyitems  # noqa: F401 hooks

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)  # 10 times faster than 2 when other processes share the cores


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
