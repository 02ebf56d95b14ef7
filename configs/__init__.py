"""Studies, sites and model configurations that come with the package."""

from __future__ import annotations

from pathlib import Path

if not __name__.startswith("secure_fed."):  # else every module of the folder would exist twice, under two names
    raise ImportError(f"{__name__}: import it as secure_fed.{__name__}")

FOLDER = Path(__file__).parent
MODELS = FOLDER / "models"


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
