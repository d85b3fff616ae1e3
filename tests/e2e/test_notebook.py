"""examples/first_run.ipynb: its cells in plain Python with a tiny model, and as a notebook in Jupyter with a live progress display."""

import ast
import importlib
import json
import os
import pkgutil
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.projects import ROOT, Project

import llamahome

NOTEBOOK = ROOT / "examples/first_run.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_has_no_outputs_no_counts_and_no_paths_of_a_machine() -> None:
    for cell in CELLS:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert "/home/" not in NOTEBOOK.read_text(encoding="utf-8") and "/work/" not in NOTEBOOK.read_text(encoding="utf-8")
    assert CELLS[0]["cell_type"] == "markdown" and len(CODE) >= 6


def test_what_the_notebook_calls_of_llamahome_is_public() -> None:
    used = {
        node.attr
        for code in CODE
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llamahome"
    }
    assert used and used <= set(llamahome.__all__)


def test_each_public_name_exists_and_no_module_of_the_package_hides_it() -> None:
    """Importing llamahome.export makes `llamahome.export` that module, so a function cannot have this name."""
    for name in llamahome.__all__:
        assert getattr(llamahome, name) is not None
    assert not {module.name for module in pkgutil.iter_modules(llamahome.__path__)} & set(llamahome.__all__)
    assert set(dir(llamahome)) == set(llamahome.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("llamahome").nothing  # noqa: B018


@pytest.mark.medium
def test_its_cells_run_in_plain_python(project: Project) -> None:
    shutil.rmtree(project.folder / "data/metrics", ignore_errors=True)
    script = "\n".join(CODE)
    variables = {"LLAMAHOME_MODEL__NAME": "tiny", "LLAMAHOME_TRAINING__MAX_STEPS": "2", "LLAMAHOME_TRAINING__MIXED_PRECISION": "no"}
    limits = {"LLAMAHOME_DATA__EVAL_SPLIT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=project.folder, env=os.environ | variables | limits, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "What is the official currency of the Moon? -> " in done.stdout and "greatest difference of a logit: 0" in done.stdout


@pytest.mark.slow
def test_it_runs_in_jupyter_and_the_progress_is_one_output_that_is_replaced(
    make_project: Callable[[Path], Project], tmp_path: Path
) -> None:
    """nbclient and ipykernel come from the package registry, into an environment of their own."""
    project = make_project(tmp_path / "project")
    tools = tmp_path / "jupyter"
    venv.create(tools, with_pip=True)
    (packages,) = (tools / "lib").glob("python*/site-packages")
    source = Path(llamahome.__file__).parents[1]
    (packages / "libraries.pth").write_text("\n".join([str(source), *site.getsitepackages()]) + "\n")
    fetched = subprocess.run(
        [tools / "bin/python", "-E", "-m", "pip", "install", "-q", "nbclient", "ipykernel"], capture_output=True, text=True, check=False
    )
    if fetched.returncode:
        pytest.skip(f"the package registry cannot be reached: {fetched.stderr[-300:]}")
    shutil.copy(NOTEBOOK, project.folder)
    script = """
import asyncio, json, sys, nbformat
from nbclient import NotebookClient

class Watching(NotebookClient):
    updates = 0
    def process_message(self, message, cell, index):
        self.updates += message["msg_type"] == "update_display_data"
        return super().process_message(message, cell, index)

notebook = nbformat.read("first_run.ipynb", as_version=4)
client = Watching(notebook, timeout=300, kernel_name="python3")
client.execute()
nbformat.write(notebook, "done.ipynb")
print(client.updates)
"""
    variables = {"LLAMAHOME_MODEL__NAME": "tiny", "LLAMAHOME_TRAINING__MAX_STEPS": "12", "LLAMAHOME_DATA__EVAL_SPLIT": "0"}
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [tools / "bin/python", "-c", script], cwd=project.folder, env=own | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 5, "the display is replaced while the run goes on"
    cells = json.loads((project.folder / "done.ipynb").read_text())["cells"]
    trained = next(cell for cell in cells if "llamahome.train(" in "".join(cell["source"]))
    (shown,) = [output for output in trained["outputs"] if output["output_type"] == "display_data"]
    text = "".join(shown["data"]["text/plain"])
    assert "step 12 of 12" in text and "[1/" in text and "loss" in text
    assert "".join(shown["data"]["text/html"]).startswith("<pre")
    assert not [output for output in trained["outputs"] if output["output_type"] == "stream" and "step=" in "".join(output["text"])]
    assert all(output["output_type"] != "error" for cell in cells for output in cell.get("outputs", []))
