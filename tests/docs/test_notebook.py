"""The notebook of the docs runs, from planning to the answer of the trained model."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Puts `llava-jax` in front of the PATH, whether the package is installed or not."""
    script = tmp_path / "bin" / "llava-jax"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llava_jax "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", "")


def output_of(notebook: nbformat.NotebookNode, word: str) -> str:
    """What the one code cell with this word printed or showed."""
    (cell,) = [c for c in notebook.cells if c.cell_type == "code" and word in c.source]
    texts = [o.get("text") or "".join(o.get("data", {}).values()) for o in cell.outputs]
    return "".join(texts)


# Jupyter's own libraries warn about each other's versions.
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("command")
def test_quickstart(tmp_path):
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is kept without outputs"
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=place).execute()

    plan = output_of(notebook, "llava-jax plan")
    assert "needs the GPU compiler: pip install" in plan or "GiB" in plan
    assert "step 40/40" in output_of(notebook, "llava-jax train")
    assert "step  31" in output_of(notebook, "metrics.jsonl")
    assert "&lt;svg" in output_of(notebook, "report.html")
    assert output_of(notebook, "llava-jax chat").strip() == "red"
    assert (tmp_path / "runs" / "quickstart" / "adapter").is_dir()
