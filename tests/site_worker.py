"""A site in a process of its own, for tests: requests on stdin, replies on stdout, a JSON object a line."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch

from secure_fed.clients.site import Site
from secure_fed.protocol.rounds import RoundRequest

site = Site.open(Path(sys.argv[1]))
print(json.dumps({"cpu": torch.backends.cpu.get_cpu_capability()}), flush=True)
for line in sys.stdin:
    fields = json.loads(line)
    fields["records"] = tuple(base64.b64decode(record) for record in fields["records"])
    for name in ("question", "past", "carried"):
        fields[name] = base64.b64decode(fields[name])
    reply = site.respond(RoundRequest(**fields))
    answer = {
        "reply": reply.__dict__
        | {name: base64.b64encode(getattr(reply, name)).decode() for name in ("envelope", "carried")},
        "digest": site.adapter_digest,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(answer), flush=True)
