"""The four names for programs: light to import, and what the notebook shows is so."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import tomli_w
from nbclient import NotebookClient

import secfacmic
import secure_fed
from secure_fed.clients.site import Site
from secure_fed.lab.simulation import simulate
from secure_fed.protocol.study import Template
from secure_fed.server.coordinator import Coordinator
from tests.conftest import Federation, template_table

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "open_clip", "opacus", "tenseal", "secure_fed.clients", "secure_fed.server", "numpy")


@pytest.mark.parametrize("name", ["secfacmic", "secure_fed"])
def test_the_package_itself_loads_nothing(name: str) -> None:
    program = f"import sys, {name}; print(sorted(set(sys.modules) & {set(HEAVY)!r}))"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [secfacmic, secure_fed], ids=lambda package: package.__name__)
def test_the_names_are_those_at_home(package: ModuleType) -> None:
    assert package.__all__ == ["Coordinator", "Site", "Template", "simulate"]
    found = [getattr(package, name) for name in package.__all__]
    assert found == [Coordinator, Site, Template, simulate]
    assert set(dir(package)) == {*package.__all__, "__version__"}
    assert package.__version__ == version("secfacmic")
    with pytest.raises(AttributeError, match="no attribute 'Sight'"):
        package.Sight  # noqa: B018


def test_no_module_is_loaded_a_second_time_under_the_name_of_the_package() -> None:
    from secfacmic import simulate as same

    assert same is simulate
    with pytest.raises(ModuleNotFoundError):
        import_module("secfacmic.lab")


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
