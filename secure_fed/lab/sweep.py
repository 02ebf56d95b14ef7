"""Many simulations of one study with other settings each, and what to choose by them.

Every trial is what :func:`secure_fed.lab.simulation.simulate` does, in a process of its own or as a Ray task. Images
and features are made once and lent to all. What lies in a sweep's folder is described in ``docs/sweep.md``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from secure_fed import configs
from secure_fed.core.errors import DataLeakError, OutputError, StorageError
from secure_fed.core.layout import SWEEP, SiteState
from secure_fed.core.storage import exclusive, make_folder, sync_folder, write_durable
from secure_fed.lab.sweep_file import (
    DELTA,
    Settings,
    SweepFile,
    Trial,
    digest,
    plan_trials,
    read_sweep_file,
)
from secure_fed.lab.workers import Outcome, Outcomes, run_locally, run_on_ray
from secure_fed.operate.summary import StudySummary, parse_summary
from secure_fed.protocol.simulation_table import PhantomGroup
from secure_fed.protocol.study import Template

log = logging.getLogger(__name__)

CAVEAT = (
    "A curve from a sweep is for choosing on public or simulated data: on patients' data every trial would be a "
    "release and spend budget."
)
RUNNING = "running"
LOG = "workers.log"
TRIALS = "trials.jsonl"

_LIBRARIES = (
    "numpy",
    "open_clip_torch",
    "opacus",
    "pillow",
    "scikit-learn",
    "scipy",
    "tenseal",
    "torch",
    "torchvision",
)


@dataclass(frozen=True)
class Finished:
    """A line of ``trials.jsonl``; its keys, under their names there."""

    trial: str
    settings: Settings
    status: Literal["done", "failed"]
    error: str | None
    summary: StudySummary | None
    seconds: float
    code: str
    finished: str

    def as_json(self) -> str:
        """The line."""
        summary = None if self.summary is None else self.summary.content()
        return json.dumps(asdict(replace(self, summary=None)) | {"summary": summary})


@dataclass(frozen=True)
class Sweep:
    """What a sweep's folder holds.

    Attributes:
        facts: the content of ``sweep.json``.
        trials: ended ones that the sweep file asks for now, in its order.
        missing: settings of those that never ended.
        outside: ended ones that an earlier version of the file asked for.
    """

    facts: dict[str, Any]
    trials: list[Finished]
    missing: list[Settings]
    outside: list[Finished]

    @property
    def failed(self) -> list[Finished]:
        """Those of ``trials`` that failed."""
        return [trial for trial in self.trials if trial.status == "failed"]


@dataclass
class SweepListener:
    """What a sweep tells while it runs."""

    stage: Callable[[str], None] = lambda text: None
    trials: Callable[[int, int, int], None] = lambda done, failed, total: None
    """Trials done, trials failed, trials in all."""


@cache
def code_digest() -> str:
    """SHA-256, 64 hex digits, of all that results depend on besides study and data: the sources of the installed
    package without command line and report, our model configurations and weights, and the libraries' versions."""
    import secure_fed

    digest = hashlib.sha256(json.dumps(_versions(), sort_keys=True).encode())
    folder = Path(secure_fed.__path__[0])
    for room in folder.iterdir():  # one by one: a recursion from above would not follow a checkout's links
        if room.is_dir() and room.name not in ("cli", "report"):
            _add_files(digest, folder, room.rglob("*.py"))
    _add_files(digest, configs.MODELS, [*configs.MODELS.glob("*.json"), *configs.MODELS.glob("*.safetensors")])
    return digest.hexdigest()


def _add_files(digest: Any, folder: Path, files: Iterable[Path]) -> None:
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{folder.name}/{path.relative_to(folder)} {content}\n".encode())


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("secfacmic", *_LIBRARIES)}


# Running -----------------------------------------------------------------------------------------------------


def run_sweep(
    path: Path, out: Path, listener: SweepListener, *, jobs: int | None = None, ray: str | None = None
) -> Sweep:
    """Run what is missing of a sweep.

    A trial whose line is in ``out/trials.jsonl`` is not run again, unless it failed.

    Args:
        path: the sweep file, or the name of a packaged one.
        out: the sweep's folder.
        listener: is told what happens.
        jobs: processes at a time; as many as there are CPUs if None.
        ray: address of a Ray cluster to run on, or ``local``; ``out`` must then be visible to all its nodes.

    Returns:
        The whole sweep, earlier trials included; failed trials raise nothing.

    Raises:
        SweepFileError, StudyError: the file or its study do not hold together.
        OutputError: the folder holds another sweep, a study or a site, or trials that other code has run.
        DataLeakError: one site is tested on what another trains on; no trial is run.
        WorkersError: there is no such Ray cluster.
        StorageError: the folder cannot be written, or another process is using it.
    """
    file, study = read_sweep_file(path)
    trials = plan_trials(file, study)
    for line in dict.fromkeys(line for trial in trials for line in trial.ignored):
        log.warning("%s", line)
    _refuse_no_sweep(out)
    make_folder(out)
    with exclusive(out):
        lines = _Lines(out / TRIALS)
        _refuse_other(out, file, trials, lines.newest)
        facts = _facts(file, study, trials) | {
            "command": shlex.join(["secfacmic", "sweep", str(path), "--out", str(out)])
        }
        write_durable(out / SWEEP, (json.dumps(facts, indent=2) + "\n").encode())
        _clear(out)
        ended = {trial.id: True for trial in trials if _is_done(lines.newest.get(trial.id))}
        due = [trial for trial in trials if trial.id not in ended]

        def end(trial: Trial, outcome: Outcome) -> None:
            line = _line(trial, outcome)
            lines.append(line)
            ended[line.trial] = _is_done(line)
            tell()

        def tell() -> None:
            listener.trials(sum(ended.values()), len(ended) - sum(ended.values()), len(trials))

        tell()
        tasks = []
        for trial in due:
            if trial.study is None:
                end(trial, Outcome(trial, None, trial.error, 0.0))
            else:
                tasks.append(_task(trial, trial.study, file, out.resolve()))
        listener.stage("making phantoms and features")
        groups: dict[str, list[_Task]] = {}
        for task in tasks:
            groups.setdefault(task.images, []).append(task)
        due_groups = [group for group in groups.values() if not group[0].is_prepared]
        while due_groups:
            firsts = [group[0] for group in due_groups]
            failed = set()
            with closing(run_locally(_prepare, firsts, 1, out / LOG)) as outcomes:
                for outcome in outcomes:
                    if isinstance(outcome.result, _Leak):
                        # The images are every trial's: one that passes, by its split, would be believed like the rest.
                        raise DataLeakError(f"the sweep is refused as a whole: {outcome.result.words}")
                    for line in outcome.result or ():
                        log.warning("%s", line)
                    if outcome.error is not None:
                        failed.add(outcome.task.trial.id)
                        end(outcome.task.trial, outcome)
            # What one trial cannot do, the next one of the same images may.
            due_groups = [rest for group in due_groups if group[0].trial.id in failed and (rest := group[1:])]
        listener.stage("running trials")
        ready = [task for task in tasks if task.trial.id not in ended]
        with closing(_run(ready, jobs, ray, out)) as outcomes:
            for outcome in outcomes:
                end(outcome.task.trial, outcome)
        _clear(out)
    return read_sweep(out)


def _run(tasks: Sequence[_Task], jobs: int | None, ray: str | None, out: Path) -> Outcomes:
    if ray is not None and tasks:
        return run_on_ray(_run_trial, tasks, ray)
    return run_locally(_run_trial, tasks, jobs or len(os.sched_getaffinity(0)), out / LOG)


def _clear(out: Path) -> None:
    """Remove what trials leave that did not end."""
    shutil.rmtree(out / RUNNING, ignore_errors=True)


def _refuse_no_sweep(out: Path) -> None:
    """Refuse a folder in which no sweep was begun, but a study, a site, or what a sweep clears or cuts."""
    if (out / SWEEP).exists():
        return
    if any((out / name).exists() for name in ("study.toml", "site.toml")):
        raise OutputError(
            f"{out}: holds a study or a site; expected a folder of its own for a sweep: choose another --out"
        )
    found = [name for name in (RUNNING, TRIALS) if (out / name).exists()]
    if found:
        raise OutputError(
            f"{out}: holds {' and '.join(found)}, as a sweep has it, and no sweep; expected a new folder or an empty "
            "one: choose another --out"
        )


def _refuse_other(out: Path, file: SweepFile, trials: Sequence[Trial], newest: Mapping[str, Finished]) -> None:
    if (out / SWEEP).exists():
        known = _read_facts(out)["name"]
        if known != file.name:
            raise OutputError(f"{out}: holds sweep {known}; expected {file.name}: choose another --out")
    asked = {trial.id for trial in trials}
    others = [line for line in newest.values() if line.trial in asked and _is_done(line) and line.code != code_digest()]
    if others:
        raise OutputError(
            f"{out}: {len(others)} trials were run by other code (digest {others[0].code[:16]}, here "
            f"{code_digest()[:16]}); results of two versions make no one curve: go on with the version that began "
            "it, or choose another --out and run all of it"
        )


def _facts(file: SweepFile, study: Template, trials: Sequence[Trial]) -> dict[str, Any]:
    values: dict[str, list[Any]] = {}
    for trial in trials:
        for name, value in trial.settings.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    values.pop("seed")
    plan = study.plan
    return {
        "format": 1,
        "name": file.name,
        "title": file.title or file.name,
        "study": study.name,
        "study_id": study.id,
        "data": file.data,
        "data_kind": plan.kind,
        "unit": plan.unit,
        "axes": {name: found for name, found in values.items() if len(found) > 1},
        "fixed": {name: found[0] for name, found in values.items() if len(found) == 1},
        "seeds": list(file.seeds),
        "facts": {
            "mode": study.mode,
            "rounds": study.rounds,
            "sites": [site.name for site in study.sites if site.role == "train"],
            "observers": [site.name for site in study.sites if site.role == "observer"],
            "classes": list(study.class_names),
            "backbone": study.backbone.model,
            "method": study.method.model_dump(mode="json"),
            "min_sites": study.min_sites,
            "bits": study.encoding.bits,
            "lanes": study.packing().lanes,
            "delta": DELTA,
        },
        "trials": [{"trial": trial.id, "settings": trial.settings} for trial in trials],
        "code": code_digest(),
        "versions": _versions(),
        "caveat": CAVEAT,
    }


# In a worker -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A trial on its way to a worker.

    Attributes:
        trial: which.
        study: its template, which finds the images in ``data``, phantoms or not.
        data: folder of the images.
        folder: of the sweep, absolute.
        phantoms: what is to be made first: folder below ``data`` and group.
        images: digest of what images and features are needed; those of equal ones are made once.
    """

    trial: Trial
    study: Template
    data: Path
    folder: Path
    phantoms: tuple[tuple[str, PhantomGroup], ...]
    images: str

    @property
    def marker(self) -> Path:
        """A file that is there when these images and features are."""
        return self.folder / "features" / f"{self.images}.made"

    @property
    def is_prepared(self) -> bool:
        """Whether :func:`_prepare` has been here."""
        return self.marker.exists() and all(self.manifest(home, group).exists() for home, group in self.phantoms)

    def manifest(self, home: str, group: PhantomGroup) -> Path:
        """A file that is there when a group of phantoms is whole."""
        return self.data / home / group.name / "manifest.csv"


def _task(trial: Trial, study: Template, file: SweepFile, out: Path) -> _Task:
    plan = study.plan
    phantoms: tuple[tuple[str, PhantomGroup], ...] = ()
    data = out / "phantoms" if file.data is None else Path(file.data)
    if file.data is None:
        # Each group in a folder of its own, so that trials share those that they have in common.
        homes = {
            group.name: digest([plan.phantom_seed, plan.masks, group.model_dump(mode="json")])
            for group in plan.phantoms
        }
        phantoms = tuple((homes[group.name], group) for group in plan.phantoms)
        sites = tuple(site.model_copy(update={"folder": f"{homes[site.folder]}/{site.folder}"}) for site in plan.sites)
        study = study.model_copy(update={"simulation": plan.model_copy(update={"sites": sites, "phantoms": ()})})
    need = [site.folder for site in study.plan.sites], study.backbone.model_dump(mode="json")
    seed = study.seed if study.backbone.mirrored else 0  # mirrored are those images that the split puts into training
    return _Task(trial, study, data, out, phantoms, digest([*need, str(data), seed, trial.images]))


@dataclass(frozen=True)
class _Leak:
    """What one site is tested on and another trains on, in words; of a process, whose exceptions come as text."""

    words: str


def _prepare(task: _Task) -> list[str] | _Leak:
    """Make phantoms and features that a trial needs and that are not there yet; what sites' images have in common."""
    from secure_fed.lab.phantoms import PhantomSite, make_phantoms
    from secure_fed.lab.simulation import open_sites, prepare, tell_overlaps

    told: list[str] = []
    for home, group in task.phantoms:
        if not task.manifest(home, group).exists():
            shutil.rmtree(task.data / home, ignore_errors=True)
            make_phantoms(
                task.data / home,
                [PhantomSite(**group.model_dump())],
                task.study.plan.phantom_seed,
                masks=task.study.plan.masks,
            )
    with _scratch(task) as scratch:
        agreed = prepare(task.study, scratch, task.data)
        _lend_features(task, scratch)
        if not task.phantoms:
            try:
                told = tell_overlaps(agreed, task.study.plan, scratch, task.data)
            except DataLeakError as error:
                return _Leak(str(error))
        make_folder(task.folder / "features")
        encoded = {site.name: site.features().encoded for site in open_sites(agreed, scratch)}
        for name, kept, used in _feature_files(task, scratch):
            if encoded[name]:
                temporary = kept.with_suffix(".new")
                shutil.copyfile(used, temporary)
                temporary.replace(kept)
    write_durable(task.marker, b"")
    return told


def _run_trial(task: _Task) -> dict[str, Any]:
    """One simulation; its summary, and the code that ran it."""
    from secure_fed.lab.simulation import Budget, prepare, simulate

    trial = task.trial
    if not (task.folder / "features").is_dir():
        raise OutputError(
            f"{platform.node()}: no folder {task.folder} there; a cluster needs --out in a place that all its nodes see"
        )
    budget = None if trial.epsilon is None else Budget(trial.epsilon, trial.delta)
    with _scratch(task) as scratch:
        prepare(task.study, scratch, task.data, budget=budget)
        _lend_features(task, scratch)
        return {"summary": simulate(task.study, scratch, task.data, budget=budget), "code": code_digest()}


@contextmanager
def _scratch(task: _Task) -> Iterator[Path]:
    """A trial's own folder while it runs; it holds keys, so that nothing of it is kept."""
    folder = task.folder / RUNNING / task.trial.id
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, 0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lend_features(task: _Task, scratch: Path) -> None:
    """Give each site a copy of the features known of its images: SQLite files do not bear being shared by nodes."""
    for _, kept, used in _feature_files(task, scratch):
        if kept.exists():
            make_folder(used.parent)
            shutil.copyfile(kept, used)


def _feature_files(task: _Task, scratch: Path) -> Iterator[tuple[str, Path, Path]]:
    """By site: where its features are kept, and where the site itself looks for them."""
    for site in task.study.plan.sites:
        kept = task.folder / "features" / f"{digest(str(task.data / site.folder))}.sqlite"
        yield site.name, kept, SiteState(scratch / "sites" / site.name / "state").features


# What was found ----------------------------------------------------------------------------------------------


def _line(trial: Trial, outcome: Outcome) -> Finished:
    error, result = outcome.error, outcome.result
    if error is None and result["code"] != code_digest():
        error = (
            f"run by other code (digest {result['code'][:16]}): a node has another version, or the code changed "
            "meanwhile; run the same command again with one version everywhere"
        )
    summary = None if error is not None else parse_summary(result["summary"], StudySummary, f"trial {trial.id}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    status: Literal["done", "failed"] = "failed" if error is not None else "done"
    seconds = round(outcome.seconds, 3)
    return Finished(trial.id, trial.settings, status, error, summary, seconds, code_digest(), now)


def _is_done(line: Finished | None) -> bool:
    return line is not None and line.status == "done"


class _Lines:
    """The file of ended trials, as its writer sees it.

    Attributes:
        newest: the last line of each trial.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.newest, whole = _read_lines(path)
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)  # a line that was being written when the machine stopped

    def append(self, line: Finished) -> None:
        """Write a line and fsync it.

        Raises:
            StorageError: it cannot be written.
        """
        data = line.as_json().encode() + b"\n"
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            sync_folder(self._path.parent)
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, size)
            raise StorageError(
                f"{self._path}: a trial's line was not written ({error.strerror}); free some space and run the same "
                "command again: only what is missing runs"
            ) from error
        self.newest[line.trial] = line


def _read_lines(path: Path) -> tuple[dict[str, Finished], int]:
    """The last line of each trial, and how many bytes hold whole lines."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    newest = {}
    for number, text in enumerate(data[:whole].splitlines(), 1):
        try:
            content = json.loads(text)
            line, summary = Finished(**content | {"summary": None}), content["summary"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(
                f"{path}, line {number}: no line of a sweep ({error}); expected JSON as it was written: restore the "
                "file, or remove that line, and its trial runs again"
            ) from error
        if summary is not None:
            where = f"{path}, line {number}, summary"
            line = replace(line, summary=parse_summary(summary, StudySummary, where))
        newest[line.trial] = line
    return newest, whole


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{folder}: no sweep there ({error}); expected a folder of: secfacmic sweep") from error
    if facts.get("format") != 1:
        raise OutputError(f"{folder}: sweep.json has format {facts.get('format')}; expected 1")
    return facts


def read_sweep(folder: Path) -> Sweep:
    """What a sweep's folder holds now, also while the sweep runs.

    Raises:
        OutputError: it is no sweep's folder.
        StorageError: a line of it is damaged.
        SummaryError: a trial's summary is malformed, or of a newer format.
    """
    facts = _read_facts(folder)
    newest, _ = _read_lines(folder / TRIALS)
    trials, missing = [], []
    for asked in facts["trials"]:
        line = newest.pop(asked["trial"], None)
        if line is None:
            missing.append(asked["settings"])
        else:
            trials.append(replace(line, settings=asked["settings"]))
    return Sweep(facts, trials, missing, list(newest.values()))
