"""What the fork server of :mod:`tests.forked` imports before it forks: all that a site uses.

What it does not import each of its children does: opacus and, at the first per-example gradient, torch's compiler took
the first private round of a process 4 s.
"""

from __future__ import annotations

import importlib

from secure_fed.core.processes import be_quiet_outside

be_quiet_outside()  # before flwr is imported
for _name in (
    "torch",
    "torch._dynamo",
    "open_clip",
    "opacus",
    "secure_fed.clients.flower_app",
    "secure_fed.clients.site",
    "secure_fed.clients.flower_node",
    "secure_fed.model.adapter_file",
    "secure_fed.operate.taking_part",
    "secure_fed.cli",
    "tests.fault_hooks",
    "tests.private_worker",
):
    importlib.import_module(_name)
# Threads do not survive a fork.
importlib.import_module("torch").set_num_threads(1)
