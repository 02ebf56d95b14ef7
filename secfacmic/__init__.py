"""The names for programs under the name that the package is installed by: what ``secure_fed`` has, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secure_fed import __all__ as __all__
from secure_fed import __dir__ as __dir__
from secure_fed import __getattr__ as __getattr__  # the same objects, loaded when they are first asked for

if TYPE_CHECKING:
    from secure_fed import Coordinator as Coordinator
    from secure_fed import Site as Site
    from secure_fed import Template as Template
    from secure_fed import simulate as simulate
