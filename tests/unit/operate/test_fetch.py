"""Images from an archive: against a small one in this process, which can misbehave in every way."""

from __future__ import annotations

import csv
import gzip
import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from secure_fed.cli import main
from secure_fed.clients.data import Choice, read_data
from secure_fed.core.errors import (
    CertificateError,
    DataError,
    KeyFileError,
    ManifestError,
    OutputError,
    PacsError,
    SecfacmicError,
    StorageError,
)
from secure_fed.core.storage import write_durable
from secure_fed.operate import dicomweb
from secure_fed.operate.dicomweb import Pacs, parse_query
from secure_fed.operate.fetch import Fetched, fetch, plan_fetch, read_token
from secure_fed.operate.labels import Labels
from secure_fed.protocol.simulation_table import Shares
from secure_fed.transport.certificates import create_authority, server_context
from tests.unit.clients.test_dicom import as_bytes, dicom

TOKEN = "s3cret-token"


def instance(patient: str, study: int, series: int, number: int, **fields: Any) -> Dataset:
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8) + number
    ids = {
        "StudyInstanceUID": f"1.2.{study}",
        "SeriesInstanceUID": f"1.2.{study}.{series}",
        "SOPInstanceUID": f"1.2.{study}.{series}.{number}",
        "AccessionNumber": f"A{study}",
        "InstanceNumber": number,
        "SeriesDescription": f"series {series}",
        "StudyDate": f"202401{study:02}",
    }
    dataset = dicom(pixels, PatientID=patient, **(ids | fields))
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


@dataclass
class Archive:
    """A DICOMweb service of a few images; ``answer`` may take a request over."""

    datasets: list[Dataset]
    url: str = ""
    heeds: frozenset[str] = frozenset(dicomweb.STUDY_KEYS + dicomweb.SERIES_KEYS)
    most: int = 1000
    pages: bool = True
    more: bool = False
    token: str | None = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    answer: Callable[[str, int], tuple[int, dict[str, str], bytes] | None] = lambda path, number: None

    def results(self, path: str, query: dict[str, list[str]]) -> list[Dataset]:
        places = re.findall(r"/(?:studies|series)/([\d.]+)", path)
        uid = {"studies": "StudyInstanceUID", "series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}
        level = uid[path.rpartition("/")[2]]
        found: dict[str, Dataset] = {}
        for one in self.datasets:
            inside = [one.StudyInstanceUID, one.SeriesInstanceUID][: len(places)] == places
            fits = all(
                dicomweb._matches(key, [str(one.get(key.replace("ModalitiesInStudy", "Modality")))], query[key][0])
                for key in self.heeds & set(query)
            )
            if inside and fits:
                found.setdefault(one[level].value, one)
        start = int(query.get("offset", ["0"])[0]) if self.pages else 0
        self.more = len(found) > start + self.most
        return list(found.values())[start : start + self.most]

    def respond(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        match = re.search(r"/instances/([\d.]+)$", path)
        if match is None:
            content = [json.loads(self.bare(one).to_json()) for one in self.results(path, query)]
            warning = {"Warning": "299 archive: There are additional results"} if self.more else {}
            return 200, {"Content-Type": "application/dicom+json"} | warning, json.dumps(content).encode()
        found = [one for one in self.datasets if one.SOPInstanceUID == match[1]]
        if not found:
            return 404, {}, b""
        return 200, *multipart(as_bytes(found[0]))

    def bare(self, one: Dataset) -> Dataset:
        keys = ("PatientID", "AccessionNumber", "StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality")
        more = ("SeriesDescription", "InstanceNumber", "StudyDate", "Rows", "Columns", "BitsAllocated")
        result = Dataset()
        for key in (*keys, *more):
            if key in one:
                setattr(result, key, one.get(key))
        return result


def multipart(content: bytes, end: bytes = b"\r\n--xyz--") -> tuple[dict[str, str], bytes]:
    head = b"--xyz\r\nContent-Type: application/dicom\r\n\r\n"
    return {"Content-Type": 'multipart/related; type="application/dicom"; boundary=xyz'}, head + content + end


def serve(archive: Archive, context: ssl.SSLContext | None = None) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            archive.asked.append((self.path, dict(self.headers)))
            parts = urlsplit(self.path)
            own = archive.answer(parts.path, len(archive.asked))
            if own is None and archive.token is not None and self.headers.get("Authorization") != archive.token:
                own = 401, {}, b""
            status, headers, body = own or archive.respond(parts.path, parse_qs(parts.query))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    scheme = "http" if context is None else "https"
    archive.url = f"{scheme}://127.0.0.1:{server.server_address[1]}/dicom-web"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def archive() -> Iterator[Archive]:
    """Two patients with two studies and one, and a structured report."""
    datasets = [instance(f"P{study % 2}", study, 1, number) for study in (1, 2, 3) for number in (1, 2, 3)]
    archive = Archive([*datasets, instance("P1", 1, 2, 1, Modality="SR")])
    server = serve(archive)
    yield archive
    server.shutdown()
    server.server_close()


def open_archive(archive: Archive, **options: Any) -> Pacs:
    return Pacs(archive.url, **({"rate": 1000.0, "patience": 0.01} | options))


def run(archive: Archive, out: Path, *query: str, labels: Path | None = None, **options: Any) -> Fetched:
    pacs = open_archive(archive, **options)
    table = None if labels is None else Labels.read(labels)
    return fetch(pacs, plan_fetch(pacs, parse_query(query), table, out))


def manifest(out: Path) -> list[dict[str, str]]:
    with (out / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def files(out: Path) -> list[Path]:
    return sorted(path for path in (out / "images").rglob("*") if path.is_file())


# --- what is fetched ---


def test_files_are_the_archives_byte_for_byte_and_the_manifest_names_their_patients(archive, tmp_path):
    done = run(archive, tmp_path / "data", "Modality=MR")
    assert done.plan.document()["series_left_out"] == {}  # the report did not match the query
    kept = {path.stem: path.read_bytes() for path in files(tmp_path / "data")}
    assert kept == {one.SOPInstanceUID: as_bytes(one) for one in archive.datasets if one.Modality == "MR"}
    rows = manifest(tmp_path / "data")
    assert {(row["patient"], row["accession"]) for row in rows} == {("P1", "A1"), ("P0", "A2"), ("P1", "A3")}
    assert {str(tmp_path / "data" / row["path"]) for row in rows} == {str(path) for path in files(tmp_path / "data")}
    assert all(path.stat().st_mode & 0o077 == 0 for path in [*files(tmp_path / "data"), tmp_path / "data/manifest.csv"])


def test_the_manifests_series_are_those_of_which_sites_choose_slices(archive, tmp_path):
    run(archive, tmp_path / "data", "Modality=MR")
    rows = manifest(tmp_path / "data")
    for row in rows:
        assert row["series"] == pydicom.dcmread(tmp_path / "data" / row["path"]).SeriesInstanceUID
    labelled = [row | {"label": "dark"} for row in rows]
    with (tmp_path / "data" / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(labelled[0]))
        writer.writeheader()
        writer.writerows(labelled)
    shares = Shares(train=1, val=0, test=0, unlabelled=0)
    found = read_data(tmp_path / "data", ["dark"], "patient", shares, 0, choice=Choice("middle"))
    assert [image.path.parent.name for image in found] == sorted({row["series"] for row in rows})


def test_what_is_no_picture_is_left_out_and_counted(archive, tmp_path):
    done = run(archive, tmp_path / "data", "PatientID=P1")
    assert done.document()["series_left_out"] == {"SR": 1}
    assert (done.document()["images"], done.document()["patients"]) == (6, 1)


def test_number_and_size_are_known_before_anything_is_fetched(archive, tmp_path):
    plan = plan_fetch(open_archive(archive), {"PatientID": "P1"}, None, tmp_path / "data")
    assert (len(plan.absent), plan.size, plan.sizes_unknown) == (6, 6 * 8 * 8 * 2, 0)
    assert not (tmp_path / "data").exists()
    assert not [path for path, _ in archive.asked if re.search(r"/instances/", path)]


def test_nothing_leaves_but_the_query_and_it_goes_to_the_archive_alone(archive, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    archive.token = f"Bearer {TOKEN}"
    run(archive, tmp_path / "data", "PatientID=P0", token=TOKEN)
    fields = {*dicomweb._SIZE, "AccessionNumber", "PatientID", "Modality"}
    assert len(archive.asked) > 5
    for path, headers in archive.asked:
        query = parse_qs(urlsplit(path).query)
        assert set(query) <= {"offset", "includefield", "PatientID"}
        assert set(query.get("includefield", ())) <= fields
        assert set(headers) == {"Host", "User-Agent", "Accept-Encoding", "Accept", "Connection", "Authorization"}
        assert headers["User-Agent"] == "secfacmic"


def test_requests_keep_the_rate(archive, monkeypatch):
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(dicomweb.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dicomweb.time, "sleep", sleep)
    open_archive(archive, rate=4).search([{"PatientID": "P0"}])
    assert sum(slept) == pytest.approx((len(archive.asked) - 1) / 4)


def test_an_interrupted_fetch_goes_on_with_what_is_absent(archive, tmp_path):
    class Interrupted(Exception):
        pass

    pacs = open_archive(archive)
    plan = plan_fetch(pacs, {"PatientID": "P1"}, None, tmp_path / "data")

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fetch(pacs, plan, interrupt)
    assert len(files(tmp_path / "data")) == 2
    assert not (tmp_path / "data/manifest.csv").exists()
    series = files(tmp_path / "data")[0].parent
    (series / ".1.2.1.1.3.dcm.k3x").write_bytes(b"half")  # as a process leaves it that was killed
    archive.asked.clear()
    done = run(archive, tmp_path / "data", "PatientID=P1")
    assert len([path for path, _ in archive.asked if re.search(r"/instances/", path)]) == 4
    assert len(done.plan.absent) == 4
    assert len(files(tmp_path / "data")) == len(manifest(tmp_path / "data")) == 6


def test_what_the_archive_lists_no_more_is_told_and_not_in_the_manifest(archive, tmp_path):
    run(archive, tmp_path / "data", "PatientID=P0")
    archive.datasets = [one for one in archive.datasets if one.SOPInstanceUID != "1.2.2.1.2"]
    done = run(archive, tmp_path / "data", "PatientID=P0")
    assert done.unlisted == 1
    assert len(manifest(tmp_path / "data")) == 2


def test_a_manifest_that_people_have_completed_is_not_written_over(archive, tmp_path, monkeypatch):
    out = tmp_path / "data"
    run(archive, out, "PatientID=P1")
    run(archive, out, "PatientID=P1")
    own = (out / "manifest.csv").read_text().replace("path,", "split,path,").replace("\nimages", "\ntest,images")
    (out / "manifest.csv").write_text(own)
    asked = len(archive.asked)
    with pytest.raises(OutputError, match=r"manifest.csv: changed since it was fetched, and would be written over"):
        run(archive, out, "PatientID=P1")
    assert (out / "manifest.csv").read_text() == own
    assert len(archive.asked) == asked
    (out / "manifest.csv").rename(tmp_path / "mine.csv")
    (out / "manifest.csv").mkdir()
    with pytest.raises(OutputError, match=r"manifest.csv: cannot be read .*move it elsewhere"):
        run(archive, out, "PatientID=P1")
    (out / "manifest.csv").rmdir()

    archive.datasets.append(instance("P1", 5, 1, 1))
    ended: list[Path] = []

    def killed(path: Path, content: bytes, mode: int) -> None:
        if ended:
            raise KeyboardInterrupt
        write_durable(path, content, mode)
        ended.extend([path] * (path.name == "manifest.csv"))

    monkeypatch.setattr("secure_fed.operate.fetch.write_durable", killed)
    with pytest.raises(KeyboardInterrupt):  # between the manifest and the last word on it
        run(archive, out, "PatientID=P1")
    monkeypatch.undo()
    assert len(manifest(out)) == 7
    archive.datasets.append(instance("P1", 7, 1, 1))
    run(archive, out, "PatientID=P1")
    assert len(manifest(out)) == 8


def test_one_image_in_two_series_of_the_archive_is_refused(archive, tmp_path):
    again = instance("P1", 3, 1, 1, SOPInstanceUID="1.2.1.1.1")
    archive.datasets.append(again)
    with pytest.raises(PacsError, match=r"lists image 1\.2\.1\.1\.1 in series 1\.2\.1\.1 and in 1\.2\.3\.1; expected"):
        run(archive, tmp_path / "data", "PatientID=P1")


def test_a_size_that_no_image_has_is_unknown(archive, tmp_path):
    archive.answer = lambda path, number: huge if path.endswith("/1.2.1.1/instances") else None
    entry = {tag: {"vr": "US", "Value": ["9" * 5000]} for tag in ("00280010", "00280011", "00280100")}
    listed = [entry | {"00080018": {"vr": "UI", "Value": [f"1.2.1.1.{number}"]}} for number in (1, 2, 3)]
    huge = 200, {"Content-Type": "application/dicom+json"}, json.dumps(listed).encode()
    plan = plan_fetch(open_archive(archive), {"PatientID": "P1"}, None, tmp_path / "data")
    assert (plan.sizes_unknown, plan.size) == (3, 6 * 128)


def test_another_query_or_another_folder_is_refused(archive, tmp_path):
    run(archive, tmp_path / "data", "PatientID=P0")
    with pytest.raises(OutputError, match="holds PatientID=P0"):
        run(archive, tmp_path / "data", "PatientID=P1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run(archive, tmp_path / "other", "PatientID=P1")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["letter.txt"]


# --- archives that are not as the standard has them ---


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_all_pages_are_asked_for_however_few_results_an_archive_gives_at_once(archive, tmp_path, most):
    archive.most = most
    assert len(run(archive, tmp_path / "data", "StudyDate=20240101-").plan.found.images) == 9


def test_an_archive_that_ignores_pages_and_cuts_its_answers_is_refused(archive, tmp_path):
    archive.pages, archive.most = False, 2
    with pytest.raises(PacsError, match="ignores pages"):
        run(archive, tmp_path / "data", "StudyDate=20240101-")
    assert not (tmp_path / "data").exists()


def test_an_archive_that_gives_all_at_once_is_read_and_told(archive, tmp_path):
    archive.pages = False
    done = run(archive, tmp_path / "data", "StudyDate=20240101-")
    assert (len(done.plan.found.images), done.plan.found.unpaged) == (9, True)


def test_answers_that_do_not_match_are_left_out_since_archives_ignore_keys(archive, tmp_path):
    archive.heeds = frozenset()
    done = run(archive, tmp_path / "data", "PatientID=P0", "SeriesDescription=series*")
    assert {row["patient"] for row in manifest(tmp_path / "data")} == {"P0"}
    assert done.plan.found.ignored == {"PatientID": 2}


@pytest.mark.parametrize(
    ("key", "found", "wanted", "fits"),
    [
        ("PatientID", "007", "7", False),
        ("PatientID", "1234", "12-34", False),
        ("PatientID", "A[1]", "A[1]", True),
        ("PatientName", "DOE^JANE", "Doe*", True),
        ("StudyDate", "20240110", "20240101-20240131", True),
        ("StudyDate", "20240201", "20240101-20240131", False),
        ("StudyDate", "20240201", "20240101-", True),
        ("StudyTime", "101530.25", "1000-1015", True),
        ("ModalitiesInStudy", "MR", "CT\\MR", True),
        ("Modality", "MR", "CT", False),
    ],
)
def test_matching_is_the_standards(key, found, wanted, fits):
    assert dicomweb._matches(key, [found], wanted) is fits
    assert dicomweb._matches(key, [], wanted)  # not told, so taken


# --- bad input ---


def test_a_wrong_address_is_told(archive, tmp_path):
    for url, text in [
        ("pacs.example.org", "no URL"),
        ("ftp://pacs.example.org", "no URL"),
        ("https://pacs.example.org:port/x", "no URL"),
        ("https://me:pass@pacs.example.org", "user or password"),
        ("http://127.0.0.1:9/dicom-web", "cannot be reached"),
    ]:
        with pytest.raises(PacsError, match=text) as refusal:
            Pacs(url, patience=0.01).search([{"PatientID": "P1"}])
        assert "pass@" not in str(refusal.value)
    archive.answer = lambda path, number: (404, {}, b"not here")
    with pytest.raises(PacsError, match=r"404.*root of the DICOMweb service"):
        run(archive, tmp_path / "data", "PatientID=P1")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((401, {}, b""), "401.*--token-file"),
        ((403, {}, b""), "403.*may read"),
        ((500, {}, b"oops"), "500"),
        ((503, {"Retry-After": "0"}, b""), "busy"),
        (
            (302, {"Location": "https://elsewhere.example.org/login?x=1"}, b""),
            "redirects to https://elsewhere.*/login;",
        ),
        ((200, {"Content-Type": "text/html"}, b"<html>Log in</html>"), "text/html came; expected DICOM JSON"),
        ((200, {"Content-Type": "application/json"}, b"<html>"), "no JSON"),
        ((200, {"Content-Type": "application/json"}, b"\xff["), "no JSON"),
        ((200, {"Content-Type": "application/json"}, b"[" * 100_000), "no JSON"),
        ((200, {"Content-Type": "application/json"}, b'["a"]'), "no list of results"),
        ((200, {"Content-Type": "application/json"}, b'[{"0020000D": {"Value": ["../../etc"]}}]'), "digits and dots"),
        # A hidden name, which would be taken for what a killed process left.
        ((200, {"Content-Type": "application/json"}, b'[{"0020000D": {"Value": [".1.2"]}}]'), "digits and dots"),
        ((200, {"Content-Type": "application/json"}, b'[{"0020000D": {"Value": ["1..2"]}}]'), "digits and dots"),
        ((200, {"Content-Type": "application/json", "Content-Length": "900"}, b"[]"), "broken off"),
    ],
)
def test_what_is_no_answer_to_a_search_is_told(archive, tmp_path, answer, text):
    archive.answer = lambda path, number: answer
    with pytest.raises(PacsError, match=text):
        run(archive, tmp_path / "data", "PatientID=P1")
    assert not (tmp_path / "data").exists()


def test_an_archive_whose_pages_never_end_is_not_read_for_ever(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(dicomweb, "MOST_FOUND", 5000)

    def answer(path: str, number: int) -> Any:
        page = [{"0020000D": {"Value": [f"1.{number}"]}}] if number < 500 else []
        return 200, {"Content-Type": "application/json"}, json.dumps(page).encode()

    archive.answer = answer
    with pytest.raises(PacsError, match=r"answers to a search have more than 5,000 bytes; expected fewer"):
        run(archive, tmp_path / "data", "PatientID=P1")
    assert 50 < len(archive.asked) < 200


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ((404, {}, b""), "404"),
        ((200, {"Content-Type": "text/html"}, b"<html>"), "text/html came; expected DICOM"),
        ((200, *multipart(b"no DICOM at all" * 20)), "no DICOM file"),
        ((200, *multipart(as_bytes(instance("P1", 9, 9, 9)))), "SOPInstanceUID '1.2.9.9.9'"),
        ((200, *multipart(as_bytes(instance("P7", 1, 1, 2)))), "PatientID 'P7'"),
        ((200, *multipart(as_bytes(instance("P1", 1, 1, 2, StudyInstanceUID="1.2.3")))), "StudyInstanceUID '1.2.3'"),
        ((200, *multipart(as_bytes(instance("P1", 1, 1, 2, SeriesInstanceUID="1.9")))), "SeriesInstanceUID '1.9'"),
        ((200, *multipart(as_bytes(instance("P1", 1, 1, 2))[:-40], b"")), "broken off 3 times"),
    ],
)
def test_an_image_that_does_not_come_is_named_and_asked_for_again(archive, tmp_path, answer, text):
    archive.answer = lambda path, number: answer if path.endswith("/instances/1.2.1.1.2") else None
    done = run(archive, tmp_path / "data", "PatientID=P1")
    with pytest.raises(PacsError, match=text) as refusal:
        done.refuse_gaps()
    assert "1 of 6 images did not come" in str(refusal.value)
    assert len(files(tmp_path / "data")) == len(manifest(tmp_path / "data")) == 5
    archive.answer = lambda path, number: None
    run(archive, tmp_path / "data", "PatientID=P1").refuse_gaps()
    assert len(files(tmp_path / "data")) == len(manifest(tmp_path / "data")) == 6


def test_a_transfer_that_is_broken_off_once_is_tried_again(archive, tmp_path):
    cut = []

    def answer(path: str, number: int) -> Any:
        if path.endswith("/instances/1.2.1.1.2") and len(cut) < 2:
            cut.append(path)
            headers, body = multipart(as_bytes(instance("P1", 1, 1, 2)))
            return 200, headers | {"Content-Length": str(len(body))}, body[: -20 * len(cut)]
        return None

    archive.answer = answer
    run(archive, tmp_path / "data", "PatientID=P1").refuse_gaps()
    assert len(cut) == 2
    assert len(files(tmp_path / "data")) == 6


@pytest.mark.parametrize("packed", [True, False])
def test_an_archive_that_sends_more_than_it_announced_is_stopped(archive, tmp_path, monkeypatch, packed):
    monkeypatch.setattr(dicomweb, "MOST_BESIDE", 20_000)
    monkeypatch.setattr(dicomweb, "MOST_FOUND", 50_000)
    headers, body = multipart(as_bytes(archive.datasets[0]))
    body = body.replace(b"\r\n--xyz--", bytes(10_000_000) + b"\r\n--xyz--")
    if packed:
        headers, body = headers | {"Content-Encoding": "gzip"}, gzip.compress(body)
        assert len(body) < 20_000
    archive.answer = lambda path, number: (200, headers, body) if path.endswith("1.2.1.1.1") else None
    done = run(archive, tmp_path / "mri", "StudyDate=20240101-20240131")
    assert list(done.lost) == ["1.2.1.1.1"]
    assert "more than 20,256 bytes came, which is more than the search announced" in done.lost["1.2.1.1.1"]
    assert len(files(tmp_path / "mri")) == 8
    with pytest.raises(PacsError, match="1 of 9 images did not come"):
        done.refuse_gaps()
    monkeypatch.setattr(dicomweb, "MOST_UNANNOUNCED", 30_000)
    for dataset in archive.datasets:
        del dataset.BitsAllocated
    archive.answer = lambda path, number: (200, headers, body) if path.endswith("1.2.1.1.1") else None
    done = run(archive, tmp_path / "unknown", "StudyDate=20240101")
    assert "more than 30,000 bytes came" in done.lost["1.2.1.1.1"]
    long = b"[" + b" " * 1_000_000 + b"]"
    about = {"Content-Type": "application/dicom+json"} | ({"Content-Encoding": "gzip"} if packed else {})
    archive.answer = lambda path, number: (200, about, gzip.compress(long) if packed else long)
    with pytest.raises(PacsError, match=r"the answers to a search have more than 50,000 bytes; .* narrow the query"):
        run(archive, tmp_path / "search", "StudyDate=20240101-20240131")
    assert not (tmp_path / "search").exists()


def test_an_archive_that_gives_no_image_at_all_is_not_asked_for_thousands(archive, tmp_path):
    archive.datasets = [instance("P1", 1, 1, number) for number in range(1, 40)]
    archive.answer = lambda path, number: (500, {}, b"") if "/instances/" in path else None
    with pytest.raises(PacsError, match="10 images in succession"):
        run(archive, tmp_path / "data", "PatientID=P1")
    assert len([path for path, _ in archive.asked if "/instances/" in path]) == 10


def test_a_full_disk_ends_the_fetch_with_whole_files_alone(archive, tmp_path, monkeypatch):
    from secure_fed.core import storage

    def replace(source: str, target: Path) -> None:
        if target.name == "1.2.1.1.3.dcm":
            raise OSError(28, "No space left on device")
        real(source, target)

    real = storage.os.replace
    monkeypatch.setattr(storage.os, "replace", replace)
    with pytest.raises(StorageError, match="No space left"):
        run(archive, tmp_path / "data", "PatientID=P1")
    monkeypatch.undo()
    assert [path.name for path in files(tmp_path / "data")] == ["1.2.1.1.1.dcm", "1.2.1.1.2.dcm"]
    run(archive, tmp_path / "data", "PatientID=P1")
    assert len(files(tmp_path / "data")) == 6


def test_nothing_found_is_an_error_that_says_what_was_left_out(archive, tmp_path):
    with pytest.raises(DataError, match="no image matches PatientID=nobody"):
        run(archive, tmp_path / "data", "PatientID=nobody")
    archive.datasets = [instance("P1", 1, 2, 1, Modality="SR")]
    with pytest.raises(DataError, match="1 of SR"):
        run(archive, tmp_path / "data", "PatientID=P1")


@pytest.mark.parametrize("term", ["PatientID", "PatientID=", "Nonsense=1", "=1"])
def test_a_query_that_is_none_is_refused(term):
    with pytest.raises(ValueError, match="expected"):
        parse_query([term])
    with pytest.raises(ValueError, match="twice"):
        parse_query(["PatientID=1", "PatientID=2"])


# --- tokens and certificates ---


def test_the_token_comes_from_a_closed_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        read_token(file)
    monkeypatch.setenv("SECFACMIC_DICOMWEB_TOKEN", "other")
    assert read_token(None) == "other"
    monkeypatch.delenv("SECFACMIC_DICOMWEB_TOKEN")
    assert read_token(None) is None


def test_a_token_has_its_scheme_and_never_goes_in_clear(archive, tmp_path):
    archive.token = "Basic cmVhZGVyOnNlY3JldA=="
    run(archive, tmp_path / "data", "PatientID=P0", token=archive.token)
    with pytest.raises(PacsError, match="in clear") as refusal:
        Pacs("http://pacs.example.org/dicom-web", token=TOKEN)
    assert TOKEN not in str(refusal.value)
    with pytest.raises(KeyFileError, match="plain letters"):
        Pacs(archive.url, token="two\nlines")


def test_the_token_is_in_no_message_log_or_file(archive, tmp_path, caplog):
    caplog.set_level(0)
    archive.token = f"Bearer {TOKEN}"
    run(archive, tmp_path / "data", "PatientID=P0", token=TOKEN)
    said: list[str] = []
    for answer in [(401, {}, b""), (500, {}, b""), (302, {"Location": "http://x/"}, b""), (200, {}, b"")]:
        archive.answer = lambda path, number, answer=answer: answer
        with pytest.raises(SecfacmicError) as refusal:
            run(archive, tmp_path / "other", "PatientID=P0", token=TOKEN)
        said.append(str(refusal.value))
    kept = "".join(path.read_text("latin-1") for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert TOKEN not in caplog.text + kept + "".join(said)


def test_only_the_archives_own_authority_is_trusted(tmp_path):
    create_authority(tmp_path / "tls", ["127.0.0.1"])
    create_authority(tmp_path / "others", ["127.0.0.1"])
    archive = Archive([instance("P1", 1, 1, 1)])
    server = serve(archive, server_context(tmp_path / "tls/server.crt", tmp_path / "tls/server.key"))
    try:
        run(archive, tmp_path / "data", "PatientID=P1", authority=tmp_path / "tls/ca.crt", token=TOKEN)
        assert len(files(tmp_path / "data")) == 1
        for authority in (tmp_path / "others/ca.crt", None):
            archive.asked.clear()
            with pytest.raises(CertificateError, match="--ca FILE"):
                run(archive, tmp_path / "other", "PatientID=P1", authority=authority, token=TOKEN)
            assert archive.asked == []
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(CertificateError, match="PEM"):
        Pacs(archive.url, authority=tmp_path / "none.crt")


# --- labels ---


def table(folder: Path, *lines: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_labels_are_joined_by_accession_number_and_what_does_not_join_is_reported(archive, tmp_path):
    labels = table(tmp_path, "Accession Number,label,remark", "A1,glioma,x", "", "A2,,unclear", "A7,glioma,", "a3,x,")
    done = run(archive, tmp_path / "data", "StudyDate=2024-", "Modality=MR", labels=labels)
    assert {(row["accession"], row["label"]) for row in manifest(tmp_path / "data")} == {
        *(("A1", "glioma"), ("A2", ""), ("A3", ""))
    }
    assert done.document()["labels"] == {
        "rows": 3,
        "rows_joined": 1,
        "rows_not_joined": [
            "line 5: accession A7: no such study was found",
            "line 6: accession a3: no such study was found; the archive has A3, which is not the same",
        ],
        "studies_without_label": ["accession A2, patient P0: 3 images", "accession A3, patient P1: 3 images"],
        "images_without_label": 6,
    }
    assert json.loads((tmp_path / "data/fetch.json").read_text())["labels"] == done.document()["labels"]


def test_a_spreadsheets_semicolons_are_read(archive, tmp_path):
    run(archive, tmp_path / "data", labels=table(tmp_path, "accession;label", "A2;light, mild"))
    assert {row["label"] for row in manifest(tmp_path / "data")} == {"light, mild"}


def test_labels_are_joined_by_patient(archive, tmp_path):
    labels = table(tmp_path, "patient,label", "P1,glioma", "1.2E+11,none")
    done = run(archive, tmp_path / "data", "StudyDate=2024-", "Modality=MR", labels=labels)
    found = {(row["patient"], row["label"]) for row in manifest(tmp_path / "data")}
    assert found == {("P1", "glioma"), ("P0", "")}
    assert "spreadsheet has rounded it" in done.document()["labels"]["rows_not_joined"][0]


def test_without_a_query_for_studies_the_table_says_which(archive, tmp_path):
    labels = table(tmp_path, "accession,label", "A2,glioma", "A3,none")
    run(archive, tmp_path / "data", labels=labels)
    assert {row["accession"] for row in manifest(tmp_path / "data")} == {"A2", "A3"}
    searches = [parse_qs(urlsplit(path).query) for path, _ in archive.asked if "/studies?" in path]
    assert {search["AccessionNumber"][0] for search in searches} == {"A2", "A3"}


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["accession,label,label"], "has the name of column 2"),
        (["accession,label,Class"], "both say label"),
        (["accession,diagnosis", "A1,x"], "expected label, and accession or patient"),
        (["accession,label", "A1,x,y"], "line 2: 3 cells; expected 2"),
        (["accession,label", "A1,x", "A1,y"], "line 3: accession A1 is 'y', and on line 2 'x'"),
        (["accession,label", ",x"], "line 2: a label and neither"),
        (["accession,label", "A*,x"], "match anything"),
        (["accession,label", "A1,"], "no row with a label"),
        (["accession,patient,label", "A1,P0,x"], "line 2: accession A1 is of patient 'P0', and in the archive of 'P1'"),
        (["accession,patient,label", "A1,P1,x", ",P1,y"], "two labels fit it"),
    ],
)
def test_a_table_that_leaves_a_label_uncertain_is_refused(archive, tmp_path, lines, text):
    with pytest.raises(ManifestError, match=re.escape(text)):
        run(archive, tmp_path / "data", "StudyDate=2024-", "Modality=MR", labels=table(tmp_path, *lines))
    assert not (tmp_path / "data").exists()


def test_one_accession_number_of_two_patients_gives_neither_a_label(archive, tmp_path):
    archive.datasets.append(instance("P9", 9, 1, 1, AccessionNumber="A1"))
    wanted, bare = ("StudyDate=2024-", "Modality=MR"), ("accession,label", "A1,glioma")
    with pytest.raises(ManifestError, match="of several patients in the archive: P1, P9"):
        run(archive, tmp_path / "data", *wanted, labels=table(tmp_path, *bare))
    run(archive, tmp_path / "data", *wanted, labels=table(tmp_path, "accession,patient,label", "A2,P0,glioma"))


# --- the command ---


def secfacmic(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["secfacmic", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_tells_number_and_size_and_prints_one_document(archive, tmp_path, monkeypatch, capsys):
    out = tmp_path / "data"
    arguments = ("data", "fetch", "--dicomweb", archive.url, "--out", str(out), "--query", "PatientID=P1", "--json")
    assert secfacmic(monkeypatch, *arguments) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["fetched"] == 6
    assert "found: 6 images in 2 series of 2 studies, 1 patients" in said.err
    assert "to fetch: 6 images, at most about 0.0 MB" in said.err
    assert "left out: 1 series of SR" in said.err
    archive.answer = lambda path, number: (401, {}, b"")
    assert secfacmic(monkeypatch, *arguments) == PacsError.exit_code
    assert secfacmic(monkeypatch, *arguments[:-2], "Nonsense=1") == 2
    assert secfacmic(monkeypatch, *arguments[:6]) == 2
