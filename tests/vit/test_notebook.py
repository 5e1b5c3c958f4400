"""The notebook runs from its first cell to its last; its own checks are assertions."""

import os
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "notebooks/explore_vit.ipynb"


def read():
    import nbformat

    return nbformat.read(PATH, as_version=4)


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default")  # Jupyter's own
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = read()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(PATH.parents[1]), os.environ.get("PYTHONPATH", "")])
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 6
    if out := os.environ.get("SAVE_NOTEBOOK"):
        nbformat.write(notebook, out)


@pytest.mark.filterwarnings("default")
def test_the_saved_notebook_has_all_its_outputs_in_order():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 6
