"""Who may import what: the server's process must not even load what could hold a key."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = (
    "torch",
    "open_clip",
    "opacus",
    "tenseal",
    "pyrage",
    "sklearn",
    "secure_fed.privacy.ckks",
    "secure_fed.privacy.keys",
    "secure_fed.clients",
)


@pytest.mark.parametrize(
    "module",
    [
        "secure_fed.server.coordinator",
        "secure_fed.server.journal",
        "secure_fed.protocol.records",
        "secure_fed.protocol.study",
    ],
)
def test_the_server_loads_nothing_that_trains_or_decrypts(module: str) -> None:
    program = f"import sys, {module}; print(sorted(set(sys.modules) & {set(FORBIDDEN)!r}))"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
