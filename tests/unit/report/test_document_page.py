"""Pages that people sign or file: what a site agrees to, and what its evidence holds."""

from __future__ import annotations

import json
import re
import zipfile
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from secure_fed.clients.acceptance import record_acceptance, terms
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.errors import EvidenceError
from secure_fed.operate.evidence import in_words, pack_evidence, verify_evidence
from secure_fed.privacy.keys import load_identity
from secure_fed.report.document_page import consent_page, evidence_page, threats
from tests.conftest import Federation, Run, exchange, run_round

OUTSIDE = ("http:", "https:", "//", "src=", "<script", "<link", "<form", "@import", "url(")
"""None of it stands in a page that loads nothing."""


class Words(HTMLParser):
    """The text that a reader sees, and tags that were opened and not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.open = "", []
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden = tag in ("style", "head")
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text += f"{data} "


def read(page: str) -> str:
    """The page's words, once it is known to be whole and to load nothing."""
    body = page.partition("<body>")[2]
    assert not [word for word in OUTSIDE if word in body]
    assert "default-src 'none'" in unescape(page)
    words = Words(page)
    assert words.open == []
    return " ".join(words.text.split())


def test_the_page_to_be_signed_says_it_in_plain_words(federation: Federation) -> None:
    file = read_site_file(federation.folder / "sites/ash")
    agreed_to = terms(file, federation.agreed)
    text = read(consent_page(agreed_to))
    assert "keyed" not in text
    assert "digest of" not in text
    for said in (
        "A contribution in each of 3 rounds",
        "encrypted and signed: the server cannot read it",
        "how many of them the model got right. Only the sum over all hospitals is ever opened",
        "but inside encrypted sums over all hospitals, as said above",
        "None. The sums, which all hospitals of the study open, are not differentially private",
        *("dogwood observes", "makes the study's key", federation.agreed.study.id),
        *("Name Role Date Signature", "I have read this page, and accept it for ash"),
        *threats(agreed_to),
    ):
        assert said in text, said
    assert len(threats(agreed_to)) == 5
    private = file.model_copy(update={"privacy": SitePrivacy(epsilon=2.0)})
    assert "(2, 1e-05)-differentially private for each image" in read(consent_page(terms(private, federation.agreed)))
    observer = read(consent_page(terms(read_site_file(federation.folder / "sites/dogwood"), federation.agreed)))
    assert "dogwood only observes" in observer
    assert "A contribution" not in observer


@pytest.mark.parametrize(
    ("mode", "pads", "says", "never"),
    [
        ("he", 0, "can open another hospital's single contributions", "cannot open another hospital's"),
        ("he", 1, "A hospital that works together with the server cannot open another", "trust one another"),
        ("he", 2, "Up to 2 hospitals that work together with the server cannot open another", "trust one another"),
        ("plain", 0, "Nothing is encrypted: it reads every contribution", "It adds encrypted numbers"),
    ],
)
def test_the_page_says_what_this_studys_protection_is(
    federation: Federation, mode: str, pads: int, says: str, never: str
) -> None:
    shown = terms(read_site_file(federation.folder / "sites/ash"), federation.agreed)
    shown |= {"mode": mode, "quorum": shown["quorum"] | {"needed": 5, "collusion": pads}}
    text = read(consent_page(shown))
    assert says in text
    assert never not in text
    assert (f"one sum over at least {5 - pads} others" in text) == (pads > 0)
    assert "dogwood observes none" in text


def test_names_are_text_and_never_markup(federation: Federation) -> None:
    shown = terms(read_site_file(federation.folder / "sites/ash"), federation.agreed)
    shown["study"] = "<script>alert(1)</script>"
    page = consent_page(shown)
    assert "<script" not in page
    assert "<script>alert(1)</script>" in read(page)


def test_the_command_writes_the_page_and_records_nothing(
    federation: Federation, tmp_path: Path, secfacmic: Run
) -> None:
    site, page = federation.folder / "sites/ash", tmp_path / "consent.html"
    notes = sorted(site.glob("state/accepted/*"))
    done = secfacmic("site", "accept", federation.folder / "study.toml", "--site", site, "--html", page)
    assert done.returncode == 0, done.stderr
    assert "nothing is recorded yet" in done.stdout
    assert "Signature" in read(page.read_text())
    assert sorted(site.glob("state/accepted/*")) == notes
    secfacmic("site", "accept", federation.folder / "study.toml", "--site", site, "--html", page, "--by", "Dr. A")
    assert len(sorted(site.glob("state/accepted/*"))) == len(notes) + 1


def test_what_is_accepted_does_not_contradict_itself(federation: Federation, secfacmic: Run) -> None:
    shown = secfacmic("site", "accept", federation.folder / "study.toml", "--site", federation.folder / "sites/ash",
                      "--by", "A").stdout  # fmt: skip
    never = re.search(r"^never: (.*)$", shown, re.M)
    alone = re.search(r"^nowhere but inside the encrypted numbers.*: (.*)$", shown, re.M)
    assert never is not None
    assert alone is not None
    assert "how many validation images" in shown
    assert "numbers of images" in alone[1]
    assert "numbers of images" not in never[1]
    observer = secfacmic("site", "accept", federation.folder / "study.toml", "--site",
                         federation.folder / "sites/dogwood", "--by", "A").stdout  # fmt: skip
    assert "numbers of images" in observer.partition("never: ")[2]
    assert "nowhere but" not in observer


@pytest.fixture
def played(federation: Federation) -> Federation:
    """Two rounds, two acceptances of ash, and a drill."""
    site = federation.folder / "sites/ash"
    identity = load_identity(site / "identity", "ash")
    record_acceptance(read_site_file(site), federation.agreed, identity, "Dr. Beech")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(2):
        run_round(coordinator, sites)
    for each in sites:
        exchange(coordinator, each)
    return federation


DRILL = {
    "version": "0.1.0",
    "attacks": [{"id": "B1", "attacker": "server", "tried": "a lie", "seen": "-", "held": True}],
}


def test_the_archive_has_a_page_for_people(played: Federation, tmp_path: Path, secfacmic: Run) -> None:
    site, archive = played.folder / "sites/ash", tmp_path / "evidence.zip"
    (site / "state" / "drill.json").write_text(json.dumps(DRILL))
    assert secfacmic("evidence", site, "--out", archive).returncode == 0
    with zipfile.ZipFile(archive) as content:
        text = read(content.read("index.html").decode())
    found = verify_evidence(archive)
    assert found["acceptances"] == len(found["all_acceptances"]) == 2
    for said in (
        "simulation",
        "Dr. Beech",
        "birch train 2",
        "dogwood observer 0",
        "B1 server a lie yes",
        "A site that pools the study's key with the server can open single updates (collusion = 0).",
        played.agreed.study.id,
    ):
        assert said in text, said
    told = secfacmic("evidence", "verify", archive)
    assert told.returncode == 0
    assert "{" not in told.stdout
    for line in (
        "accepted by Dr. Beech at",
        "member birch, train: in 2 sums",
        "drill: 1 of 1 attacks held off",
        "1 run with 3 records and 2 rounds; 2 updates of this site in sums",
        "no list of sent messages: the updates in sums went over no network, as in a simulation",
    ):
        assert line in told.stdout
    assert "No list of sent messages: the updates in sums went over no network, as in a simulation" in text
    assert "1 run, 2 rounds, " in text


def test_the_page_is_under_the_sites_signature(played: Federation, tmp_path: Path) -> None:
    archive = tmp_path / "evidence.zip"
    pack_evidence(played.folder / "sites/ash", archive, evidence_page)
    with zipfile.ZipFile(archive) as content:
        parts = {name: content.read(name) for name in content.namelist()}
    assert "None is recorded: secfacmic drill --site" in read(parts["index.html"].decode())
    assert in_words(verify_evidence(archive))[-1].startswith("no drill is recorded")
    parts["index.html"] = parts["index.html"].replace(b"not differentially", b"so differentially") + b" "
    with zipfile.ZipFile(archive, "w") as content:
        for name, data in parts.items():
            content.writestr(name, data)
    with pytest.raises(EvidenceError, match=r"index\.html is not the file that the manifest names"):
        verify_evidence(archive)


def test_a_page_that_says_something_else_than_the_files_is_found_though_the_site_signed_it(
    played: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kinder(found: Any) -> str:
        return evidence_page({**found, "messages_sent": 1})

    site, archive = played.folder / "sites/ash", tmp_path / "evidence.zip"
    pack_evidence(site, archive, evidence_page)
    found = verify_evidence(archive, evidence_page)
    assert "index.html says what the files say" in in_words(found)
    pack_evidence(site, archive, kinder)
    verify_evidence(archive)
    with pytest.raises(EvidenceError, match="is not the page that the other files make"):
        verify_evidence(archive, evidence_page)
    ours = {"secfacmic": "99.0", "python": "3", "platform": "x"}
    monkeypatch.setattr("secure_fed.operate.evidence._versions", lambda: ours)
    assert "it was not compared with the files" in str(verify_evidence(archive, evidence_page)["page"])
    pack_evidence(site, archive)
    assert verify_evidence(archive, evidence_page)["page"] == "no index.html in it"


def test_a_drill_that_is_none_is_refused(played: Federation, tmp_path: Path) -> None:
    (played.folder / "sites/ash/state/drill.json").write_text('{"attacks": [{"id": "B1"}], "version": "1"}')
    with pytest.raises(EvidenceError, match=r"attacks\.json: malformed"):
        pack_evidence(played.folder / "sites/ash", tmp_path / "evidence.zip", evidence_page)
    assert not (tmp_path / "evidence.zip").exists()
