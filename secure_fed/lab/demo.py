"""A whole federation on one machine as real processes: a server and its sites, over TLS on loopback."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secure_fed.clients.sitefile import SiteServer
from secure_fed.core.errors import DemoError, SecfacmicError, StudyError
from secure_fed.core.layout import ENVELOPES, SUMMARY, ServerState, SiteState
from secure_fed.core.processes import start, stop
from secure_fed.core.storage import make_folder
from secure_fed.lab.simulation import (
    Budget,
    Listener,
    RoundFacts,
    finish,
    one_sum_result,
    open_run,
    open_sites,
    plan_of,
    prepare,
    round_facts,
    run_rounds,
    starting,
    tell_overlaps,
)
from secure_fed.model.device import DeviceChoice
from secure_fed.operate.new_study import SERVER
from secure_fed.operate.summary import Result, SiteSummary, read_summary, write_summary
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.study import AgreedStudy, Template, with_fields
from secure_fed.protocol.study_tables import Method
from secure_fed.transport.certificates import CA, create_authority

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
PORT = 8443
"""Where a prepared federation's server listens unless told otherwise, as ``secfacmic server`` does."""

LOGS = "logs"
ONE_SUM = "one_sum"
"""Folder, in a demo's, of the study that adds a row to its table."""

MOST_PATIENTS = 1000
"""That a site of a demo has, public, for the lanes of one sum."""

LOOK_SECONDS = 0.1


def with_sites(template: Template, count: int) -> Template:
    """The template with its first training sites only, and all its observers.

    Raises:
        StudyError: it has fewer, or the study does not hold with so few.
    """
    training = [site.name for site in template.sites if site.role == "train"]
    if not template.min_sites <= count <= len(training):
        raise StudyError(
            f"--sites {count}: expected {template.min_sites} (min_sites of study {template.name}) to {len(training)} "
            "(all its training sites)"
        )
    gone = set(training[count:])
    content = template.model_dump(mode="json", exclude_none=True)
    plan = content.get("simulation", {})
    folders = {site["folder"] for site in plan.get("sites", ()) if site["name"] in gone}
    changes: dict[str, Any] = {"sites": [site for site in content["sites"] if site["name"] not in gone]}
    if plan:
        plan["sites"] = [site for site in plan["sites"] if site["name"] not in gone]
        plan["phantoms"] = [group for group in plan.get("phantoms", ()) if group["name"] not in folders]
        changes["simulation"] = plan
    if template.key_maker in gone:
        changes["key_maker"] = training[0]
    return with_fields(template, **changes)


def prepare_federation(
    template: Template, out: Path, data: Path | None, port: int = PORT, budget: Budget | None = None
) -> AgreedStudy:
    """Write study, authority, keys and site folders, compare the sites' images, and begin a run, but start nothing.

    Args:
        template: with a ``[simulation]`` table.
        out: the folder.
        data: folder of the sites' data; without it the template's phantoms are made in ``out/data``.
        port: where the sites will find the server, on loopback.
        budget: privacy budget of each site.

    Raises:
        SecfacmicError: as :func:`secure_fed.lab.simulation.prepare` and ``tell_overlaps``; the folder is as it was.
    """
    plan_of(template, out, data)
    with starting(out):
        return _federation(template, out, data, port, budget, Listener())


def _federation(
    template: Template, out: Path, data: Path | None, port: int, budget: Budget | None, listener: Listener
) -> AgreedStudy:
    certificates = ServerState(out / SERVER).certificates
    server = SiteServer(address=f"{HOST}:{port}", authority=f"../../{SERVER}/{certificates.name}/{CA}")
    agreed = prepare(template, out, data, server, budget)
    tell_overlaps(agreed, template.plan, out, data, listener)
    if not certificates.exists():
        create_authority(certificates, [HOST, "localhost"])
    # Sites open keys and journals, which must be closed again before their own processes do.
    open_run(agreed, out, open_sites(agreed, out))
    return agreed


def run_demo(
    template: Template,
    out: Path,
    data: Path | None,
    listener: Listener,
    budget: Budget | None = None,
    device: DeviceChoice | None = None,
) -> dict[str, Any]:
    """Run a study as processes of this machine; write results as :func:`secure_fed.lab.simulation.simulate` does.

    Args:
        template: with a ``[simulation]`` table; its data are public or simulated, so that this process may evaluate
            on all of them at the end.
        out: gets what ``simulate`` writes, and ``logs/``.
        data: folder of the sites' data; without it the template's phantoms.
        listener: is told what happens.
        budget: privacy budget of each site.
        device: where the sites compute, if not as each ``site.toml`` says.

    Returns:
        The content of ``summary.json``.

    Raises:
        DemoError: a process ended before the study did.
        SecfacmicError: others, as ``simulate``.
    """
    plan_of(template, out, data)
    with starting(out) as beginning:
        listener.stage("preparing the study, its keys and its authority")
        port = _free_port()
        agreed = _federation(template, out, data, port, budget, listener)
        beginning.done = True
        make_folder(out / LOGS)
        processes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            listener.stage("starting the server and the sites, which encode their images")
            processes["server"] = _start(
                out, "server", "--study", str(out / "study.toml"), "--mode", agreed.study.mode,
                "--state", str(out / SERVER), "--listen", f"{HOST}:{port}",
            )  # fmt: skip
            for site in agreed.study.sites:
                folder = out / "sites" / site.name
                asked = () if device is None else ("--device", device)
                command = ("client", "--site", str(folder / "site.toml"), *asked)
                processes[site.name] = _start(out, *command, name=site.name)
            journal = _Journal(agreed, out)
            while any(process.poll() is None for process in processes.values()):
                _refuse_failures(processes, out)
                for facts in journal.finished_rounds():
                    listener.round(facts)
                listener.stage(journal.status())
                time.sleep(LOOK_SECONDS)
            _refuse_failures(processes, out)
            for facts in journal.finished_rounds(last=True):
                listener.round(facts)
        finally:
            stop(list(processes.values()))
        sites = open_sites(agreed, out, device=device)
        summary = finish(agreed, out, sites, journal.entries, beginning.begun, listener)
        listener.stage("for comparison, in this process: one secure sum over the same sites")
        found = None if budget is not None else _one_sum(template, out, data or out / "data", device)
        if found is not None:
            metrics = summary.metrics.model_copy(update={"one_sum": found})
            elapsed = time.monotonic() - beginning.begun
            summary = summary.model_copy(update={"metrics": metrics, "seconds_total": elapsed})
            write_summary(out / SUMMARY, summary)
        return summary.content()


def as_one_sum(template: Template) -> Template | None:
    """The same sites and images with a head of class statistics from one sum; None for a study that only sums."""
    if template.method.sums:
        return None
    return with_fields(
        template,
        name=f"{template.name}-one-sum",
        rounds=2,  # one for the sum, one for the histograms that choose its shrinkage
        method=Method(adapter="gaussian_head", most_patients=MOST_PATIENTS).model_dump(exclude_none=True),
        aggregation={},
        features={},
        encoding={"value_bound": 1.0},
        privacy=template.privacy.model_dump(mode="json") | {"validation_rounds": 0},
        sites=[{"name": site.name, "role": site.role} for site in template.sites],  # each patient weighs one
    )


def _one_sum(template: Template, out: Path, data: Path, device: DeviceChoice | None) -> Result | None:
    """What one sum over what the demo's sites have encoded reaches; None, with a warning, where it cannot be taken."""
    try:
        other = as_one_sum(template)
        return None if other is None else _summed_once(other, out, data, device)
    except SecfacmicError as error:
        log.warning("there is no row of one sum: %s", error)
        return None


def _summed_once(template: Template, out: Path, data: Path, device: DeviceChoice | None) -> Result:
    folder = out / ONE_SUM
    agreed = prepare(template, folder, data)
    for site in agreed.study.sites:
        encoded, state = (SiteState(place / "sites" / site.name / "state") for place in (out, folder))
        make_folder(state.features.parent)
        shutil.copyfile(encoded.features, state.features)
    sites = open_sites(agreed, folder, device=device)
    run_rounds(agreed, open_run(agreed, folder, sites), sites, Listener())
    return one_sum_result(agreed, sites)


class _Journal:
    """The server's journal as it grows, read beside it."""

    def __init__(self, agreed: AgreedStudy, out: Path) -> None:
        state = ServerState(out / SERVER)
        run = state.current_run
        assert run is not None  # it was begun
        self.entries: list[JournalEntry] = []
        self._agreed = agreed
        self._out = out
        self._chain = Chain(agreed)
        self._run = state.run(run)
        self._folder = RecordFolder(self._run.journal)
        self._told = 0
        self._validations: dict[int, float | None] = {}

    def finished_rounds(self, last: bool = False) -> Iterator[RoundFacts]:
        """Rounds that were not reported before, with the validation that the sites found in their records.

        Args:
            last: do not wait for that.
        """
        while self._folder.file(self._chain.length).exists():
            record = self._chain.check(self._folder.read(self._chain.length))
            self._chain.advance(record)
            if record.header.kind == "aggregate":
                self.entries.append(JournalEntry(record))
        if self._told < len(self.entries):
            self._read_validations()
        while self._told < len(self.entries):
            entry = self.entries[self._told]
            number = entry.header.round
            if number not in self._validations and self._told + 1 == len(self.entries) and not last:
                return
            yield round_facts(self._agreed, entry, self._validations.get(number))
            self._told += 1

    def status(self) -> str:
        """What is going on, in one line."""
        if self._chain.finished:
            return "the study is over; the sites take its last round"
        number = self._chain.round + 1
        inside = len({path.stem for path in self._run.spooled_round(number).glob(f"*/{ENVELOPES}")})
        training = sum(site.role == "train" for site in self._agreed.study.sites)
        return f"round {number} of {self._agreed.study.rounds}: {inside} of {training} sites in"

    def _read_validations(self) -> None:
        for site in self._agreed.study.sites:
            path = SiteState(self._out / "sites" / site.name / "state").summary
            if path.exists() and (summary := read_summary(path, SiteSummary)).run == self._chain.run:
                self._validations |= summary.validations


def _start(out: Path, command: str, *arguments: str, name: str | None = None) -> subprocess.Popen[bytes]:
    return start(["-m", "secure_fed.cli", command, *arguments], log=out / LOGS / f"{name or command}.log")


def _refuse_failures(processes: dict[str, subprocess.Popen[bytes]], out: Path) -> None:
    for name, process in processes.items():
        if process.poll():
            log = out / LOGS / f"{name}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"]
            last = lines[-1].removeprefix("secfacmic: ")  # one message, not one in another
            raise DemoError(
                f"{name} ended with {process.returncode} before the study was over: {last}; "
                f"its log is {log}; the same command goes on from here"
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
