"""A coordinator's machine without torch: what ``deploy/requirements-server.txt`` names is all that its server needs."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from secure_fed.core.processes import PARENT
from tests.conftest import make_template
from tests.network import Network

ROOT = Path(__file__).parents[2]
LIST = ROOT / "deploy" / "requirements-server.txt"
MOST_BYTES = 400e6


def named() -> list[str]:
    return [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]


def with_all_it_needs(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """These distributions and whatever they depend on, as installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = [Requirement(name).name for name in names]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with these distributions and no other, of what is installed here."""
    folder = tmp_path_factory.mktemp("server")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    for distribution in with_all_it_needs(named()).values():
        for file in distribution.files or ():
            source = Path(str(file.locate()))
            if ".." in file.parts or not source.is_file():
                continue
            target = packages / str(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    own = importlib.metadata.distribution("secfacmic")
    metadata = next(Path(str(file.locate())) for file in own.files or () if file.name == "METADATA")
    (packages / metadata.parent.name).symlink_to(metadata.parent)
    return folder / "venv" / "bin" / "python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(python), "-P", *arguments], capture_output=True, text=True, env=alone, timeout=120)


def test_the_list_names_what_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert set(named()) <= set(project)


def test_it_is_small_and_has_nothing_that_trains() -> None:
    distributions = with_all_it_needs(named())
    assert not {"torch", "open-clip-torch", "opacus", "tenseal", "pyrage", "scikit-learn"} & distributions.keys()
    files = [Path(str(file.locate())) for one in distributions.values() for file in one.files or ()]
    assert sum(path.stat().st_size for path in files if path.is_file()) < MOST_BYTES


def test_its_commands_are_there(environment: Path) -> None:
    torch = run(environment, "-c", "import torch")
    assert "ModuleNotFoundError" in torch.stderr  # the control: it is not this environment
    for arguments in (
        ["server", "--help"],
        ["study", "ca", "--host", "127.0.0.1", "--out", str(environment.parent / "tls")],
        ["study", "ca", "--renew", "--out", str(environment.parent / "tls")],
        ["explain", "81"],
        ["--version"],
    ):
        found = run(environment, "-m", "secure_fed.cli", *arguments)
        assert found.returncode == 0, (arguments, found.stderr)
    more = run(environment, "-m", "secure_fed.cli", "client", "--site", "site.toml")
    assert more.returncode == 3
    assert "this command needs PIL, which is not installed here" in " ".join(more.stderr.split())
    assert "Traceback" not in more.stderr


@pytest.mark.slow
def test_a_study_runs_with_a_server_from_it(environment: Path, tmp_path: Path, images: Path) -> None:
    network = Network(tmp_path / "out", make_template(rounds=1), images, forked=True)
    command = ["-m", "secure_fed.cli", "server", "--study", str(network.folder / "study.toml"), "--mode", "he"]
    command += ["--state", str(network.folder / "server"), "--listen", f"127.0.0.1:{network.port}"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {PARENT: str(os.getpid())}
    try:
        with network.log_file("server").open("ab") as log:
            network.processes["server"] = subprocess.Popen(
                [str(environment), "-P", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=alone
            )
        network.start(*network.names)
        assert set(network.wait(240).values()) == {0}
    finally:
        network.close()
    for arguments in (
        ["status", str(network.folder / "server")],
        ["doctor", "--server", str(network.folder / "server"), "--listen", "127.0.0.1:0"],
        ["journal", "verify", str(network.folder / "server")],
        ["study", "close", str(network.folder / "study.toml"), "--state", str(network.folder / "server")],
    ):
        found = run(environment, "-m", "secure_fed.cli", *arguments)
        assert found.returncode == 0, (arguments, found.stdout, found.stderr)
