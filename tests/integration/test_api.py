"""The four names for programs: light to import, and what the notebook shows is so."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import tomli_w
from nbclient import NotebookClient

import secure_fed
from secure_fed.clients.site import Site
from secure_fed.lab.simulation import simulate
from secure_fed.protocol.study import Template
from secure_fed.server.coordinator import Coordinator
from tests.conftest import Federation, template_table

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "open_clip", "opacus", "tenseal", "secure_fed.clients", "secure_fed.server", "numpy")


def test_the_package_itself_loads_nothing() -> None:
    program = f"import sys, secure_fed; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_names_are_those_at_home() -> None:
    assert secure_fed.__all__ == ["Coordinator", "Site", "Template", "simulate"]
    found = [getattr(secure_fed, name) for name in secure_fed.__all__]
    assert found == [Coordinator, Site, Template, simulate]
    assert set(dir(secure_fed)) == {*secure_fed.__all__, "__version__"}
    assert secure_fed.__version__ == version("secfacmic")
    with pytest.raises(AttributeError, match="no attribute 'Sight'"):
        secure_fed.__getattr__("Sight")


def test_a_packaged_template_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Template.read("demo").name == "demo"
    assert Template.read(Path("configs/demo.toml")) == Template.read("demo")


def test_what_is_simulated_is_named_by_strings_too(images: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(tomli_w.dumps(template_table(rounds=1)))
    out = tmp_path / "out"
    found = simulate(str(tmp_path / "small.toml"), str(out), str(images))
    assert found == json.loads((out / "summary.json").read_text())


def test_the_name_of_0_1_still_reads_either_kind_and_warns(federation: Federation) -> None:
    for path, kind in ((Path("demo"), secure_fed.Template), (federation.folder / "study.toml", secure_fed.Study)):
        with pytest.deprecated_call(match="Template.read"):
            assert type(secure_fed.Study.read(path)) is kind


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From anywhere, start to end; what it prints is there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples" / "api.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    for expected in (
        *("zero_shot 0.", "federated 0.", "training images and feature width: (", ", 512)"),
        *("round 1 of east, north, south -", "round 2 of east, north, south, west -"),
        *("['genesis', 'aggregate', 'aggregate']", "'coordinator.key'"),
    ):
        assert expected in printed


def test_the_notebook_is_kept_without_output() -> None:
    cells = json.loads((ROOT / "examples" / "api.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
