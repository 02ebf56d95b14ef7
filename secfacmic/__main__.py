"""Where the command begins. From here on Ctrl-C ends it in one line: what it is made of takes half a second to load."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``secfacmic``, and of ``python -m secfacmic``."""
    try:
        from secure_fed.cli import main as command

        command()
    except KeyboardInterrupt:
        sys.stderr.write("secfacmic: interrupted before it began\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
