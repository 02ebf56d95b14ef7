"""What the fork server of :mod:`tests.forked` imports before it forks: all that a site uses."""

from __future__ import annotations

import importlib

from secure_fed.core.processes import be_quiet_outside

be_quiet_outside()  # before flwr is imported
for _name in (
    "torch",
    "secure_fed.clients.flower_app",
    "secure_fed.clients.site",
    "secure_fed.clients.flower_node",
    "secure_fed.model.adapter_file",
    "secure_fed.operate.taking_part",
    "secure_fed.cli",
    "tests.fault_hooks",
):
    importlib.import_module(_name)
# Threads do not survive a fork.
importlib.import_module("torch").set_num_threads(1)
