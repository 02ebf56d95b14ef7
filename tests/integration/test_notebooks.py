"""The notebooks of examples/ run from anywhere, start to end, and are kept without output."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "own_folders": ("['site_0', 'site_1', 'site_2', 'site_3']", "zero_shot 0.", "federated 0."),
    "using_an_adapter": ("promised: 0.9", "stranger: ", "['README.md', 'adapter.safetensors']", "pipeline_tag:"),
    "privacy_utility": ("epsilon 1.0 balanced accuracy", "epsilon None balanced accuracy", "zero-shot", "##"),
}
"""What each prints; api.ipynb has its test beside what it shows."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert [text for text in SHOWN[name] if text not in printed] == []


def test_notebooks_are_kept_without_output() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.ipynb")}
    assert names == {"api", *SHOWN}
    for name in names:
        for cell in nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4).cells:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
