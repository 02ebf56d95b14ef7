"""Where the command begins. From here on Ctrl-C ends it in one line: what it is made of takes half a second to load."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = b"secfacmic: interrupted before it began\n"


def main() -> None:
    """Entry point of ``secfacmic``, and of ``python -m secfacmic``."""
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else who started it wants it to go on
    if heeds:
        signal.signal(signal.SIGINT, _end)
    from secure_fed.cli import main as command

    if heeds:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command()
    except KeyboardInterrupt:
        sys.stderr.write(INTERRUPTED.decode())
        sys.exit(130)


def _end(number: int, frame: FrameType | None) -> None:
    # An exception would be another one, or none, by the time that it came out of what is loaded.
    os.write(2, INTERRUPTED)
    os._exit(130)


if __name__ == "__main__":
    main()
