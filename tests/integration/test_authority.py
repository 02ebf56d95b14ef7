"""Another authority for the server is an amendment: the key maker names it, each site's people agree, all then trust it
alone, and nobody is cut off on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from secure_fed.clients.flower_node import Way, _Connection, run_site
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteServer
from secure_fed.core.errors import CertificateError, KeyFileError, RecordError, SiteFileError
from secure_fed.core.layout import ServerState
from secure_fed.operate.doctor.network import examine_way
from secure_fed.operate.study_keys import accept_key, rotate_key
from secure_fed.protocol.records import RecordHeader, sign_record
from secure_fed.protocol.sealed_key import KEY_MAGIC, MAX_KEY_HEADER, SealedKeyHeader
from secure_fed.protocol.signing import parse_header, payload_fields, sign_frame, split_frame
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.orders import refuse_other_authority
from secure_fed.server.supervisor import ServerFolders, _hold, serve
from secure_fed.transport.certificates import CA, create_authority, root_fingerprint
from tests.conftest import Federation, Run, exchange, pass_step


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of two authorities and their servers, ``old`` and ``new``, and a file of both: ``both.crt``."""
    folder = tmp_path_factory.mktemp("authorities")
    for name in ("old", "new"):
        create_authority(folder / name, ["127.0.0.1"])
    (folder / "both.crt").write_bytes((folder / "old" / CA).read_bytes() + (folder / "new" / CA).read_bytes())
    return folder


@pytest.fixture
def sites(federation: Federation) -> list[Site]:
    return federation.sites()


@pytest.fixture
def coordinator(federation: Federation, sites: list[Site]) -> Coordinator:
    """Of a run whose genesis all sites have."""
    begun = federation.begin(sites)
    for site in sites:
        exchange(begun, site)
    return begun


def amended(federation: Federation, coordinator: Coordinator, tls: Path, tmp_path: Path, name: str = "new") -> Path:
    """The amendment's sealed key file, made at the key maker and left for the coordinator."""
    maker = federation.folder / "sites" / federation.agreed.study.key_maker / "site.toml"
    rotate_key(maker, federation.folder / "study.toml", tmp_path / f"{name}.key", authority=tls / name / CA)
    coordinator.amend((tmp_path / f"{name}.key").read_bytes())
    return tmp_path / f"{name}.key"


def trusts(site: Site, file: Path) -> Site:
    """The site, with a file of authorities."""
    server = SiteServer(address="127.0.0.1:8443", authority=str(file))
    site.replica._file = site.replica._file.model_copy(update={"server": server})
    return site


def test_a_site_takes_no_authority_that_its_people_have_not_agreed_to_or_whose_certificate_it_lacks(
    federation: Federation, coordinator: Coordinator, sites: list[Site], tls: Path, tmp_path: Path
) -> None:
    """Before anything of it is in force here: the same amendment comes again, and the site still reaches its server."""
    wanted = root_fingerprint(tls / "new" / CA)
    sealed = amended(federation, coordinator, tls, tmp_path)
    entry = pass_step(coordinator, sites)
    assert entry.header.kind == "amendment"
    assert coordinator.journal.chain.authority == wanted
    birch = trusts(next(site for site in sites if site.name == "birch"), tls / "old" / CA)
    before = birch.position
    with pytest.raises(SiteFileError, match=rf"trusted by authority {wanted} alone.*keys accept") as asked:
        exchange(coordinator, birch)
    assert asked.value.exit_code == 11
    accept_key(federation.folder / "sites" / "birch" / "site.toml", sealed)
    with pytest.raises(CertificateError, match=rf"{root_fingerprint(tls / 'old' / CA)}; expected that of {wanted}"):
        exchange(coordinator, birch)
    assert (birch.position, birch.authority) == (before, None)
    exchange(coordinator, trusts(birch, tls / "both.crt"))
    assert birch.authority == wanted
    assert federation.site("birch").authority == wanted  # as a new process finds it
    found = next(examine_way(birch.replica._file, federation.agreed))
    assert (found.ok, found.found.endswith("take the one before out of the file")) == (True, True)
    found = next(examine_way(trusts(birch, tls / "old" / CA).replica._file, federation.agreed))
    assert (found.ok, f"expected that of {wanted}" in found.found) == (False, True)


def test_nobody_but_the_key_maker_names_an_authority_and_no_amendment_comes_twice(
    federation: Federation, coordinator: Coordinator, sites: list[Site], tls: Path, tmp_path: Path
) -> None:
    for path in federation.folder.glob("sites/*/site.toml"):
        path.write_text(path.read_text().replace('amendments = "removals"', 'amendments = "all"'))
    sites = federation.sites()
    data = amended(federation, coordinator, tls, tmp_path).read_bytes()
    honest = parse_header(
        split_frame(KEY_MAGIC, data, MAX_KEY_HEADER, KeyFileError).header, SealedKeyHeader, KeyFileError
    )
    payload = bytes(split_frame(KEY_MAGIC, data, MAX_KEY_HEADER, KeyFileError).payload)
    bent = honest.model_copy(update={"authority": "1" * 64})
    chain, site = coordinator.journal.chain, sites[1]
    kept = data.replace(bytes.fromhex(honest.authority or ""), bytes.fromhex("1" * 64))  # under the maker's signature
    assert kept != data
    for forged in (kept, sign_frame(KEY_MAGIC, bent, federation.signing, payload)):
        header = RecordHeader(
            version=2,
            kind="amendment",
            study=federation.agreed.study.id,
            seq=chain.length,
            previous=chain.head,
            run=chain.run,
            key=honest.key,
            round=chain.round + 1,
            contributors=(),
            reveals=(),
            opened_ms=0,
            closed_ms=0,
            **payload_fields(forged),
        )
        with pytest.raises(RecordError, match="not by the key that the study names"):
            site.replica.take(sign_record(header, forged, federation.signing))
    assert site.authority is None
    for kind in ("amendment", "checkpoint"):
        assert pass_step(coordinator, sites).header.kind == kind
    amended(federation, coordinator, tls, tmp_path, "old")  # and back
    for kind in ("amendment", "checkpoint"):
        assert pass_step(coordinator, sites).header.kind == kind
    with pytest.raises(KeyFileError, match="follows key"):
        coordinator.amend(data)
    exchange(coordinator, site)
    assert site.authority == root_fingerprint(tls / "old" / CA)


def test_a_server_serves_under_the_authority_that_its_sites_trust(
    federation: Federation, coordinator: Coordinator, sites: list[Site], tls: Path, tmp_path: Path
) -> None:
    """That with which the run began, or one that an amendment names, as soon as it waits: if the one before has ended,
    no site could be told of it."""
    run = ServerState(federation.folder / "server").run(coordinator.run).path
    old, new = (root_fingerprint(tls / name / CA) for name in ("old", "new"))

    def start(name: str) -> None:
        refuse_other_authority(run, coordinator.journal.chain, tls / name)

    start("old")
    start("old")
    with pytest.raises(CertificateError, match=rf"authority {new}; expected {old}, which the run began with"):
        start("new")
    amended(federation, coordinator, tls, tmp_path)
    start("new")
    start("old")
    assert pass_step(coordinator, sites).header.kind == "amendment"
    start("new")
    with pytest.raises(CertificateError, match=rf"authority {old}; expected {new}, which an amendment in force names"):
        start("old")


def test_the_commands_name_the_authority_and_who_must_agree(
    federation: Federation, coordinator: Coordinator, tls: Path, tmp_path: Path, secfacmic: Run
) -> None:
    wanted, study = root_fingerprint(tls / "new" / CA), federation.folder / "study.toml"
    site = federation.folder / "sites" / "ash" / "site.toml"
    words = ("keys", "rotate", study, "--site", site, "--out", tmp_path / "key", "--authority", tls / "new" / CA)
    assert wanted in secfacmic(*words).stdout
    said = secfacmic("study", "amend", study, tmp_path / "key", "--state", federation.folder / "server").stdout
    assert f"the authority {wanted} becomes the server's: ash, birch" not in said  # its maker need not be asked
    assert f"the authority {wanted} becomes the server's: birch" in said
    assert 'amendments = "all") or by hand' in said
    assert f"server.key into {federation.folder / 'server' / 'tls'}, and start the server again" in said


def test_a_server_that_is_started_under_another_authority_does_not_listen(
    federation: Federation, coordinator: Coordinator, tls: Path
) -> None:
    folders = ServerFolders(federation.folder / "study.toml", federation.folder / "server")
    certificates = ServerState(folders.state).certificates
    shutil.copytree(tls / "old", certificates)
    _hold(folders, federation.agreed, lobby=False)
    shutil.copytree(tls / "new", certificates, dirs_exist_ok=True)
    with pytest.raises(CertificateError, match="which the run began with"):
        serve(folders, "he", ("127.0.0.1", 0))


class App:
    """What of a site's app the node looks at."""

    failure = None
    finished = False
    authority: str | None = None

    def __init__(self, site: Site, wanted: str) -> None:
        self.site = site
        self.wanted = wanted
        self.answered = 0

    def answer(self, *arguments: object) -> str:
        """The amendment is among what comes with the first message."""
        assert not self.answered
        self.answered += 1
        self.authority = self.wanted
        return "acknowledged"

    def after_reply(self, *, taken: bool) -> None:
        """Nothing of it matters here."""


def test_a_running_site_leaves_a_server_whose_authority_it_trusts_no_more(
    sites: list[Site], tls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answer to the message that brought the amendment, and before it asks for another."""
    app, steps = App(sites[0], root_fingerprint(tls / "new" / CA)), list[object]()
    message = SimpleNamespace(metadata=SimpleNamespace(run_id=1, group_id="1"))

    def left(connection: _Connection) -> None:
        connection._left.set()
        steps.append("left")

    def joined(connection: _Connection) -> None:
        steps.append(connection.authority)
        app.finished = connection.authority == app.wanted

    monkeypatch.setattr(_Connection, "join", joined)
    monkeypatch.setattr(_Connection, "leave", left)
    monkeypatch.setattr(_Connection, "pull", lambda self: (message, b""))
    monkeypatch.setattr(_Connection, "push", lambda self, answer: steps.append(answer))
    monkeypatch.setattr(_Connection, "stay", lambda *arguments: None)
    run_site(app, Way("127.0.0.1:9", tls / "both.crt", 4))  # type: ignore[arg-type]
    assert steps == [None, "acknowledged", "left", app.wanted, "left"]
