"""The list of patients who are to be forgotten, and how their images are known again.

``STATE/forgotten.json`` keeps keyed hashes alone: of the patient's id, and of the identities of the images that were
there, so that an export which brings them again, under another name too, brings nothing back. The key lies beside them:
who has the file and guesses an id can confirm the guess.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import identities
from secure_fed.core.errors import ForgottenError
from secure_fed.core.layout import SiteState
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.protocol.signing import PRIVATE
from secure_fed.protocol.study import Hex64

_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Content(FileModel):
    format: Literal[1]
    key: Hex64
    patients: tuple[_Hash, ...]
    images: tuple[_Hash, ...] = Field(default=())


class Forgotten:
    """The list of a site's forgotten patients; empty where nobody was forgotten.

    Args:
        state: the site's state folder.

    Raises:
        ForgottenError: the list cannot be read.
    """

    def __init__(self, state: Path) -> None:
        self._state = SiteState(state)
        self._path = self._state.forgotten
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._content = _Content(format=1, key=secrets.token_hex(32), patients=())
        except OSError as error:
            raise ForgottenError(f"{self._path}: cannot be read ({error.strerror}); expected it readable") from error
        else:
            try:
                table = json.loads(data)
            except (ValueError, RecursionError):
                table = {}
            if not isinstance(table, dict):
                table = {}
            self._content = parse_table(table, _Content, ForgottenError, f"{self._path}: put it back from a backup")
        self._patients, self._images = set(self._content.patients), set(self._content.images)

    def patient(self, name: str) -> bool:
        """Whether this patient is to be forgotten."""
        return bool(self._patients) and self._hash("patient", name.encode()) in self._patients

    def image(self, known_as: bytes) -> bool:
        """Whether the image of this identity was a forgotten patient's."""
        return bool(self._images) and self._hash("image", known_as) in self._images

    def among(self, images: Sequence[SiteImage]) -> list[bool]:
        """Which images are a forgotten patient's, under that name or any other.

        What cannot be read nobody can use; whoever decodes it tells why.
        """
        if not self._images:
            return [self.patient(image.patient) for image in images]
        known = identities(image.source for image in images)
        return [
            self.patient(image.patient) or (not isinstance(known_as, OSError) and self.image(known_as))
            for image, known_as in zip(images, known, strict=True)
        ]

    def add(self, name: str, images: list[bytes]) -> None:
        """Put a patient and the identities of the images on the list, durably."""
        patients = self._patients | {self._hash("patient", name.encode())}
        digests = self._images | {self._hash("image", image) for image in images}
        content = self._content.model_copy(
            update={"patients": tuple(sorted(patients)), "images": tuple(sorted(digests))}
        )
        self._state.begin()
        write_durable(self._path, content.model_dump_json().encode() + b"\n", PRIVATE)
        self._content, self._patients, self._images = content, patients, digests

    def _hash(self, what: str, content: bytes) -> str:
        message = f"secfacmic forgotten 1 {what}\n".encode() + content
        return hmac.new(bytes.fromhex(self._content.key), message, hashlib.sha256).hexdigest()[:32]
