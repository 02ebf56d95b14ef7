"""``make`` and the scripts behind it: an environment that fits the checkout, and a lock that fits pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import environment

ROOT = Path(__file__).parents[2]

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "small"
version = "1"
"""

# The least that pip takes for an editable install: a wheel with a path file.
BACKEND = """
from pathlib import Path
from zipfile import ZipFile


def build_editable(folder, settings=None, metadata=None):
    name = "small-1-py3-none-any.whl"
    with ZipFile(Path(folder) / name, "w") as wheel:
        wheel.writestr("small.pth", str(Path.cwd()))
        wheel.writestr("small-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: small\\nVersion: 1\\n")
        wheel.writestr("small-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.dist-info/RECORD", "")
    return name
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the layout of ours, whose lock is empty."""
    root = tmp_path / "checkout"
    (root / "clients").mkdir(parents=True)
    (root / "scripts").mkdir()
    for name in ("Makefile", "scripts/environment.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "backend.py").write_text(BACKEND)
    (root / environment.LOCK).write_text("# nothing\n")
    (root / "clients" / "__init__.py").write_text("")
    (root / "secure_fed").mkdir()
    (root / "secure_fed" / "__init__.py").write_text("")
    (root / "secure_fed" / "clients").symlink_to("../clients")
    return root


def fake_environment(root: Path, code: Path, version: str = "3.11.2") -> None:
    """An environment that is ready and takes its code from a folder, without the seconds that a real one takes."""
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!/bin/sh\nshift\nexec {sys.executable} -I -c \"import sys; sys.path.insert(0, '{code}'); $2\"\n"
    )
    python.chmod(0o755)
    (root / ".venv" / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    (root / ".venv" / "ready").write_text(environment.wanted(root))


def test_an_environment_that_fits_is_left_alone(checkout: Path) -> None:
    fake_environment(checkout, checkout)
    assert environment.stale(checkout) is None


@pytest.mark.parametrize("name", ["pyproject.toml", environment.LOCK])
def test_a_change_of_what_it_is_made_of_makes_it_stale(checkout: Path, name: str) -> None:
    assert environment.stale(checkout) == "there is none"
    fake_environment(checkout, checkout)
    with (checkout / name).open("a") as file:
        file.write("# another\n")
    assert "has changed" in str(environment.stale(checkout))


def test_another_checkouts_code_makes_it_stale(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkout, other, symlinks=True)
    fake_environment(checkout, other)
    assert environment.stale(checkout) == f"it runs the code of {other}, expected {checkout}"


def test_one_of_another_python_is_stale_once_a_python_is_chosen(checkout: Path) -> None:
    fake_environment(checkout, checkout, "3.9.1")
    assert environment.stale(checkout) is None
    assert environment.stale(checkout, this_python=True) == f"it is of Python 3.9, expected {environment.HERE}"
    (checkout / ".venv" / "pyvenv.cfg").write_text(f"version_info = {environment.HERE}.77\n")  # another patch, by uv
    assert environment.stale(checkout, this_python=True) is None


def test_one_whose_python_is_gone_is_stale(checkout: Path, tmp_path: Path) -> None:
    fake_environment(checkout, checkout)
    python = checkout / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "python3.99")
    assert environment.stale(checkout) == f"its Python, {tmp_path / 'python3.99'}, is gone"


def test_the_layout_of_0_1_makes_it_stale(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "clients").mkdir(parents=True)
    (old / "secure_fed").mkdir()
    (old / "secure_fed" / "__init__.py").write_text("")
    fake_environment(checkout, old)
    assert "secure_fed.clients cannot be imported" in str(environment.stale(checkout))


def test_compiled_leftovers_of_moved_modules_go_and_others_stay(checkout: Path) -> None:
    kept = [checkout / "clients" / "__pycache__" / "__init__.cpython-311.pyc", checkout / "clients" / "__init__.pyc"]
    gone = [
        checkout / "secure_fed" / "__pycache__" / "study.cpython-311.pyc",
        checkout / "clients" / "twins.pyc",
        checkout / "secure_fed" / "adapters" / "deep" / "__pycache__" / "low_rank.cpython-311.pyc",
    ]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert sorted(environment.remove_orphans(checkout)) == sorted(gone)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert not (checkout / "secure_fed" / "adapters").exists()  # else it would be a package of nothing
    assert not (checkout / "secure_fed" / "__pycache__").exists()
    assert (checkout / "secure_fed" / "__init__.py").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_makes_the_environment_once_and_again_when_it_runs_another_checkouts_code(
    checkout: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3.11").symlink_to(sys.executable)  # what make takes where none is chosen

    def make(*chosen: str) -> str:
        command = ["make", *chosen, "environment"]
        names = {"MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "PYTHON"}
        clean = {name: value for name, value in os.environ.items() if name not in names} | {"PIP_NO_INDEX": "1"}
        clean |= {"PATH": f"{tmp_path / 'bin'}:{clean['PATH']}"}
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, env=clean)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    script = (checkout / "scripts" / "environment.py").read_text()
    locked = 'LOCKED = ((3, 11), "linux-x86_64", "CPython")'
    here = (sys.version_info[:2], environment.sysconfig.get_platform(), environment.platform.python_implementation())
    assert locked in script
    (checkout / "scripts" / "environment.py").write_text(script.replace(locked, f"LOCKED = {here!r}"))
    assert f"is made anew with Python {environment.HERE}" in (said := make())
    assert "there is none" in said
    assert make() == ""
    other = tmp_path / "other"
    shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns(".venv"))
    (path_file,) = (checkout / ".venv").rglob("small.pth")
    path_file.write_text(str(other))
    orphan = checkout / "secure_fed" / "old" / "__pycache__" / "moved.cpython-311.pyc"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"")
    said = make()
    assert "removed 1 compiled modules" in said
    assert f"it runs the code of {other}" in said
    assert make() == ""
    about = checkout / ".venv" / "pyvenv.cfg"
    about.write_text(re.sub(r"(?m)^version = .*", "version = 3.9.1", about.read_text()))
    assert make() == ""  # somebody chose it
    assert "it is of Python 3.9" in make(f"PYTHON={sys.executable}")
    assert make(f"PYTHON={sys.executable}") == ""


def test_it_is_told_how_far_an_environment_is_while_pip_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "SILENCE", 0.05)
    monkeypatch.setattr(environment, "GB", 1000)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "before").write_bytes(bytes(1000))
    environment.run(tmp_path, "sh", "-c", "sleep 0.12; head -c 2400 /dev/zero > .venv/new; sleep 0.2")
    assert re.findall(r"\.venv: (.*) are there, \d+ s left at this rate", capsys.readouterr().out) == [
        "3.4 of some 6.8 GB"
    ]
    with pytest.raises(SystemExit, match="sh -c exit 3 failed"):
        environment.run(tmp_path, "sh", "-c", "exit 3")


def tiny_wheel(folder: Path, name: str, version: str) -> None:
    """A package of nothing on an index of files."""
    folder.mkdir(parents=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    with ZipFile(wheel, "w") as content:
        content.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        content.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{about}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_torch_comes_from_the_index_that_is_named_and_what_else_the_lock_pins_stays(
    checkout: Path, tmp_path: Path
) -> None:
    script = (checkout / "scripts" / "environment.py").read_text()
    here = (sys.version_info[:2], environment.sysconfig.get_platform(), environment.platform.python_implementation())
    (checkout / "scripts" / "environment.py").write_text(re.sub(r"(?m)^LOCKED = .*$", f"LOCKED = {here!r}", script))
    needs = (
        'dependencies = ["torch>=2", "torchvision>=0.1", "torch-like"]\noptional-dependencies = {dev = [], docs = []}\n'
    )
    (checkout / "pyproject.toml").write_text(PYPROJECT + needs)
    backend = (checkout / "backend.py").read_text()
    requires = "".join(f"Requires-Dist: {name}\\n" for name in ("torch>=2", "torchvision>=0.1", "other"))
    (checkout / "backend.py").write_text(backend.replace("Version: 1\\n", f"Version: 1\\n{requires}", 1))
    hashed = "".join(f"{line} \\\n    --hash=sha256:{0:064}\n" for line in ("other==1", "torch==9", "nvidia-x==1"))
    (checkout / environment.LOCK).write_text(hashed)
    for index, name, version in [("cpu", "torch", "2.1+cpu"), ("cpu", "torchvision", "0.2+cpu")]:
        tiny_wheel(tmp_path / index / name, name, version)
    for version in ("1", "2"):
        tiny_wheel(tmp_path / "main" / "other" / version, "other", version)
    links = "".join(f'<a href="{v}/other-{v}-py3-none-any.whl">other-{v}-py3-none-any.whl</a>' for v in ("1", "2"))
    (tmp_path / "main" / "other" / "index.html").write_text(links)
    names = {"MAKEFLAGS", "MAKELEVEL", "PYTHONPATH", "PIP_NO_INDEX"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    clean |= {"PIP_INDEX_URL": (tmp_path / "main").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    command = ["make", f"PYTHON={sys.executable}", f"TORCH_INDEX={(tmp_path / 'cpu').as_uri()}", "environment"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.7 GB" in done.stdout
    assert "ready, after" in done.stdout
    pip = [checkout / ".venv" / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
    found = subprocess.run(pip, capture_output=True, text=True, env=clean).stdout
    assert {"torch==2.1+cpu", "torchvision==0.2+cpu", "other==1"} <= set(found.split())


# The lock


def pinned() -> dict[str, str]:
    """Versions by name."""
    text = (ROOT / environment.LOCK).read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.M)}


def test_the_lock_pins_every_dependency_in_a_version_that_pyproject_takes() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"], *content["build-system"]["requires"]]
    found = pinned()
    assert len(found) > 100
    for line in wanted:
        requirement = Requirement(line)
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"{line} is not in {environment.LOCK}: make lock"
        assert requirement.specifier.contains(version), f"{line}, but {environment.LOCK} has {version}: make lock"


def test_the_lock_names_hashes_and_no_place_to_get_them_from() -> None:
    text = (ROOT / environment.LOCK).read_text()
    for entry in re.split(r"\n(?=\S)", text):
        assert entry.startswith("#") or "--hash=sha256:" in entry, entry
    assert not re.search(r"^\s*--?[a-z]+[- =](?!hash)", re.sub(r"--hash=\S+", "", text), re.M)
    assert "://" not in text


def test_an_audit_without_a_database_says_so_and_fails(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").symlink_to(sys.executable)
    (bin_folder / "pip-audit").write_text("#!/bin/sh\necho 'ERROR: pip: Dependency not found' >&2\nexit 1\n")
    (bin_folder / "pip-audit").chmod(0o755)
    command = [bin_folder / "python", ROOT / "scripts" / "audit.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no vulnerability database is reached from here: nothing was audited" in done.stderr
    # With a database, what pip-audit says of the lock is the answer.
    answer = """echo '{"dependencies": [{"name": "pip"}]}'; exit 1"""
    (bin_folder / "pip-audit").write_text(f'#!/bin/sh\ncase "$*" in *require-hashes*) exit 7;; esac\n{answer}\n')
    assert subprocess.run(command, capture_output=True).returncode == 7
