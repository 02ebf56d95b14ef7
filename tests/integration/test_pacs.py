"""Images from a real archive: Orthanc on loopback, as Debian has it. Run with ``make test-pacs``."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from secure_fed.clients.data import read_data
from secure_fed.operate.dicomweb import Pacs
from secure_fed.protocol.simulation_table import Shares
from tests.unit.clients.test_dicom import as_bytes
from tests.unit.operate.test_fetch import instance

ORTHANC = shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin:/usr/bin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
BASIC = b64encode(b"reader:secret").decode()

pytestmark = [
    pytest.mark.pacs,
    pytest.mark.skipif(ORTHANC is None or not PLUGIN.exists(), reason="apt-get install orthanc orthanc-dicomweb"),
]


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The root of an archive with four studies of three patients, five slices each, and a report."""
    folder = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "StorageDirectory": str(folder),
        "IndexDirectory": str(folder),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"reader": "secret"},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    assert ORTHANC is not None
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    root = f"http://127.0.0.1:{port}"
    session = requests.Session()
    session.trust_env = False
    session.headers["Authorization"] = f"Basic {BASIC}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                session.get(f"{root}/system", timeout=5).raise_for_status()
                break
            except requests.ConnectionError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        for one in datasets():
            session.post(f"{root}/instances", data=as_bytes(one), timeout=30).raise_for_status()
        yield f"{root}/dicom-web"
    finally:
        process.terminate()
        process.wait(30)


def datasets() -> list[Any]:
    slices = [instance(f"P{study % 3}", study, 1, number) for study in (1, 2, 3, 4) for number in range(1, 6)]
    return [*slices, instance("P1", 1, 2, 1, Modality="SR")]


def fetch(url: str, out: Path, token: str, *more: str) -> subprocess.CompletedProcess[str]:
    file = out.parent / "token"
    file.touch(mode=0o600)
    file.write_text(token)
    command = [sys.executable, "-P", "-m", "secure_fed.cli", "data", "fetch", "--dicomweb", url, "--out", str(out)]
    return subprocess.run(
        [*command, "--token-file", str(file), "--rate", "200", "--json", *more],
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


def test_a_folder_is_fetched_with_labels_and_read_as_a_sites_data(orthanc: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("accession,label\nA1,dark\nA2,light\nA3,dark\nA9,light\n")
    more = ("--query", "StudyDate=20240101-20240103", "--labels", str(labels))
    done = fetch(orthanc, tmp_path / "data", f"Basic {BASIC}", *more)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["images"], document["fetched"], document["series_left_out"]) == (15, 15, {"SR": 1})
    assert document["bytes_at_most"] == 15 * 8 * 8 * 2
    assert document["labels"]["rows_not_joined"] == ["line 5: accession A9: no such study was found"]
    sent = {one.SOPInstanceUID: as_bytes(one) for one in datasets()}
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "data/images").rglob("*.dcm")}
    assert len(kept) == 15
    assert all(content == sent[uid] for uid, content in kept.items())
    with (tmp_path / "data/manifest.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["patient"], row["accession"], row["label"]) for row in rows} == {
        *(("P1", "A1", "dark"), ("P2", "A2", "light"), ("P0", "A3", "dark"))
    }
    shares = Shares(train=0.5, val=0.25, test=0.25, unlabelled=0.0)
    images = read_data(tmp_path / "data", ["dark", "light"], "patient", shares, 0)
    assert {image.patient for image in images} == {"P0", "P1", "P2"}
    again = fetch(orthanc, tmp_path / "data", f"Basic {BASIC}", *more)
    assert json.loads(again.stdout)["fetched"] == 0


def test_all_of_the_archive_is_found_by_every_kind_of_query(orthanc: str) -> None:
    pacs = Pacs(orthanc, token=f"Basic {BASIC}", rate=500)
    for query in ({"Modality": "MR"}, {"StudyDate": "20240101-"}, {"PatientID": "P*", "SeriesDescription": "series?1"}):
        found = pacs.search([query])
        assert (len(found.images), found.ignored) == (20, {})


def test_the_archive_refuses_a_wrong_token_and_is_not_at_another_address(orthanc: str, tmp_path: Path) -> None:
    wrong = b64encode(b"reader:wrong").decode()
    for url, token, text in [
        (orthanc, f"Basic {wrong}", "401"),
        (orthanc.replace("dicom-web", "elsewhere"), f"Basic {BASIC}", "404"),
        (orthanc.removesuffix("/dicom-web"), f"Basic {BASIC}", "no list of results"),  # Orthanc's own interface
    ]:
        done = fetch(url, tmp_path / "data", token, "--query", "PatientID=P1")
        assert (done.returncode, done.stdout) == (88, ""), done.stderr
        assert text in done.stderr
        assert token.split()[1] not in done.stderr
        assert not (tmp_path / "data").exists()
