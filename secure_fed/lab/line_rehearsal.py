"""One round of a study on phantoms, over the site's true line to its server, under a key that is thrown away.

Nothing of the site's data is read, no budget is touched, and no key of the study is used for what is sent: whether the
line carries a round, and whether the backbone is here and works, is known before anything is at stake.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image

from secure_fed.clients.flower_app import RehearsalApp
from secure_fed.clients.flower_node import Way, run_site
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteData, SiteFile
from secure_fed.core.errors import AggregateRefused, EnvelopeError
from secure_fed.core.storage import exclusive, scratch_folder
from secure_fed.lab.phantoms import CLASSES, draw_facts, render_slice, scanner_of
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol.packing import Binding, PlainSealer, Sealer
from secure_fed.protocol.signing import ZERO_DIGEST
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study import AgreedStudy, load_study

PHANTOMS = 6
"""Of each class."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found.

    Attributes:
        size: bytes of the update, up and down.
        training_seconds: of encoding the phantoms and training on them.
        up_seconds, down_seconds: on the line, all waiting included.
    """

    size: int
    training_seconds: float
    up_seconds: float
    down_seconds: float


def rehearse_round(file: SiteFile, tell: Callable[[str], None] = lambda text: None) -> Rehearsed:
    """Rehearse the first round, before the study's first round.

    Args:
        file: the site's, paths absolute.
        tell: is told what is done next.

    Raises:
        SiteFileError: there is no server in the file, or the site refuses the study.
        StudyError: rounds have begun, which no rehearsal may disturb.
        BackboneError: the backbone is not here, or is another.
        StorageError: the site runs.
        EnvelopeError: what came back is not what was sent.
        SecfacmicError: others, of the connection.
    """
    server = file.known_server
    agreed = load_study(Path(file.study))
    file.refuse_study(agreed.study)
    file.state_folder.begin()
    with exclusive(file.state_folder.path):
        tell("training on phantoms")
        began = time.monotonic()
        site, integers = _train(file, agreed)
        training = time.monotonic() - began
        sealer = _throw_away_sealer(agreed)
        binding = Binding(run=ZERO_DIGEST, head=ZERO_DIGEST, round=1)
        sealed = sealer.seal(integers, binding, file.site)
        tell(f"sending {len(sealed.payload) / 1e6:.2f} MB, once the server asks who is there")
        app = RehearsalApp(site, agreed.study.id, sealed.payload)
        authority = Path(server.authority)
        run_site(app, Way(server.address, authority, len(agreed.study.sites), server.proxy, server.wait_seconds))
    try:
        opened = sealer.open(app.returned, binding, [sealed.contribution])
    except AggregateRefused:
        opened = None
    if opened is None or not np.array_equal(opened, integers):
        raise EnvelopeError("what came back from the server does not open to what was sent; expected the same bytes")
    return Rehearsed(len(sealed.payload), training, app.up_seconds, app.down_seconds)


def _throw_away_sealer(agreed: AgreedStudy) -> Sealer:
    lanes = agreed.layout(1).lanes
    if agreed.study.mode == "plain":
        return PlainSealer(lanes)
    return Cipher(lanes, StudySecret.generate(lanes.modulus_bits))


def _train(file: SiteFile, agreed: AgreedStudy) -> tuple[Site, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    """The site, as it would be with phantoms for its data and nothing in its state, and the integers of round 1."""
    with scratch_folder() as folder:
        images = folder / "phantoms"
        _draw(images, agreed.study.class_names)
        shares = Shares(train=0.5, val=0.2, test=0.1, unlabelled=0.2)
        data = SiteData(folder=str(images), kind="simulated", unit="image", shares=shares)
        changes = {"data": data, "state": str(folder / "state"), "features": None}
        site = Site(file.model_copy(update={**changes, "privacy": None, "max_epsilon": None}), agreed)
        return site, site.first_integers()


def _draw(folder: Path, classes: tuple[str, ...]) -> None:
    scanner, rng = scanner_of(0), np.random.default_rng(0)
    for name, label in zip(classes, cycle(CLASSES)):
        (folder / name).mkdir(parents=True)
        for number in range(PHANTOMS):
            picture = render_slice(draw_facts(label, rng), scanner, patient=number)
            Image.fromarray(picture).save(folder / name / f"{number}.png")
