"""What all tests of backbones need: a store of their own, and no network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from secure_fed.model import backbone_store


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of this test's own, and no network."""

    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv(backbone_store.PLACE, str(tmp_path / "store"))
    return tmp_path / "store"
