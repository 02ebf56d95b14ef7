"""The core of secfacmic: what sites and server have in common, and the commands on top.

``Study``, ``Site``, ``Coordinator`` and ``simulate`` are for programs (docs/api.md). They are loaded when they are
first asked for, so that a server that imports this package loads nothing that trains or holds a key.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.site import Site
    from secure_fed.simulation import simulate
    from secure_fed.study import Study
    from server.coordinator import Coordinator

__all__ = ["Coordinator", "Site", "Study", "simulate"]

_HOMES = {
    "Coordinator": "server.coordinator",
    "Site": "clients.site",
    "Study": "secure_fed.study",
    "simulate": "secure_fed.simulation",
}


def __getattr__(name: str) -> Any:
    """The names above, from where they are at home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
