"""Scripts in processes of their own, each with a Hugging Face home of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.hub.server import TOKEN

ROOT = Path(__file__).parents[2]


def run(command, directory, hub, home):
    """Python with this command, in a directory, on the Hub of the test.

    One thread is asked for by the scripts themselves, not by the environment.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(directory / home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment.pop("OMP_NUM_THREADS", None)
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment, cwd=directory, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
