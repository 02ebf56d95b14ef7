"""The page on joining, played word for word, over messages; and that a hospital that waits is quiet."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from pathlib import Path

from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.core.errors import SiteFileError
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.server.round_loop import RoundLoop
from tests.conftest import OBSERVER, TRAINING, Federation, Result, Run
from tests.integration.test_flower_rounds import Wire, _identity, _loop, _steps

__all__ = ["_identity"]  # a fixture

PAGE = Path(__file__).parents[2] / "docs" / "joining.md"


def _blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```sh host=(\w+)\n((?:.*\n)*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


class Hospitals:
    """Who types the page's commands where."""

    def __init__(self, federation: Federation, secfacmic: Run) -> None:
        self.federation = federation
        self._run = secfacmic
        self._blocks = iter(_blocks())

    def folder(self, name: str) -> Path:
        return self.federation.folder if name == "coordinator" else self.federation.folder / "sites" / name

    def play(self, host: str, *names: str) -> list[Result]:
        """The page's next block, which is for this host, at each of these."""
        whose, block = next(self._blocks)
        assert whose == host
        done = []
        for name in names:
            for line in block.replace("$SERVER", "192.0.2.1").splitlines():
                done.append(self._run(*shlex.split(line)[1:], cwd=self.folder(name)))
                assert done[-1].returncode == 0, (name, line, done[-1].stderr)
        return done

    def send(self, file: Path, *names: str) -> None:
        for name in names:
            if self.folder(name) != file.parent:
                shutil.copy(file, self.folder(name))

    def study(self, name: str) -> None:
        (self.folder(name) / "study").mkdir(exist_ok=True)
        for file in ("study.toml", "study.safetensors"):
            shutil.copy(self.federation.folder / file, self.folder(name) / "study")


def _in_its_second_round(federation: Federation, secfacmic: Run) -> tuple[Hospitals, RoundLoop]:
    """The hospitals of a study of which one round is closed, and elm, which has typed the page's first block."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    loop = _loop(federation, coordinator, Wire(federation, sites))
    _steps(loop, lambda: len(coordinator.rounds) == 1 and all(site.round == 1 for site in sites))
    hospitals = Hospitals(federation, secfacmic)
    hospitals.folder("elm").mkdir()
    hospitals.play("elm", "elm")
    return hospitals, loop


def test_a_hospital_joins_by_the_page(federation: Federation, secfacmic: Run) -> None:
    hospitals, loop = _in_its_second_round(federation, secfacmic)
    _like(federation, "elm", "cedar")
    hospitals.send(hospitals.folder("elm") / "identity" / "elm.pub", "ash")
    hospitals.study("ash")
    hospitals.play("maker", "ash")
    key = hospitals.folder("ash") / "epoch-2.key"
    members = [name for name in (*TRAINING, OBSERVER) if name != "ash"]
    hospitals.send(key, *members, "elm", "coordinator")
    hospitals.play("member", *members)
    hospitals.study("elm")
    _, accepted = hospitals.play("elm", "elm")
    assert f"the members are {', '.join(sorted((*TRAINING, OBSERVER, 'elm')))}" in accepted.stdout
    assert "2 of 3 rounds were left: a site that joins with it sends at most so many updates" in accepted.stdout
    again = secfacmic("site", "accept", "study/study.toml", "--site", "site.toml", "--html", "consent.html",
                      "--json", cwd=hospitals.folder("elm"))  # fmt: skip
    assert json.loads(again.stdout)["rounds_left"] == 2
    page = (hospitals.folder("elm") / "consent.html").read_text()
    assert "2 of 3 rounds were left" in page
    assert f"the members are {', '.join(sorted((*TRAINING, OBSERVER, 'elm')))}" in page
    (amended,) = hospitals.play("coordinator", "coordinator")
    assert f"elm join: {', '.join(sorted(members))} must have said yes" in amended.stdout.replace("\n", " ")
    assert "for who joins at most 2 of 3 rounds are left" in amended.stdout.replace("\n", " ")

    assert not loop.run()  # the members have changed, and are registered anew
    everyone = federation.sites()
    elm = federation.site("elm")
    wire = Wire(federation, [*everyone, elm])
    replies = _listen(elm)
    again = federation.reopen()
    began = time.monotonic()
    assert _loop(federation, again, wire).run()
    assert time.monotonic() - began < federation.agreed.study.round_seconds  # nobody waited for it to acknowledge
    assert [reply.code for reply in replies].count(ReplyCode.APPLIED) <= 3  # at the amendment, the checkpoint, the end
    # A round that had begun when the key was left is closed by those who were there.
    assert [entry.sites for entry in again.rounds][-1] == tuple(sorted((*TRAINING, "elm")))
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


def test_a_member_whose_people_were_not_asked_sends_nothing(federation: Federation, secfacmic: Run) -> None:
    hospitals, loop = _in_its_second_round(federation, secfacmic)
    hospitals.send(hospitals.folder("elm") / "identity" / "elm.pub", "ash")
    hospitals.study("ash")
    hospitals.play("maker", "ash")
    shutil.copy(hospitals.folder("ash") / "epoch-2.key", federation.folder)
    secfacmic("study", "amend", "study.toml", "epoch-2.key", "--state", "server", cwd=federation.folder)
    assert not loop.run()
    birch = federation.site("birch")
    app = Wire(federation, [birch])
    again = _loop(federation, federation.reopen(), app)
    (member,) = app.apps.values()
    _steps(again, lambda: member.failure is not None)
    failed = member.failure
    assert isinstance(failed, SiteFileError)
    assert failed.exit_code == 11
    assert "keys accept" in str(failed)


def _like(federation: Federation, name: str, other: str) -> None:
    """The new hospital's images are like another's, and its study's file is where the others' is."""
    folder = federation.folder / "sites"
    file = read_toml(folder / name / "site.toml", SiteFile, SiteFileError)
    model = read_site_file(folder / other / "site.toml")
    kept = {"site": file.site, "identity": file.identity, "state": file.state, "study": "../../study.toml"}
    write_toml(folder / name / "site.toml", model.model_copy(update=kept))


def _listen(site: Site) -> list[RoundReply]:
    replies: list[RoundReply] = []
    respond = site.respond

    def heard(request: object) -> RoundReply:
        replies.append(respond(request))  # type: ignore[arg-type]
        return replies[-1]

    site.respond = heard  # type: ignore[method-assign]
    return replies
