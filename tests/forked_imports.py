"""What the fork server of :mod:`tests.forked` imports before it forks: all that a site uses."""

from __future__ import annotations

import importlib

from secure_fed.processes import be_quiet_outside

be_quiet_outside()  # before flwr is imported
for _name in (
    "torch",
    "clients.app",
    "clients.site",
    "clients.supernode",
    "secure_fed.adapter_file",
    "secure_fed.cli",
    "tests.fault_hooks",
):
    importlib.import_module(_name)
# Threads do not survive a fork.
importlib.import_module("torch").set_num_threads(1)
