"""The core of secfacmic: what sites and server have in common, and the commands on top.

``Template``, ``Site``, ``Coordinator`` and ``simulate`` are for programs (docs/api.md). They are loaded when they are
first asked for, so that a server that imports this package loads nothing that trains or holds a key.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secure_fed.clients.site import Site
    from secure_fed.lab.simulation import simulate
    from secure_fed.protocol.study import Study as Study
    from secure_fed.protocol.study import Template
    from secure_fed.server.coordinator import Coordinator

if Path(__file__).with_name("clients").is_file():
    raise ImportError(
        "this checkout has no symbolic links: secure_fed/clients is a file, expected a link to the folder clients; "
        "check out again with git config core.symlinks true (on Windows with developer mode on), or install the wheel"
    )

__all__ = ["Coordinator", "Site", "Template", "simulate"]

_HOMES = {
    "Coordinator": "secure_fed.server.coordinator",
    "Site": "secure_fed.clients.site",
    "Study": "secure_fed.protocol.study",
    "Template": "secure_fed.protocol.study",
    "simulate": "secure_fed.lab.simulation",
}


def __dir__() -> list[str]:
    """The names for programs, and nothing that is on its way."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """The names above, from where they are at home (PEP 562)."""
    if name == "__version__":
        return version("secfacmic")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
