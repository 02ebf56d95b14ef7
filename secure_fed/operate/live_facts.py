"""What the live page of a server or a site shows, and what its buttons do: what the commands show and do.

Everything is read from files; no lock is taken and nothing is written, so that whoever looks neither slows nor stops a
study. Facts of a site are for its own eyes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secure_fed.core.errors import NotAcceptedError, RecordError, SecfacmicError, StorageError, StudyError
from secure_fed.core.layout import RECORDS, SiteRun, SiteState, StateFolder
from secure_fed.core.status import StatusFile, is_running
from secure_fed.operate.standing import place_of, refuse_no_state, standing
from secure_fed.protocol.journal import find_study

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

LINES = 12
"""Lines of a log, and rows of a list, that are shown."""
CHECKING_SECONDS = 600


class Place:
    """A state folder, and of a site its ``site.toml``.

    Args:
        path: the folder, or a site's folder or ``site.toml``.

    Raises:
        RecordError: there is no such folder, or it is neither a server's nor a site's.
        SiteFileError: there is a ``site.toml``, and it does not hold together.
    """

    def __init__(self, path: Path) -> None:
        self.state, self._study = place_of(path)
        self.site_file: Path | None = path if self._study is not None else None
        beside = path.parent / "site.toml"
        if self._study is None and beside.is_file() and place_of(beside)[0].resolve() == path.resolve():
            self.site_file, (_, self._study) = beside, place_of(beside)
        if self.site_file is None:
            refuse_no_state(self.state)
        self._kept: dict[str, tuple[object, Any]] = {}

    # --- facts ---

    def facts(self) -> dict[str, Any]:
        """Everything that the page shows, as a JSON document; a part that cannot be read says why in its place."""
        found = self._standing()
        role = found["role"]
        parts: dict[str, Callable[[], Any]] = {"log": lambda: self._log(role), "records": self._records}
        if self.site_file is not None:
            parts |= {"sent": self._sent, "budget": self._budget, "validation": self._validation, "terms": self._terms}
        for name, part in parts.items():
            try:
                found[name] = part()
            except (SecfacmicError, OSError) as error:
                found[name] = {"error": str(error)}
        return found

    def _standing(self) -> dict[str, Any]:
        try:
            found = standing(self.state, self._study)
        except RecordError as error:
            role = "server" if self.site_file is None else "site"
            running = is_running(self.state)
            return {"role": role, "running": running, "closed": False, "round": 0, "last_error": None,
                    "nothing_yet": str(error)}  # fmt: skip
        if self.site_file is not None:
            found.setdefault("site", self._once("name", self.site_file, lambda: self._file().site))
        return found

    def _once(self, name: str, path: Path, make: Callable[[], Any]) -> Any:
        """What is made of a file, made anew only when the file has changed."""
        try:
            facts = path.stat()
        except OSError:
            return make()
        mark = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if self._kept.get(name, (None, None))[0] != mark:
            self._kept[name] = mark, make()
        return self._kept[name][1]

    def _file(self) -> SiteFile:
        from secure_fed.clients.sitefile import read_site_file

        assert self.site_file is not None
        return read_site_file(self.site_file)

    def _log(self, role: str) -> list[dict[str, Any]]:
        path = StateFolder(self.state).log(role)
        if not path.exists():
            return []
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 20_000))
            lines = deque(stream, LINES)
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError):
                continue  # half a line: the first, or one that is being written
        return found

    def _records(self) -> dict[str, int]:
        """Of the current run: records, refused sums, and second records that the coordinator signed."""
        folder = StateFolder(self.state)
        if folder.current_run is None:
            return {"records": 0, "refused": 0, "evidence": 0}
        run = SiteRun(folder.runs / folder.current_run)  # a server has neither refusals nor second records
        return {
            "records": len(list(run.journal.glob(RECORDS))),
            "refused": len(list(run.refused.glob("*"))),
            "evidence": len(list(run.evidence.glob("*"))),
        }

    def _sent(self) -> dict[str, Any]:
        from secure_fed.clients.outgoing_log import SentList

        rows = self._once("sent", SiteState(self.state).sent, SentList(self.state).read)
        return {
            "messages": len(rows),
            "bytes": sum(row.bytes for row in rows),
            "rows": [row.model_dump(mode="json", include={"time", "round", "code", "bytes"}) for row in rows[-LINES:]],
        }

    def _budget(self) -> dict[str, Any]:
        from secure_fed.clients.budget import ledger_folder
        from secure_fed.operate.ledger_copies import ledger_facts

        file = self._file()
        return dict(self._once("budget", ledger_folder(file) / "ledger.jsonl", lambda: ledger_facts(file)))

    def _validation(self) -> list[list[float]]:
        """Round and share of correct validation images."""
        path = SiteState(self.state).summary
        if not path.exists():
            return []

        def shares() -> list[list[float]]:
            from secure_fed.operate.summary import SiteSummary, read_summary

            found = sorted(read_summary(path, SiteSummary).validations.items())
            return [[number, share] for number, share in found if share is not None]

        return list(self._once("validation", path, shares))

    def _terms(self) -> dict[str, Any]:
        from secure_fed.clients.acceptance import notes, terms, when
        from secure_fed.clients.sitefile import read_site

        assert self.site_file is not None
        file, agreed = read_site(self.site_file)
        shown = terms(file, agreed)
        own = next((site for site in agreed.study.sites if site.name == file.site), None)
        key = "" if own is None else own.keys.signing
        accepted = notes(file.state_folder.accepted, agreed.study.id, file.site, key) if key else []
        return {
            "study": shown["study"],
            "study_id": shown["study_id"],
            "role": shown["role"],
            "mode": shown["mode"],
            "rounds": shown["rounds"],
            "update_values": shown["leaves"]["update_values"],
            "update_bytes": shown["leaves"]["update_bytes"],
            "updates": shown["leaves"]["updates"],
            "never": shown["leaves"]["never"],
            "statistics": shown["leaves"]["statistics"],
            "validation_counts": shown["leaves"]["validation_counts"],
            "min_sites": shown["min_sites"],
            "members": shown["members"],
            "budget": shown["budget"],
            "accepted": [{"by": note.by, "at": when(note.accepted_ms), "runs": note.runs} for note, _ in accepted],
        }

    # --- buttons ---

    def act(self, name: str, given: Mapping[str, Any]) -> str:
        """Do what a button says.

        Args:
            name: ``accept``, ``stop`` (both of a site) or ``doctor``.
            given: of ``accept``: ``by``, who accepts, and ``study_id``, whose terms were read.

        Returns:
            What was done, in words.

        Raises:
            SecfacmicError: it was not done.
        """
        if name == "doctor":
            return self._doctor()
        if self.site_file is None:
            raise NotAcceptedError(f"{name}: only a site's page does that; a server is stopped where it was started")
        return self._accept(given) if name == "accept" else self._stop()

    def _accept(self, given: Mapping[str, Any]) -> str:
        from secure_fed.clients.acceptance import record_acceptance, require_acceptance, when
        from secure_fed.clients.keyring import membership
        from secure_fed.clients.sitefile import read_site

        assert self.site_file is not None
        file, agreed = read_site(self.site_file)
        if given.get("study_id") != agreed.study.id:
            raise NotAcceptedError(
                f"the study here is {agreed.study.id[:16]}, and not the one whose terms were shown; nothing was "
                "recorded: read the terms again"
            )
        identity = membership(file, agreed).identity
        file.refuse_study(agreed.study)
        by = given.get("by")
        record_acceptance(file, agreed, identity, by.strip() if isinstance(by, str) else "")
        header = require_acceptance(file, agreed, identity.keys.signing)
        return f"accepted by {header.by} at {when(header.accepted_ms)}; recorded and signed"

    def _stop(self) -> str:
        number = StatusFile(self.state).read().get("pid")
        if not is_running(self.state) or not isinstance(number, int):
            raise RecordError("no process runs here; there is nothing to stop")
        try:
            os.kill(number, signal.SIGTERM)  # which our processes take as Ctrl-C
        except OSError as error:
            raise StorageError(
                f"process {number}: cannot be stopped ({error.strerror}); stop it as the user who started it, or "
                "where its container runs"
            ) from error
        return "told to stop; it ends cleanly, and the same command goes on from there"

    def _doctor(self) -> str:
        place = ["--site", str(self.site_file)] if self.site_file is not None else ["--server", str(self.state)]
        if self.site_file is None:
            try:
                place += ["--study", str(self._study or find_study(self.state))]
            except (RecordError, StudyError) as error:
                return str(error)
        command = [sys.executable, "-P", "-m", "secure_fed.cli", "doctor", *place, "--json"]
        try:
            done = subprocess.run(
                ["nice", "-n", "19", *command], capture_output=True, timeout=CHECKING_SECONDS, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StorageError(f"doctor: gave no answer ({type(error).__name__}); run secfacmic doctor") from error
        try:
            found = json.loads(done.stdout)
        except ValueError:
            last = done.stderr.decode(errors="replace").strip().splitlines()
            return last[-1] if last else "doctor gave no answer; run secfacmic doctor in a terminal"
        failed = [f"{one['check']}: {one['found']}; {one['mend']}" for one in found["checks"] if not one["ok"]]
        return "\n".join([f"{len(found['checks'])} checks, {found['failed']} failed", *failed])
