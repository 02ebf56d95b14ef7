"""What the server asks of its machine before it listens."""

from __future__ import annotations

import logging
import resource

import pytest

from secure_fed.server.supervisor import FILES, FILES_OF_SITE, _room_for

ALL = FILES + FILES_OF_SITE * 1000


@pytest.mark.parametrize(
    ("limits", "set_to", "told"),
    [
        ((1024, 524_288), (ALL, 524_288), False),
        ((1024, resource.RLIM_INFINITY), (ALL, resource.RLIM_INFINITY), False),
        ((1024, 2048), (2048, 2048), True),
        ((65_536, 65_536), None, False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None, False),
    ],
)
def test_the_server_may_open_what_the_connections_of_all_sites_need(
    limits: tuple[int, int],
    set_to: tuple[int, int] | None,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: found.append(pair))
    with caplog.at_level(logging.WARNING, "secure_fed"):
        _room_for(1000)
    assert found == ([] if set_to is None else [set_to])
    assert ("LimitNOFILE" in caplog.text) == told
