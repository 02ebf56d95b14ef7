"""``python -m secure_fed.cli``: the same as ``secfacmic``."""

from secure_fed.cli import main

main()
