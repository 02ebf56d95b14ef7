"""From a hospital's image archive to a data folder: files, and a manifest with labels joined from a table.

The folder holds ``images/STUDY/SERIES/IMAGE.dcm``, ``manifest.csv`` and ``fetch.json``, which says what was asked for
and what did not fit. A file is whole or not there; the same command goes on where another was interrupted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secure_fed.clients.files import MANIFEST
from secure_fed.core.errors import DataError, KeyFileError, OutputError, PacsError
from secure_fed.core.storage import LOCK, exclusive, make_folder, write_durable
from secure_fed.operate.dicomweb import STUDY_KEYS, Found, NotFetchedError, Pacs, PacsImage
from secure_fed.operate.labels import Joined, Labels
from secure_fed.protocol.signing import read_private

RECORD = "fetch.json"
"""Beside the manifest: what was asked for, and what became of it."""

TOKEN = "SECFACMIC_DICOMWEB_TOKEN"
"""The environment's variable with the token, where no file is given."""

_IMAGES = "images"
_MOST_LOST = 10
"""So many images in succession that do not come are no accident of one of them."""

_DIGESTS = "manifest_sha256"
"""Key of the record: of the manifests that a fetch wrote, so that one that people completed is not written over."""

_LISTED = 10
_FIELDS = ("path", "label", "patient", "accession", "modality", "study", "series", "instance")

Tell = Callable[[int, int], None]


def read_token(file: Path | None) -> str | None:
    """The token from a file that nobody else can read, or from the environment; None if there is none.

    Raises:
        KeyFileError: the file cannot be read, is readable by others, or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN, "").strip() or None
    token = read_private(file).decode("utf-8", "replace").strip()
    if not token:
        raise KeyFileError(f"{file}: empty; expected the archive's token in it, one line")
    return token


@dataclass(frozen=True)
class Plan:
    """What a fetch is going to do.

    Attributes:
        out: the data folder.
        url: the archive's.
        query: as it was asked; with ``labels`` for queries by the keys of a table.
        found: what the archive has of it.
        joined: labels, if there is a table.
        absent: images that are not in the folder yet.
        free: bytes free where the folder is.
    """

    out: Path
    url: str
    query: Mapping[str, str]
    found: Found
    joined: Joined | None
    absent: tuple[PacsImage, ...]
    free: int

    @property
    def size(self) -> int:
        """Bytes of the absent images' pixels, uncompressed; those that the archive does not tell count as the mean."""
        sizes = [image.size for image in self.absent if image.size is not None]
        return sum(sizes) * len(self.absent) // len(sizes) if sizes else 0

    @property
    def sizes_unknown(self) -> int:
        """Of how many absent images the archive does not tell the size."""
        return sum(image.size is None for image in self.absent)

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        images = self.found.images
        return {
            "format": 1,
            "dicomweb": self.url,
            "query": dict(self.query),
            "images": len(images),
            "series": len({image.series for image in images}),
            "studies": len({image.study for image in images}),
            "patients": len({image.patient for image in images}),
            "images_without_patient": sum(not image.patient for image in images),
            "to_fetch": len(self.absent),
            "bytes_at_most": self.size,
            "sizes_unknown": self.sizes_unknown,
            "bytes_free": self.free,
            "series_left_out": self.found.left_out,
            "query_not_heeded": self.found.ignored,
            "unpaged": self.found.unpaged,
            "labels": None if self.joined is None else self.joined.document(),
        }


@dataclass
class Fetched:
    """What a fetch did.

    Attributes:
        plan: of it.
        lost: why not, by uid, of images that did not come.
        unlisted: files of earlier fetches that the archive does not list any more; the manifest does not either.
    """

    plan: Plan
    lost: dict[str, str] = field(default_factory=dict)
    unlisted: int = 0

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        return self.plan.document() | {
            "fetched": len(self.plan.absent) - len(self.lost),
            "not_fetched": self.lost,
            "files_no_longer_listed": self.unlisted,
            "manifest": str(self.plan.out / MANIFEST),
        }

    def refuse_gaps(self) -> None:
        """Check that every image came.

        Raises:
            PacsError: some did not; with the first of them.
        """
        if self.lost:
            shown = "".join(f"\n  {reason}" for reason in list(self.lost.values())[:_LISTED])
            raise PacsError(
                f"{self.plan.url}: {len(self.lost)} of {len(self.plan.found.images)} images did not come, and are not "
                f"in the manifest; expected all: the same command asks for these again{shown}"
            )


def plan_fetch(
    pacs: Pacs,
    query: Mapping[str, str],
    labels: Labels | None,
    out: Path,
    tell: Tell = lambda done, total: None,
) -> Plan:
    """Ask an archive what it has; nothing is fetched or written.

    Args:
        pacs: the archive.
        query: from keyword to value. Without a keyword of a study, the table of labels says which studies: one search
            for each accession number or patient in it.
        labels: a table of labels, if there is one.
        out: folder for the data: new, empty, or of the same query of the same archive.
        tell: is told how many searches are done, of how many known so far.

    Raises:
        OutputError: the folder holds something else, or its manifest was changed since.
        PacsError, CertificateError: the archive cannot be asked.
        ManifestError: the table contradicts what the archive says.
        DataError: nothing was found.
    """
    by_table = labels is not None and not any(key in STUDY_KEYS for key in query)
    asked = dict(query) | ({"labels": str(labels.path.name)} if labels is not None and by_table else {})
    _check_folder(out, pacs.url, asked)
    queries = [{**query, **key} for key in labels.queries()] if labels is not None and by_table else [query]
    found = pacs.search(queries, tell)
    if not found.images:
        left_out = ", ".join(f"{count} of {modality}" for modality, count in sorted(found.left_out.items()))
        ignored = ", ".join(f"{count} whose {key} is another" for key, count in sorted(found.ignored.items()))
        raise DataError(
            f"{pacs.url}: no image matches {_as_text(asked)}"
            + (f" (series that are no pictures: {left_out})" if left_out else "")
            + (f" (answered, and left out: {ignored})" if ignored else "")
            + "; expected some: look at the values, which may have * and ? in them (some archives need ? for a blank)"
        )
    joined = None if labels is None else labels.join(found.images)
    absent = tuple(image for image in found.images if not _file(out, image).exists())
    place = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    return Plan(out, pacs.url, asked, found, joined, absent, shutil.disk_usage(place).free)


def fetch(pacs: Pacs, plan: Plan, tell: Tell = lambda done, total: None) -> Fetched:
    """Fetch what is absent, and write the manifest of all that is there.

    Args:
        pacs: the archive.
        plan: what to fetch.
        tell: is told how many images are done, of how many.

    Raises:
        PacsError, CertificateError: the archive cannot be asked, or ten images in succession did not come.
        StorageError: the disk is full, or another process uses the folder; what was fetched is kept.
    """
    make_folder(plan.out, 0o700)
    with exclusive(plan.out):
        _check_folder(plan.out, plan.url, plan.query)
        written = _digests(plan.out)
        _write_record(plan.out, plan.document() | written)  # so that an interrupted fetch is known for what it is
        for leftover in (plan.out / _IMAGES).glob("*/*/.*"):  # of a process that was killed while it wrote
            leftover.unlink()
        done = Fetched(plan)
        in_succession = 0
        for number, image in enumerate(plan.absent):
            tell(number, len(plan.absent))
            target = _file(plan.out, image)
            if target.exists():
                continue
            try:
                content = pacs.retrieve(image)
            except NotFetchedError as error:
                done.lost[image.uid] = str(error)
                in_succession += 1
                if in_succession >= _MOST_LOST:
                    raise PacsError(
                        f"{plan.url}: {in_succession} images in succession did not come; expected them: what was "
                        f"fetched is kept, and the same command goes on. The last: {error}"
                    ) from error
                continue
            in_succession = 0
            make_folder(target.parent, 0o700)
            write_durable(target, content, mode=0o600)
        tell(len(plan.absent), len(plan.absent))
        listed = {_file(plan.out, image) for image in plan.found.images}
        done.unlisted = sum(path not in listed for path in (plan.out / _IMAGES).glob("*/*/*.dcm"))
        manifest = _manifest(plan, done.lost)
        new = hashlib.sha256(manifest).hexdigest()
        _write_record(plan.out, plan.document() | {_DIGESTS: [*written[_DIGESTS], new]})
        write_durable(plan.out / MANIFEST, manifest, mode=0o600)
        _write_record(plan.out, done.document() | {_DIGESTS: [new]})
    return done


def _file(out: Path, image: PacsImage) -> Path:
    return out / _IMAGES / image.study / image.series / f"{image.uid}.dcm"


def _check_folder(out: Path, url: str, query: Mapping[str, str]) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: no folder; expected a new or empty folder, or one of an earlier fetch")
    try:
        content = json.loads((out / RECORD).read_bytes())
        before = (str(content["dicomweb"]), dict(content["query"]))
        written = content.get(_DIGESTS)
    except FileNotFoundError as error:
        if any(entry.name != LOCK for entry in out.iterdir()):
            raise OutputError(
                f"{out}: holds something else; expected a new or empty folder, or one of an earlier fetch: choose "
                "another"
            ) from error
        return
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{out / RECORD}: cannot be read; expected what an earlier fetch wrote: choose another folder"
        ) from error
    if before != (url, dict(query)):
        raise OutputError(
            f"{out}: holds {_as_text(before[1])} of {before[0]}; expected a new or empty folder for {_as_text(query)} "
            f"of {url}: choose another, or give the same query again"
        )
    there = _digests(out)[_DIGESTS]
    if written is not None and there and there[0] not in written:
        raise OutputError(
            f"{out / MANIFEST}: changed since it was fetched, and would be written over; expected it as it was: move "
            "it elsewhere, fetch, and bring over what was added"
        )


def _digests(out: Path) -> dict[str, list[str]]:
    """Of the manifest that is there, for the record."""
    try:
        return {_DIGESTS: [hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()]}
    except FileNotFoundError:
        return {_DIGESTS: []}
    except OSError as error:
        raise OutputError(
            f"{out / MANIFEST}: cannot be read ({error.strerror}); expected the manifest of an earlier fetch, or none: "
            "move it elsewhere"
        ) from error


def _as_text(query: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in query.items())


def _write_record(out: Path, document: dict[str, Any]) -> None:
    write_durable(out / RECORD, (json.dumps(document, indent=2) + "\n").encode(), mode=0o600)


def _manifest(plan: Plan, lost: Mapping[str, str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_FIELDS)
    for image in plan.found.images:
        if image.uid not in lost:
            path = _file(Path(), image).as_posix()
            label = "" if plan.joined is None else plan.joined.label(image)
            about = (image.patient, image.accession, image.modality, image.study, image.series, image.number)
            writer.writerow((path, label, *about))
    return text.getvalue().encode()
