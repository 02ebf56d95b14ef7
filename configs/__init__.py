"""Studies, sites and model configurations that come with the package."""

from __future__ import annotations

import difflib
import re
from itertools import takewhile
from pathlib import Path

if not __name__.startswith("secure_fed."):  # else every module of the folder would exist twice, under two names
    raise ImportError(f"{__name__}: import it as secure_fed.{__name__}")

FOLDER = Path(__file__).parent
MODELS = FOLDER / "models"


def packaged(folder: Path = FOLDER) -> dict[str, str]:
    """What a folder of this package has to offer: by name, the first sentence of its comment."""
    found = {}
    for path in sorted(folder.glob("*.toml")):
        lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        text = " ".join(line.removeprefix("#").strip() for line in lines)
        found[path.stem] = re.split(r"(?<=\.)\s+(?=[A-Z])", text, maxsplit=1)[0]
    return found


def unknown(path: Path, what: str, folder: Path = FOLDER) -> str:
    """What to tell somebody who names a file that is neither here nor packaged.

    Args:
        path: as it was named.
        what: was meant, as ``study``.
        folder: where such are packaged.
    """
    names = packaged(folder)
    close = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.75)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"{path}: no such file, and no packaged {what} of that name{meant}; packaged are {', '.join(names)}"


def find(path: Path) -> Path:
    """The path itself if it exists, else the packaged config of that name.

    ``configs/demo.toml``, ``demo.toml`` and ``demo`` all find the packaged demo when there is no such file here.
    """
    if path.exists():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = FOLDER.joinpath(*parts)
    for candidate in (packaged, packaged.with_name(packaged.name + ".toml")):
        if candidate.is_file():
            return candidate
    return path
