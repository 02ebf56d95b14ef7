"""The development environment ``.venv``, as the Makefile's targets need it: ``python3.11 scripts/environment.py``.

``TORCH_INDEX`` in the environment, or ``make TORCH_INDEX=...``, names an index of torch builds without CUDA.
``--this-python``, as ``make PYTHON=...`` says it, asks for the version of Python that runs this.

It is made anew when it is not what this checkout asks for, and left alone otherwise: one of a Python that somebody
chose before stays while nobody chooses another. What modules that have moved left behind goes first: Python takes a
folder that holds nothing but ``__pycache__`` for a package.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

LOCK = "requirements-dev.txt"
LOCKED = ((3, 11), "linux-x86_64", "CPython")
"""What the lock was made for."""

GB = 2**30  # as du -h counts
SIZE, SIZE_WITHOUT_CUDA = 6.8, 2.7
ADVICE = " (4.1 GB of it for graphics cards: make TORCH_INDEX=... does without, see README.md)"
SILENCE = 10.0
"""Seconds after which it is told how much is there: pip writes packages, which takes longest, without a word."""

CODE = (
    *("benchmarks", "clients", "configs", "docs", "examples", "privacy", "scripts"),
    *("secfacmic", "secure_fed", "server", "tests"),
)
PROBE = "import secure_fed.clients; print(secure_fed.clients.__file__)"
HERE = "{}.{}".format(*sys.version_info)


def remove_orphans(root: Path) -> list[Path]:
    """Remove compiled modules without a source, and folders that are empty then; returns what was removed."""
    removed = []
    for code in CODE:
        for compiled in sorted((root / code).rglob("*.pyc")):
            cached = compiled.parent.name == "__pycache__"
            source = (compiled.parent.parent if cached else compiled.parent) / (compiled.name.split(".")[0] + ".py")
            if not source.exists():
                compiled.unlink()
                removed.append(compiled)
                for folder in compiled.parents:
                    if folder == root or any(folder.iterdir()):
                        break
                    folder.rmdir()
    return removed


def wanted(root: Path) -> str:
    """Digest of all that the environment is made of."""
    content = [(root / name).read_bytes() for name in ("pyproject.toml", LOCK)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def stale(root: Path, this_python: bool = False) -> str | None:
    """Why the environment has to be made anew; None if it has not.

    Args:
        root: the checkout.
        this_python: whether it must be of the Python that runs this.
    """
    ready = root / ".venv" / "ready"
    if not ready.exists():
        return "there is none"
    if ready.read_text() != wanted(root):
        return f"pyproject.toml or {LOCK} has changed"
    if this_python and (found := python_of(root)) != HERE:
        return f"it is of Python {found}, expected {HERE}"
    return misdirected(root)


def python_of(root: Path) -> str:
    """The version of Python that the environment was made with, as ``3.11``."""
    text = (root / ".venv" / "pyvenv.cfg").read_text()
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", text, re.MULTILINE)
    return found[1] if found else "an unknown version"


def misdirected(root: Path) -> str | None:
    """What is wrong with the editable install: another checkout's, or an older layout's."""
    python = root / ".venv" / "bin" / "python"
    if not python.exists():  # a link to a Python that is not installed any more
        return f"its Python, {python.resolve()}, is gone"
    probe = subprocess.run([python, "-I", "-c", PROBE], cwd="/", capture_output=True, text=True)  # -I: no PYTHONPATH
    if probe.returncode:
        return f"secure_fed.clients cannot be imported: {probe.stderr.strip().rpartition(chr(10))[2]}"
    found, expected = Path(probe.stdout.strip()), root / "secure_fed" / "clients" / "__init__.py"
    return None if found == expected else f"it runs the code of {found.parents[2]}, expected {root}"


def make(root: Path, torch_index: str | None) -> None:
    """Make the environment, from the lock where the lock holds.

    Args:
        root: the checkout.
        torch_index: an index to take torch and torchvision from, as their makers keep one of builds without CUDA. Such
            builds are not those whose hashes the lock knows: of the lock, the other versions hold then.
    """
    python = root / ".venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install"]  # not --quiet: it shows what it fetches, how large and how long it takes
    run(root, sys.executable, "-m", "venv", "--clear", ".venv")
    locked = (sys.version_info[:2], sysconfig.get_platform(), platform.python_implementation()) == LOCKED
    if locked and torch_index is None:
        run(root, *pip, "--require-hashes", "--requirement", LOCK)
        run(root, *pip, "--no-deps", "--no-build-isolation", "--editable", ".")
    else:
        run(root, *pip, "--upgrade", "pip")
        if torch_index is not None:
            run(root, *pip, "--index-url", torch_index, *torch_requirements(root))
        if locked:
            versions = root / ".venv" / "versions.txt"
            versions.write_text("\n".join(versions_besides_torch(root)) + "\n")
            run(root, *pip, "--constraint", versions, "--editable", ".[dev,docs]")
        else:
            print(
                f"{LOCK} is for Python 3.11 on Linux x86_64: here the newest versions that fit are installed",
                flush=True,
            )
            run(root, *pip, "--editable", ".[dev,docs]")
    run(root, python, "-m", "pip", "check")  # a dependency that the lock lacks is not found otherwise
    problem = misdirected(root)
    if problem:
        sys.exit(f".venv: made, but {problem}")
    (root / ".venv" / "ready").write_text(wanted(root))


def torch_requirements(root: Path) -> list[str]:
    """What pyproject.toml asks of torch and torchvision."""
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"].get("dependencies", [])
    return [line for line in dependencies if re.match(r"torch(vision)?\b(?!-)", line)]


def versions_besides_torch(root: Path) -> list[str]:
    """The lock's versions, without torch and what only its builds for graphics cards need."""
    pinned = re.findall(r"^([\w.-]+==\S+)", (root / LOCK).read_text(), re.MULTILINE)
    return [line for line in pinned if not re.match(r"torch|nvidia-|cuda-|triton", line)]


def run(root: Path, *command: str | Path) -> None:
    """Run a command in the checkout, telling how far the environment has grown; end as it does if it fails."""
    started, first = time.monotonic(), size(root / ".venv")
    before = first
    with subprocess.Popen(command, cwd=root) as process:
        try:
            while True:
                try:
                    failed = process.wait(SILENCE)
                    break
                except subprocess.TimeoutExpired:
                    grown = size(root / ".venv")
                if grown == before:  # pip is downloading, and shows that itself: what is fetched lies elsewhere
                    started = time.monotonic()
                else:
                    print(progress(grown, (grown - first) / (time.monotonic() - started)), flush=True)
                before = grown
        except BaseException:
            process.kill()
            raise
    if failed:
        sys.exit(f"{' '.join(map(str, command))} failed; the lines above say why")


def size(folder: Path) -> int:
    """Bytes of all files below a folder, which may be changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # written and removed again
                continue
    return total


def progress(there: int, rate: float) -> str:
    """A line on an environment of so many bytes that grows by so many a second."""
    expected = SIZE_WITHOUT_CUDA if os.environ.get("TORCH_INDEX") else SIZE
    left = max(0.0, expected * GB - there) / rate
    return f".venv: {there / GB:.1f} of some {expected} GB are there, {left:.0f} s left at this rate"


def main() -> None:
    """Clean the checkout and make its environment if it has none that fits."""
    if sys.version_info < (3, 11):
        sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")
    root = Path(__file__).resolve().parents[1]
    removed = remove_orphans(root)
    if removed:
        print(f"removed {len(removed)} compiled modules without a source, {removed[0].relative_to(root)} among them")
    why = stale(root, "--this-python" in sys.argv[1:])
    if why:
        torch_index = os.environ.get("TORCH_INDEX") or None
        needed = f"{SIZE_WITHOUT_CUDA} GB" if torch_index else f"{SIZE} GB{ADVICE}"
        print(f".venv is made anew with Python {HERE}, which takes minutes and some {needed}: {why}", flush=True)
        started = time.monotonic()
        make(root, torch_index)
        print(f".venv is ready, after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
