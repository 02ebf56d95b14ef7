"""What a report is made of: the results that folders hold, read as they are and never changed.

A *trial* is one finished study, whoever ran it: a run of ``simulate`` or ``demo``, one line of a sweep, or what one
site of a deployment holds. All figures are made of trials, so that there is one way from folder to page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from secure_fed import configs
from secure_fed.core.errors import ReportError, StudyError
from secure_fed.core.layout import SUMMARY, SWEEP, SiteState
from secure_fed.lab.sweep import Finished, Sweep, read_sweep
from secure_fed.lab.sweep_file import DELTA
from secure_fed.operate.summary import (
    AnomalyFigures,
    OneSum,
    Result,
    Round,
    SiteSummary,
    Spent,
    StudySummary,
    read_summary,
)
from secure_fed.protocol.study import (
    AgreedStudy,
    Study,
    StudyFile,
    load_study,
    read_study_file,
    read_template,
    with_fields,
)
from secure_fed.protocol.study_differences import as_template, unlike

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile

Setting = str | float | int | bool | None
Origin = Literal["simulate", "sweep", "site"]


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None: results of other versions may hold other things."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


Number = Annotated[float | None, BeforeValidator(number)]


class _Read(BaseModel):
    """Part of a results file: what other versions add is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


@dataclass(frozen=True)
class Summary:
    """What the page needs to know of a finished study, or of one site's part in a deployment.

    Attributes:
        study_id: of the study.
        method: the adapter that it trains.
        mode: of the study.
        sites: those that train.
        observers: those that do not; None if nothing says.
        values: that are trained; None if nothing says.
        rounds: finished ones.
        metrics: by method; of one site of a deployment, at that site alone.
        privacy: by site that has a ledger.
        one_sum: of a study of one sum.
        anomaly: of a study of anomalies.
    """

    study_id: str = ""
    method: str = ""
    mode: str = ""
    sites: tuple[str, ...] = ()
    observers: tuple[str, ...] | None = None
    values: int | None = None
    rounds: tuple[Round, ...] = ()
    metrics: dict[str, Result] = field(default_factory=dict)
    privacy: dict[str, Spent] = field(default_factory=dict)
    one_sum: OneSum | None = None
    anomaly: AnomalyFigures | None = None


def _of_study(found: StudySummary) -> Summary:
    return Summary(
        study_id=found.study_id,
        method=found.method,
        mode=found.mode,
        sites=found.sites,
        observers=found.observers,
        values=found.values,
        rounds=found.rounds,
        metrics={name: result for name, result in found.metrics if result is not None},
        privacy=found.privacy,
        one_sum=found.one_sum,
        anomaly=found.anomaly,
    )


@dataclass(frozen=True)
class Trial:
    """One study's results.

    Attributes:
        name: unique in the report.
        origin: what made it.
        settings: what was chosen, by dotted path, without seed and epsilon.
        seed: of the study.
        epsilon: budget of each training site; None without differential privacy.
        error: why it failed, None if it did not.
        summary: its results, None if it failed.
        seconds: how long it took.
    """

    name: str
    origin: Origin
    settings: dict[str, Setting]
    seed: int | None
    epsilon: float | None
    error: str | None
    summary: Summary | None
    seconds: float | None


class Inversion(_Read):
    """Share of training images that a reconstruction from the view comes closest to."""

    hit_rate: float
    interval: tuple[float, float] | None = None
    chance: float
    n: int


class Membership(_Read):
    """How well members are told from others."""

    auc: float
    auc_interval: tuple[float, float] | None = None
    tpr_at_1_fpr: Number = None
    roc: tuple[tuple[float, float], ...] = ()
    n: int | None = None


class View(_Read):
    """What one attacker holds, and how far the attacks came."""

    view: str
    epsilon: Number = None
    inversion: Inversion | None = None
    membership: Membership | None = None


class _Attacks(_Read):
    data_kind: Literal["public", "simulated"] = "simulated"
    delta: float | None = None
    shadows: int | None = None
    caveat: str = ""
    notes: tuple[str, ...] = ()
    views: tuple[View, ...] = ()


@dataclass
class Results:
    """All that the folders of a report hold.

    Attributes:
        title: the study's or sweep's name.
        trials: in the order found.
        facts: the studies' facts as (label, value), by group.
        class_names: of the study, if known.
        commands: that make these results again.
        attacks: attack results, all folders together.
        attack_notes: what they say of themselves.
        attack_commands: command lines that attack again.
        kinds: of the data: patients, public, simulated.
        claims: what the ledgers of deployed sites claim.
        local_only: the page has figures that nobody paid for and that must stay at the site.
        withheld: figures that are left out because no privacy budget paid for them.
        notes: what a reader must know of how this was read.
        sweeps: from which settings are recommended.
        runs: single runs with their study and kind of data; several of one study are compared like a sweep.
    """

    title: str = ""
    trials: list[Trial] = field(default_factory=list)
    facts: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    commands: list[str] = field(default_factory=list)
    attacks: list[View] = field(default_factory=list)
    attack_notes: list[str] = field(default_factory=list)
    attack_commands: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    claims: list[str] = field(default_factory=list)
    local_only: bool = False
    withheld: bool = False
    notes: list[str] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    runs: list[tuple[Study, str, Finished]] = field(default_factory=list)


def read_results(folders: Sequence[Path], *, local_metrics: bool = False) -> Results:
    """Read every folder.

    Args:
        folders: each of a demo, a ``simulate`` run, a sweep, a site (its folder or its state folder), or with an
            ``attack.json``.
        local_metrics: show a site's own metrics even where it has a privacy budget that did not pay for them.

    Raises:
        ReportError: a folder is none of these, or a file in it is malformed.
        SummaryError: a summary in it is malformed, or of a newer format.
        StudyError, SiteFileError, RecordError, LedgerError: a folder's own files do not hold.
    """
    results = Results()
    for folder in folders:
        if not folder.is_dir():
            raise ReportError(f"{folder}: no folder; expected one that simulate, demo, sweep, attack or client wrote")
        attacks = _read_attacks(folder, results)
        if (folder / "trials.jsonl").exists():
            _read_sweep(folder, results)
        elif (folder / "study.toml").exists() and (folder / SUMMARY).exists():
            _read_run(folder, results)
        elif (site_file := _site_file(folder)) is not None:
            _read_site(site_file, results, local_metrics)
        elif not attacks:
            raise ReportError(
                f"{folder}: nothing to report: no trials.jsonl, no study.toml with {SUMMARY}, no site.toml, no "
                "attack.json; expected the folder of a finished simulate, demo, sweep or attack, or of a site"
            )
    _compare_runs(results)
    _tell_apart(results)
    return results


def _compare_runs(results: Results) -> None:
    """Single runs as the sweep that they would have been, so that one rule chooses among them."""
    for name in dict.fromkeys(study.name for study, _, _ in results.runs):
        mine = [run for run in results.runs if run[0].name == name]
        keys = dict.fromkeys(key for _, _, line in mine for key in line.settings if key != "seed")
        values = {
            key: list({repr(line.settings.get(key)): line.settings.get(key) for _, _, line in mine}.values())
            for key in keys
        }
        plan, kind, first = mine[0]
        spent = next(iter(first.summary.privacy.values()), None) if first.summary is not None else None
        facts = {
            "study": plan.name,
            "data_kind": kind,
            "unit": "patient" if spent is None else spent.unit,
            "axes": {key: found for key, found in values.items() if len(found) > 1},
            "facts": {"delta": DELTA if spent is None else spent.delta},
        }
        results.sweeps.append(Sweep(facts, [line for _, _, line in mine], [], []))


def _tell_apart(results: Results) -> None:
    """Folders of the same name are still different trials."""
    names = [trial.name for trial in results.trials]
    if len(set(names)) < len(names):
        results.trials = [
            replace(trial, name=f"{trial.name} ({index})") for index, trial in enumerate(results.trials, start=1)
        ]


# --- simulate and demo ---


def _read_run(folder: Path, results: Results) -> None:
    agreed = load_study(folder / "study.toml")
    study = agreed.study
    found = read_summary(folder / SUMMARY, StudySummary)
    values = sum(array.size for array in agreed.initial.adapter.values())
    observers = tuple(site.name for site in study.sites if site.role == "observer")
    summary = replace(_of_study(found), values=values, observers=observers)
    chosen: dict[str, Any] = flat(
        {key: value for key, value in as_template(study).items() if key not in ("seed", "format")}
    )
    chosen |= {"seed": study.seed, "epsilon": _epsilon(summary)}
    line = Finished(folder.resolve().name, chosen, "done", None, found, found.seconds_total, "", "")
    kind = _simulated_kind(folder, study)
    results.trials.append(_trial_of(line, "simulate", summary))
    results.runs.append((study, kind, line))
    results.kinds.add(kind)
    results.title = results.title or study.name
    results.class_names = results.class_names or study.class_names
    results.facts.setdefault("Study", []).extend(() if results.facts.get("Study") else study_facts(agreed, kind))
    results.commands.append(_simulate_command(study, summary, folder))


def _simulated_kind(folder: Path, study: Study) -> str:
    from secure_fed.clients.sitefile import read_site_file

    for site in study.sites:
        path = folder / "sites" / site.name / "site.toml"
        if path.exists():
            return read_site_file(path).data.kind
    return "simulated"  # simulate takes nothing else but public data


def _simulate_command(study: Study, summary: Summary, folder: Path) -> str:
    """The command that makes the run again, as far as its folder tells."""
    words = ["secfacmic simulate", _template(study), f"--seed {study.seed} --mode {study.mode}"]
    if not (folder / "data").is_dir():
        words.append("--data DATA")
    spent = next(iter(summary.privacy.values()), None)
    if spent is not None:
        words.append(f"--epsilon {spent.epsilon_budget:g} --delta {spent.delta:g}")
    return " ".join((*words, f"--out {quote(folder.name)}"))


def _template(study: StudyFile) -> str:
    """The packaged template that gives the study but for its seed and mode, if there is one."""
    for path in sorted(configs.FOLDER.glob("*.toml")):
        try:
            packaged = with_fields(read_template(path), seed=study.seed, mode=study.mode)
        except StudyError:
            continue
        if not unlike(study, packaged):
            return path.stem
    return "TEMPLATE.toml"


# --- sweep ---


class _Asked(_Read):
    trial: str
    settings: dict[str, Any]


class _SweepFacts(_Read):
    """``sweep.json``, as far as a report needs it to be whole."""

    name: str
    study: str
    axes: dict[str, list[Any]]
    fixed: dict[str, Any]
    data_kind: Literal["public", "simulated"]
    unit: Literal["patient", "image"]
    facts: dict[str, Any]
    trials: list[_Asked]
    title: str = ""
    command: str = ""


def _read_sweep(folder: Path, results: Results) -> None:
    path = folder / SWEEP
    try:
        about = _SweepFacts.model_validate(_json(path))
    except ValidationError as error:
        raise ReportError(_wrong(str(path), error)) from None
    sweep = read_sweep(folder)
    observers = about.facts.get("observers")
    for line in sweep.trials:
        summary = None if line.summary is None else _of_study(line.summary)
        if summary is not None and summary.observers is None and isinstance(observers, list):
            summary = replace(summary, observers=tuple(map(str, observers)))
        results.trials.append(_trial_of(line, "sweep", summary))
    results.sweeps.append(sweep)
    if sweep.missing:
        count = len(sweep.missing)
        results.notes.append(f"{count} trial{'s' * (count > 1)} of sweep {about.name} did not run yet.")
    classes = about.facts.get("classes")
    if isinstance(classes, list) and not results.class_names:
        results.class_names = tuple(map(str, classes))
    results.title = results.title or about.title or about.name
    results.kinds.add(about.data_kind)
    results.facts[f"Sweep {about.name}"] = _sweep_facts(about, sweep)
    results.commands.append(about.command or f"secfacmic sweep SWEEP.toml --out {quote(folder.name)}")


def _sweep_facts(about: _SweepFacts, sweep: Sweep) -> list[tuple[str, str]]:
    def said(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(said(one) for one in value)
        if isinstance(value, dict):
            return ", ".join(f"{key.replace('_', ' ')} {said(one)}" for key, one in value.items() if key not in chosen)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    chosen = {name.rsplit(".", 1)[-1] for name in (*about.axes, *about.fixed)}
    facts = [("Study", about.study), ("Data", f"{about.data_kind}, unit {about.unit}")]
    facts += [
        ("Trials", f"{len(sweep.trials)} ended, {len(sweep.failed)} of them failed, {len(sweep.missing)} missing")
    ]
    facts += [(f"Varied: {name}", said(values)) for name, values in about.axes.items()]
    facts += [(f"Fixed: {name}", said(value)) for name, value in about.fixed.items()]
    facts += [
        (name.replace("_", " ").capitalize(), said(value)) for name, value in about.facts.items() if name not in chosen
    ]
    return [(label, text) for label, text in facts if text]


def _trial_of(line: Finished, origin: Origin, summary: Summary | None) -> Trial:
    settings = flat({key: value for key, value in line.settings.items() if key not in ("seed", "epsilon")})
    seed = line.settings.get("seed")
    return Trial(
        name=line.trial,
        origin=origin,
        settings=settings,
        seed=seed if isinstance(seed, int) else None,
        epsilon=number(line.settings.get("epsilon")),
        error=None if summary is not None else line.error or "failed without a word",
        summary=summary,
        seconds=number(line.seconds),
    )


# --- a site of a deployment ---


def _site_file(folder: Path) -> Path | None:
    """The ``site.toml`` of a site's folder or of its state folder."""
    if (folder / "site.toml").exists():
        return folder / "site.toml"
    beside = folder.resolve().parent / "site.toml"
    return beside if SiteState(folder).runs.is_dir() and beside.exists() else None


def _read_site(path: Path, results: Results, local_metrics: bool) -> None:
    from secure_fed.clients.budget import ledger_folder, unpaid
    from secure_fed.clients.sitefile import read_site_file
    from secure_fed.privacy.ledger import Ledger

    file = read_site_file(path)
    agreed = load_study(Path(file.study))
    study, state = agreed.study, Path(file.state)
    # Of all that it says of itself, only what depends on no patient.
    ledger = Ledger(ledger_folder(file)).public_summary(study.id) if Ledger.exists(ledger_folder(file)) else None
    patients = file.data.kind == "patients"
    withheld = unpaid(file) and not local_metrics
    found = read_summary(state / SUMMARY, SiteSummary) if (state / SUMMARY).exists() else None
    rounds = _journal_rounds(state, agreed)
    metrics: dict[str, Result] = {}
    if found is not None and not withheld:
        metrics = {name: Result(per_site={file.site: scores}) for name, scores in found.metrics}
        if rounds and rounds[-1].round == found.round:
            rounds = [one.model_copy(update={"validation": found.validations.get(one.round)}) for one in rounds]
    role = next((member.role for member in study.sites if member.name == file.site), "train")
    summary = Summary(
        study_id=study.id,
        method=study.method.adapter,
        mode=study.mode,
        sites=tuple(member.name for member in study.sites if member.role == "train"),
        observers=tuple(member.name for member in study.sites if member.role == "observer"),
        values=sum(array.size for array in agreed.initial.adapter.values()),
        rounds=tuple(rounds),
        metrics=metrics,
        privacy={} if ledger is None else {file.site: Spent.of({**ledger, "epsilon_spent": ledger["epsilon_at_most"]})},
        one_sum=None if found is None or withheld else found.one_sum,
        anomaly=None if found is None or withheld else found.anomaly,
    )
    results.trials.append(
        Trial(
            name=file.site,
            origin="site",
            settings={},
            seed=study.seed,
            epsilon=number(ledger["epsilon_budget"]) if ledger else file.privacy.epsilon if file.privacy else None,
            error=None,
            summary=summary,
            seconds=None,
        )
    )
    results.title = results.title or f"{study.name} at {file.site}"
    results.class_names = results.class_names or study.class_names
    results.kinds.add(file.data.kind)
    results.facts.setdefault("Study", []).extend(
        () if results.facts.get("Study") else study_facts(agreed, file.data.kind)
    )
    results.facts[f"Site {file.site}"] = _site_facts(file, role, len(rounds), study, ledger)
    results.commands.append(f"secfacmic client --site {quote(path.name)}")
    if ledger is not None and ledger["claim"]:
        results.claims.append(" ".join(filter(None, (ledger["claim"], study.features.origin))))
    results.local_only |= patients and bool(metrics)
    results.withheld |= withheld


def _journal_rounds(state: Path, agreed: AgreedStudy) -> list[Round]:
    """The rounds of the current run, from the site's own verified copy of the journal."""
    from secure_fed.protocol.journal import JournalEntry, find_runs, verify_run

    if not SiteState(state).runs.is_dir():
        return []  # nothing arrived yet
    rounds: list[Round] = []
    receivers = len(agreed.study.sites)
    for run in find_runs(state):
        if not run.current:
            continue
        for record in verify_run(run, agreed):
            if record.header.kind != "aggregate":
                continue
            entry = JournalEntry(record)
            rounds.append(
                Round(
                    round=entry.header.round,
                    sites_in=len(entry.sites),
                    bytes_up=entry.bytes_up,
                    bytes_down=entry.size * receivers,
                    seconds=max(0, entry.header.closed_ms - entry.header.opened_ms) / 1000,
                )
            )
    return rounds


def _site_facts(
    file: SiteFile, role: str, rounds: int, study: Study, ledger: dict[str, Any] | None
) -> list[tuple[str, str]]:
    facts = [("Site", file.site), ("Role", role), ("Rounds applied", f"{rounds} of {max(rounds, study.rounds)}")]
    if ledger is None and file.privacy is not None:
        label = "" if file.data.kind == "patients" else "simulated "
        budget = f"{label}epsilon {file.privacy.epsilon:g}, delta {file.privacy.delta:g}"
        return [*facts, ("Privacy budget", f"{budget}: no ledger yet, nothing is spent")]
    if ledger is None:
        return [*facts, ("Privacy budget", "none: this site trains without differential privacy")]
    label = "simulated " if ledger["simulated"] else ""
    return [
        *facts,
        (
            "Privacy budget",
            f"{label}epsilon {ledger['epsilon_budget']:g}, delta {ledger['delta']:g}, unit {ledger['unit']}",
        ),
        ("Spent at most", f"{label}epsilon {ledger['epsilon_at_most']:.4f} in {len(ledger['releases'])} releases"),
        ("Updates paid for in this study", str(len(ledger["anchors"]))),
    ]


# --- shared ---


def study_facts(agreed: AgreedStudy, kind: str) -> list[tuple[str, str]]:
    """What the sites agreed on, as a reader's list."""
    study, lanes = agreed.study, agreed.lanes
    method, training, encoding, private = study.method, study.training, study.encoding, study.privacy
    values = sum(array.size for array in agreed.initial.adapter.values())
    sites = [f"{site.name} (observer)" if site.role == "observer" else site.name for site in study.sites]
    encryption = "none (plain): the server sees every update"
    if study.mode == "he":
        encryption = f"CKKS, {lanes.ciphertexts} ciphertexts an update; the server holds no key"
    return [
        ("Study", study.name),
        ("Study id", study.id),
        ("Data", kind),
        ("Classes", ", ".join(study.class_names)),
        ("Sites", ", ".join(sites)),
        ("Rounds", f"{study.rounds}, at least {study.min_sites} sites each"),
        ("Backbone", f"{study.backbone.model}, frozen, digest {study.backbone.digest[:16]}"),
        ("Method", f"{method.adapter}, loss {method.loss}, domain term: {method.domain_term}"),
        *((("Coordinates", study.features.origin),) if study.features.origin else ()),
        ("Trained values", f"{values:,}"),
        ("Local training", study.work if method.sums else f"{training.steps} steps of {training.batch_size} images, "
                           f"{training.optimizer}, learning rate {training.learning_rate:g}"),
        ("Private training", f"{private.steps} noisy steps a round, clip {private.clip:g}, learning rate "
                             f"{private.learning_rate:g} (used by sites with a budget)"),
        ("Encryption", encryption),
        ("Collusion", study.quorum(study.sites).claim),
        ("Encoding", f"{encoding.bits} bits a value, {lanes.lanes} lanes, bound ±{encoding.value_bound:g}"),
        ("Seed", str(study.seed)),
    ]  # fmt: skip


def flat(content: Any, prefix: str = "") -> dict[str, Setting]:
    """The leaves of nested tables and lists by dotted path; an entry of a list goes by its name, if it has one.

    >>> flat({"a": {"b": 1}, "c": [2, 3]})
    {'a.b': 1, 'c.0': 2, 'c.1': 3}
    """
    found: dict[str, Setting] = {}
    if isinstance(content, dict):
        pairs = [(str(key), value) for key, value in content.items()]
    elif isinstance(content, list | tuple):
        pairs = [
            (str(value.get("name", index)) if isinstance(value, dict) else str(index), value)
            for index, value in enumerate(content)
        ]
    else:
        return {prefix: content if isinstance(content, str | int | float | bool) or content is None else str(content)}
    for key, value in pairs:
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _epsilon(summary: Summary) -> float | None:
    """The budget of every training site, None if one of them has none."""
    budgets = [summary.privacy[site].epsilon_budget if site in summary.privacy else None for site in summary.sites]
    known = [budget for budget in budgets if budget is not None]
    return max(known) if known and len(known) == len(budgets) else None


def _read_attacks(folder: Path, results: Results) -> bool:
    path = folder / "attack.json"
    if not path.exists():
        return False
    content = _json(path)
    try:
        found = _Attacks.model_validate(content)
    except ValidationError as error:
        raise ReportError(_wrong(str(path), error)) from None
    results.attacks.extend(found.views)
    results.attack_notes.extend(
        note for note in (*found.notes, found.caveat) if note not in ("", *results.attack_notes)
    )
    results.kinds.add(found.data_kind)
    results.attack_commands.append(_attack_command(found, folder))
    return True


def _attack_command(found: _Attacks, folder: Path) -> str:
    study = folder / "study.toml"
    words = ["secfacmic attack", _template(read_study_file(study)) if study.exists() else "TEMPLATE.toml"]
    words += [] if (folder / "data").is_dir() else ["--data DATA"]
    words += [f"--shadows {found.shadows}"] if found.shadows is not None else []
    words += [f"--epsilon {epsilon:g}" for epsilon in dict.fromkeys(view.epsilon for view in found.views) if epsilon]
    words += [f"--delta {found.delta:g}"] if found.delta is not None else []
    return " ".join((*words, f"--out {quote(folder.name)}"))


def _wrong(where: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    return (
        f"{where}: {key}: {first['msg'].lower()}; expected results as secfacmic writes them: "
        "the file is damaged or of another version; make it again"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: cannot be read ({error}); expected a JSON file written by secfacmic") from error
    if not isinstance(content, dict):
        raise ReportError(f"{path}: no JSON object; expected a file written by secfacmic")
    return content
