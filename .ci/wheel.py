"""What a wheel brings: the import names with every module of the checkout, its types, its licence and one command."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("secfacmic", "secure_fed")
FOLDERS = ("clients", "configs", "privacy", "server")


def main(wheel: str) -> None:
    """Check the wheel; end with what is wrong with it."""
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        information = next(name for name in names if name.endswith(".dist-info/METADATA")).partition("/")[0]
        entry_points = archive.read(f"{information}/entry_points.txt").decode().split()
    tops = {name.partition("/")[0] for name in names} - {information}
    if tops != set(NAMES):
        sys.exit(f"{wheel}: brings {sorted(tops)}; expected {sorted(NAMES)} alone")
    if entry_points != ["[console_scripts]", "secfacmic", "=", "secfacmic.__main__:main"]:
        sys.exit(f"{wheel}: entry points {' '.join(entry_points)}; expected the command secfacmic alone")
    sources = {path.relative_to(ROOT).as_posix() for name in NAMES for path in (ROOT / name).rglob("*.py")}
    sources |= {f"secure_fed/{path.relative_to(ROOT)}" for name in FOLDERS for path in (ROOT / name).rglob("*.py")}
    missing = (sources | {*(f"{name}/py.typed" for name in NAMES), f"{information}/licenses/LICENSE"}) - set(names)
    strangers = {name for name in names if name.endswith((".py", ".pyc"))} - sources
    if missing or strangers:
        sys.exit(f"{wheel}: lacks {sorted(missing)}, has {sorted(strangers)} too; expected what the checkout has")


if __name__ == "__main__":
    main(sys.argv[1])
