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
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import identities
from secure_fed.clients.patients import writings
from secure_fed.core.errors import ForgottenError
from secure_fed.core.layout import SiteState
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.protocol.signing import PRIVATE
from secure_fed.protocol.study_tables import Hex64

_Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Content(FileModel):
    format: Literal[1]
    key: Hex64
    patients: tuple[_Hash, ...]
    images: tuple[_Hash, ...] = Field(default=())
    writings: tuple[_Hash, ...] = Field(default=())


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
        self._writings = set(self._content.writings)

    def patient(self, name: str) -> bool:
        """Whether this patient is to be forgotten."""
        return bool(self._patients) and self._hash("patient", name.encode()) in self._patients

    def written_otherwise(self, name: str) -> bool:
        """Whether this id is not on the list, but may be another writing of one that is."""
        if not self._writings or self.patient(name):
            return False
        return any(self._hash("writing", form.encode()) in self._writings for form in writings(name, sought=True))

    def goes_by(self, name: str, settled: Collection[str]) -> bool:
        """Whether a patient to be forgotten may go by this id, which people have not settled as another's."""
        return self.patient(name) or (name not in settled and self.written_otherwise(name))

    def image(self, known_as: bytes) -> bool:
        """Whether the image of this identity was a forgotten patient's."""
        return bool(self._images) and self._hash("image", known_as) in self._images

    def among(self, images: Sequence[SiteImage], settled: Collection[str]) -> list[bool]:
        """Which images are a forgotten patient's, under that name, in another writing of it or under any other.

        What cannot be read nobody can use; whoever decodes it tells why.

        Args:
            images: of the site.
            settled: ids of which people have said that each is one patient of its own.
        """
        names = {image.patient for image in images}
        gone = {name for name in names if self.goes_by(name, settled)}
        if not self._images:
            return [image.patient in gone for image in images]
        known = identities(image.source for image in images)
        return [
            image.patient in gone or (not isinstance(known_as, OSError) and self.image(known_as))
            for image, known_as in zip(images, known, strict=True)
        ]

    def add(self, name: str, images: list[bytes], in_any_writing: bool = False) -> None:
        """Put a patient and the identities of the images on the list, durably.

        Args:
            name: the patient's id.
            images: identities.
            in_any_writing: ids that may be other writings of this one are the patient's too.
        """
        forms = writings(name) if in_any_writing else ()
        written = self._writings | {self._hash("writing", form.encode()) for form in forms}
        patients = self._patients | {self._hash("patient", name.encode())}
        digests = self._images | {self._hash("image", image) for image in images}
        content = self._content.model_copy(
            update={
                "patients": tuple(sorted(patients)),
                "images": tuple(sorted(digests)),
                "writings": tuple(sorted(written)),
            }
        )
        self._state.begin()
        write_durable(self._path, content.model_dump_json().encode() + b"\n", PRIVATE)
        self._content, self._patients, self._images, self._writings = content, patients, digests, written

    def _hash(self, what: str, content: bytes) -> str:
        message = f"secfacmic forgotten 1 {what}\n".encode() + content
        return hmac.new(bytes.fromhex(self._content.key), message, hashlib.sha256).hexdigest()[:32]
