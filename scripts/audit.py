"""Known vulnerabilities in what ``requirements-dev.txt`` pins; anything that cannot be looked up is a failure."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements-dev.txt"
AUDIT = (str(Path(sys.executable).with_name("pip-audit")), "--strict", "--disable-pip", "--progress-spinner", "off")
NO_DATABASE = 2
"""Exit status where nothing could be looked up; 1 where something was found, or a package was skipped."""


def database_reached() -> bool:
    """Whether the vulnerability database knows of ``pip``, a package that every database has."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("pip==23.0\n")
        file.flush()
        asked = subprocess.run(
            [*AUDIT, "--no-deps", "--format", "json", "--requirement", file.name], capture_output=True, text=True
        )
    try:
        return bool(json.loads(asked.stdout)["dependencies"][0]["name"] == "pip")
    except (ValueError, LookupError):
        return False


def main() -> int:
    """Audit the lock; returns the exit status."""
    if not database_reached():
        print(
            "no vulnerability database is reached from here: nothing was audited; expected PyPI's JSON interface, "
            "directly or through HTTPS_PROXY: try again where there is internet",
            file=sys.stderr,
        )
        return NO_DATABASE
    return subprocess.run([*AUDIT, "--require-hashes", "--requirement", str(LOCK)]).returncode


if __name__ == "__main__":
    sys.exit(main())
