"""Runs of a study: a key opens one for ever, each has its own draws, and the second asks for each site's word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from secure_fed.clients.site import Site
from secure_fed.core.errors import KeyFileError, NotAcceptedError, RecordError
from secure_fed.lab.simulation import accept_another_run, run_id
from secure_fed.privacy.ledger import Ledger
from secure_fed.clients.private_round import ledger_folder
from secure_fed.clients.sitefile import read_site_file
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.server.coordinator import Coordinator
from tests.conftest import TRAINING, Federation, exchange, run_round
from tests.integration.test_dp_site import set_budget
from tests.integration.test_rotation import drive, rotate


def another(federation: Federation, key: str, number: int = 7) -> Coordinator:
    """A run that the server opens alone, under any key it has seen."""
    return Coordinator.begin(
        federation.agreed, federation.folder / "server", federation.signing, key, run_id(federation.agreed.study, number)
    )
