"""Run the notebook of `examples/`, with the Hub of the tests in place of the real one.

python -m tests.notebooks     stores the outputs in the notebook, too
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.hub.server import TOKEN, Hub

NOTEBOOK = Path(__file__).parents[1] / "examples" / "calibration_to_hub.ipynb"


def executed(folder):
    """The notebook with new outputs, run in a folder; and what was uploaded.

    Standard error is left out: bars, and what libraries say when they are imported.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with Hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(folder / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
            "OMP_NUM_THREADS": "1",
        }
        client = NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
        )
        client.execute(env=environment)
        assert hub.unknown == []
        uploaded = {name: repo.files for name, repo in hub.repos.items()}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return notebook, uploaded


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        notebook, _ = executed(Path(folder))
    nbformat.write(notebook, NOTEBOOK)
