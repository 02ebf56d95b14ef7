"""A whole study in one process: the same sites and coordinator as in a deployment, encryption included."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients import memory
from secure_fed.clients.acceptance import record_acceptance, require_acceptance
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.calibration import calibrate
from secure_fed.clients.data import DRAWN_ALONE
from secure_fed.clients.features import pool_features, refuse_unreadable
from secure_fed.clients.images import compared_images, site_images
from secure_fed.clients.replica import Validation
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteData, SiteFile, SitePrivacy, SiteServer, read_site_file, with_device
from secure_fed.clients.training import train_alone
from secure_fed.core.errors import (
    AdapterMismatchError,
    NotAcceptedError,
    OutputError,
    SecfacmicError,
    SiteFileError,
    StudyError,
    StudyPausedError,
)
from secure_fed.core.layout import ADAPTER, CALIBRATION, SUMMARY, SWEEP, ServerState, SiteState
from secure_fed.core.storage import LOCK, exclusive, make_folder, write_durable
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.phantoms import SPLIT_SHARES, PhantomSite, are_phantoms, make_phantoms
from secure_fed.model.adapter_file import save_adapter, save_calibration
from secure_fed.model.adapters import PRIVATE_HEAD, initial_parameters
from secure_fed.model.device import DeviceChoice, describe_device
from secure_fed.model.evaluation import Predictions, mean, metrics, pool
from secure_fed.model.public_statistics import has_packaged_statistics
from secure_fed.model.scores import Scores
from secure_fed.operate.advice import Advice, advise, as_advised, smallest
from secure_fed.operate.anomaly_figures import anomaly_figures
from secure_fed.operate.folders import look_at
from secure_fed.operate.new_study import RANDOM_CHECKPOINT, SERVER, new_study
from secure_fed.operate.overlaps import Held, overlaps
from secure_fed.operate.sum_figures import one_sum_figures
from secure_fed.operate.summary import (
    FORMAT,
    BackboneFacts,
    Comparison,
    LocalResult,
    Result,
    Round,
    Spent,
    StudySummary,
    write_summary,
)
from secure_fed.privacy.keys import Identity, create_identity, create_sealed_key, load_identity
from secure_fed.privacy.ledger import Ledger, opened
from secure_fed.protocol.codec import COUNTS, Parameters, adapter_digest
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key
from secure_fed.protocol.simulation_table import Simulation
from secure_fed.protocol.study import AgreedStudy, Study, Template, load_study, read_template
from secure_fed.protocol.study_differences import unlike
from secure_fed.protocol.study_tables import Method
from secure_fed.server.coordinator import Coordinator, paused_text

log = logging.getLogger(__name__)

WORDS = frozenset(
    {
        *(ReplyCode.READY, ReplyCode.UPDATE, ReplyCode.CHECKED, ReplyCode.REVEALED, ReplyCode.WITNESSED),
        ReplyCode.ACKNOWLEDGED,
    }
)
BY = "simulation"
"""Who accepts studies here."""


class Budget(NamedTuple):
    """A privacy budget: ``epsilon`` above 0, ``delta`` in (0, 1e-3], and the runs that share it."""

    epsilon: float
    delta: float
    runs: int = 1


@dataclass(frozen=True)
class RoundFacts:
    """One finished round, for display.

    Attributes:
        round: from 1.
        sites_in: contributors.
        bytes_up: all accepted envelopes as sent, summed.
        bytes_down: the record's size times all sites that receive it.
        seconds: from the round's opening to its record.
        validation: share of correct validation images of the adapter that the round trained on, if shared.
    """

    round: int
    sites_in: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    seconds: float
    validation: float | None


@dataclass
class Listener:
    """What a simulation tells while it runs."""

    encoding: Callable[[str, int, int], None] = lambda site, done, total: None
    """Site, images done, images in all."""
    round: Callable[[RoundFacts], None] = lambda facts: None
    stage: Callable[[str], None] = lambda text: None


def simulate(
    template: Template | Path | str,
    out: Path | str,
    data: Path | str | None = None,
    listener: Listener | None = None,
    *,
    skip_unreadable: bool = False,
    budget: Budget | None = None,
    device: DeviceChoice | None = None,
) -> dict[str, Any]:
    """Run a study on one machine and write its results.

    With a folder that already holds this study, an unfinished run goes on; a finished one is followed by a new run
    with a new key, journal and run id.

    Args:
        template: with a ``[simulation]`` table; or its file, or the name of a packaged one.
        out: gets ``study.toml, study.safetensors, summary.json, adapter.safetensors, server/, sites/SITE/``.
        data: folder of the sites' data; without it the template's phantoms are made in ``out/data``.
        listener: is told what happens, if anybody wants to know.
        skip_unreadable: leave out images that cannot be decoded.
        budget: privacy budget of each site, as in :func:`prepare`.
        device: where to compute, if not as each ``site.toml`` says.

    Returns:
        The content of ``summary.json``.

    Raises:
        SecfacmicError: whatever a site or the coordinator refuses.
    """
    if not isinstance(template, Template):
        template = read_template(Path(template))
    out, data = Path(out), None if data is None else Path(data)
    plan_of(template, out, data)
    listener = listener or Listener()
    with starting(out) as start:
        listener.stage("preparing the study")
        agreed = prepare(template, out, data, budget=budget)
        tell_overlaps(agreed, template.plan, out, data, listener, skip_unreadable=skip_unreadable)
        start.done = True
        sites = open_sites(agreed, out, skip_unreadable=skip_unreadable, device=device)
        listener.stage("encoding images")
        for site in sites:
            site.features(lambda done, total, name=site.name: listener.encoding(name, done, total))  # type: ignore[misc]
        listener.stage("training")
        coordinator = open_run(agreed, out, sites)
        run_rounds(agreed, coordinator, sites, listener)
        return finish(agreed, out, sites, coordinator.rounds, start.begun, listener).content()


@dataclass
class Start:
    """A start in a folder.

    Attributes:
        begun: when, by a monotonic clock, seconds.
        done: whether nothing that was asked for can be refused any more; what is written then stays.
    """

    begun: float
    done: bool = False


@contextmanager
def starting(out: Path) -> Iterator[Start]:
    """Hold a folder to play a study in; if the start is refused, all in it is as it was.

    What was made is removed, and a ``site.toml`` that was changed, by a budget or other data, has its content back: the
    next start finds nothing of what was refused.

    Args:
        out: the folder, made if it is not there.

    Raises:
        OutputError: it is a sweep's.
        StorageError: it cannot be made, or another process holds it.
    """
    if (out / SWEEP).exists():
        raise OutputError(f"{out}: holds a sweep; expected a folder of its own for a study: choose another --out")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    locked = (out / LOCK).exists()
    make_folder(out)
    with exclusive(out):
        before = set(out.rglob("*")) - ({out / LOCK} if not locked else set())
        files = {path: path.read_bytes() for path in out.glob("sites/*/site.toml")}
        start = Start(time.monotonic())
        try:
            yield start
        except SecfacmicError:
            if not start.done:
                for path in sorted(set(out.rglob("*")) - before, reverse=True):
                    with suppress(OSError):  # what cannot be removed must not hide why the start was refused
                        (path.rmdir if path.is_dir() and not path.is_symlink() else path.unlink)()
                for path, content in files.items():
                    if path.read_bytes() != content:
                        write_durable(path, content)
                for folder in missing:
                    with suppress(OSError):
                        folder.rmdir()  # unless somebody else writes there by now
            raise


def tell_overlaps(
    agreed: AgreedStudy,
    plan: Simulation,
    out: Path,
    data: Path | None,
    listener: Listener | None = None,
    *,
    skip_unreadable: bool = False,
) -> list[str]:
    """Compare the sites' images with each other, and tell what they have in common, in words.

    Phantoms that were just made have nothing. That a budget drew splits anew is told with it.

    Raises:
        UnreadableImageError: an image cannot be decoded, and is not to be left out.
        DataLeakError: one site is tested on what another trains on, and the table does not say ``shared``.
        SecfacmicError: others, for a site's images.
    """
    if data is None:
        return []
    listener = listener or Listener()
    listener.stage("comparing the sites' images")
    held, alone = [], []
    for member in agreed.study.sites:
        file = read_site_file(out / "sites" / member.name / "site.toml")
        file.state_folder.begin()
        found, looks = compared_images(
            file,
            agreed,
            lambda done, total, name=member.name: listener.encoding(name, done, total),  # type: ignore[misc]
        )
        if not skip_unreadable:
            reasons = [f"{found.images[place].path}: {reason}" for place, reason in sorted(looks.unreadable.items())]
            refuse_unreadable(reasons, len(found.images))
        if DRAWN_ALONE in found.notes.told:
            alone.append(member.name)
        held.append(Held(member.name, found.images, looks.found, member.role == "observer", plan.unit == "patient"))
    if alone:
        log.warning("%s: %s", ", ".join(alone), DRAWN_ALONE)
    common = overlaps(held)
    for line in common.words:
        log.warning("%s", line)
    if not plan.shared:
        common.refuse_leaks()
    return list(common.words)


def open_sites(
    agreed: AgreedStudy, out: Path, *, skip_unreadable: bool = False, device: DeviceChoice | None = None
) -> list[Site]:
    """The sites of a folder that :func:`prepare` has written."""
    sites = []
    for member in agreed.study.sites:
        file = with_device(read_site_file(out / "sites" / member.name / "site.toml"), device)
        sites.append(Site(file.model_copy(update={"skip_unreadable": skip_unreadable}), agreed))
    return sites


def finish(
    agreed: AgreedStudy,
    out: Path,
    sites: Sequence[Site],
    rounds: Sequence[JournalEntry],
    start: float,
    listener: Listener,
) -> StudySummary:
    """Compare and evaluate what the sites hold after the last round, and write adapter and summary.

    Raises:
        AdapterMismatchError: they hold different adapters.
    """
    digests = {site.adapter_digest for site in sites}
    if len(digests) > 1:
        raise AdapterMismatchError(f"the sites hold {len(digests)} different adapters; expected one")
    listener.stage("evaluating")
    final = sites[0].parameters
    spent = _privacy(agreed, out)
    save_adapter(out / ADAPTER, agreed, final)
    training = [site for site in sites if agreed.study.site(site.name).role == "train"]
    save_calibration(out / CALIBRATION, final, calibrate(agreed, training, final, personal=False))
    summary = StudySummary(
        kind="study",
        format=FORMAT,
        study_id=agreed.study.id,
        backbone=BackboneFacts(model=agreed.study.backbone.model, digest=agreed.study.backbone.digest),
        method=agreed.study.method.adapter,
        device={site.name: describe_device(site.device) for site in sites},
        mode=agreed.study.mode,
        seed=agreed.study.seed,
        sites=tuple(site.name for site in agreed.study.sites if site.role == "train"),
        observers=tuple(site.name for site in agreed.study.sites if site.role == "observer"),
        values=sum(block.bounds.size for block in agreed.layout(1).blocks if block.name != COUNTS),
        adapter_digest=adapter_digest(final),
        rounds=_rounds(agreed, sites, rounds, spent),
        metrics=evaluate(agreed, sites, final),
        seconds_total=time.monotonic() - start,
        privacy=spent,
        one_sum=one_sum_figures(agreed, training, [site for site in sites if site not in training]),
        anomaly=anomaly_figures(agreed, training, [site for site in sites if site not in training]),
    )
    write_summary(out / SUMMARY, summary)
    return summary


def prepare(
    template: Template,
    out: Path,
    data: Path | None,
    server: SiteServer | None = None,
    budget: Budget | None = None,
) -> AgreedStudy:
    """Write study, keys and site folders into a folder, or check that what is there is the same study.

    Args:
        template: with a ``[simulation]`` table.
        out: the folder.
        data: folder of the sites' data; without it the template's phantoms are made in ``out/data``.
        server: how the sites are to reach the server, if by network.
        budget: privacy budget of each site; without one, that of its ``site.toml`` or ledger, if any.

    Raises:
        StudyError: the template cannot be simulated.
        OutputError: the folder holds another study, sites with other data, or files that are of no study.
    """
    plan = plan_of(template, out, data)
    make_folder(out)
    if (out / "study.toml").exists():
        agreed = load_study(out / "study.toml")
        differing = unlike(agreed.study, template)
        if differing:
            raise OutputError(
                f"{out}: holds study {agreed.study.name} with other {', '.join(differing)}; "
                "expected the same study: choose another --out"
            )
    else:
        _refuse_others(out, data)
        identities = [_identity(out, site.name) for site in template.sites]
        new_study(template, [identity.public for identity in identities], out)
        agreed = load_study(out / "study.toml")
    data = data or out / "data"
    _write_site_files(agreed, plan, out, data, server)
    _make_phantoms(plan, out / "data", data)
    if budget is not None:
        _set_budgets(agreed, plan, out, budget)
    _accept(agreed, out)
    return agreed


def _refuse_others(out: Path, data: Path | None) -> None:
    """Refuse a folder in which no study was begun, but in which lies what it would write over or put phantoms among."""
    names = (SUMMARY, ADAPTER, CALIBRATION, *(() if data is not None else ("data",)))
    others = [name for name in names if (out / name).exists()]
    if others:
        raise OutputError(
            f"{out}: holds {', '.join(others)} and no study.toml, so it is of no earlier start; expected a new folder "
            "or an empty one: choose another --out; images of your own go with --data"
        )


def under_budget(template: Template, budget: Budget | None, data: Path | None = None) -> tuple[Template, Advice | None]:
    """What is played under a budget: the method that is advised, if the template's ``[simulation]`` leaves it to that.

    Args:
        template: with a ``[simulation]`` table.
        budget: privacy budget of each site, if there is one.
        data: folder of the sites' data, public or simulated; without it the template's phantoms.

    Returns:
        The template to play, and the advice that it follows, if any.

    Raises:
        SecfacmicError: a site's folder has no images that train.
    """
    plan = template.plan
    if budget is None or not plan.advised:
        return template, None
    training = {site.name for site in template.sites if site.role == "train"}
    folders = {site.folder for site in plan.sites if site.name in training}
    if data is None:
        share = SPLIT_SHARES["train"]
        patients = min(
            round(group.patients * (1 - group.unlabelled) * share) for group in plan.phantoms if group.name in folders
        )
    else:
        patients = smallest([look_at(data / folder) for folder in sorted(folders)], plan.shares)
    there = has_packaged_statistics(template.backbone.model)
    advice = advise(budget.epsilon, patients, public=there, one_sum=template.method.one_sum)
    return as_advised(template, advice), advice


def plan_of(template: Template, out: Path, data: Path | None) -> Simulation:
    """The template's ``[simulation]`` table, if it can be played with this data folder.

    Args:
        template, out, data: as for :func:`prepare`.

    Raises:
        StudyError: it cannot; or two sites share images and the table does not say so.
    """
    plan = template.plan
    if data is None and not plan.phantoms:
        raise StudyError(f"study {template.name}: it has no phantoms; give its data folder with --data")
    plan.refuse_shared(data or out / "data")
    return plan


def evaluate(agreed: AgreedStudy, sites: Sequence[Site], final: Parameters) -> Comparison:
    """Metrics of what may be compared, on each training site's test images and on the observers' (held out).

    All train for as many rounds and steps. The observers' images count as one set, and are tested without any private
    head, which never leaves its site.
    """
    members = {site.name: site for site in agreed.study.sites}
    training = [site for site in sites if members[site.name].role == "train"]
    observers = [site for site in sites if members[site.name].role == "observer"]

    def shared(at_site: Callable[[Site], Parameters | None], elsewhere: Parameters | None) -> Result:
        return _tested(agreed, training, observers, at_site, elsewhere)

    def local(method: AgreedStudy) -> LocalResult:
        per_site, elsewhere = {}, {}
        for site in training:
            trained = site.train_alone(method)
            per_site[site.name] = Scores(**site.evaluate(trained, method))
            trained.pop(PRIVATE_HEAD, None)
            elsewhere[site.name] = _held_out(observers, trained, method)
        average = Scores(**mean([found.model_dump() for found in elsewhere.values()]))
        return LocalResult(per_site=per_site, held_out=average, held_out_per_site=elsewhere)

    together, first = pool_features([site.features() for site in training]), training[0]
    if agreed.study.task == "anomaly":
        everything = memory.nearest_neighbour(agreed, together)
        gaussian = memory.gaussian(agreed, [site.features() for site in training])
        return Comparison(
            zero_shot=shared(lambda site: None, None),
            local_only=local(agreed),
            mahalanobis=_scored(agreed, gaussian, training, observers),
            pooled=shared(lambda site: everything, everything),
            federated=shared(lambda site: final, final),
        )
    pooled = train_alone(agreed, together, "pooled", first.tower, first.device)
    return Comparison(
        zero_shot=shared(lambda site: None, None),
        local_only=local(agreed),
        text_head=local(_with_method(agreed, Method(adapter="text_head", loss=agreed.study.method.loss))),
        pooled=shared(lambda site: pooled, pooled),
        federated=shared(lambda site: site.personal(final), final),
    )


def one_sum_result(agreed: AgreedStudy, sites: Sequence[Site]) -> Result:
    """What the head of a study of one sum, which is over, does on the test images of its sites."""
    training = [site for site in sites if agreed.study.site(site.name).role == "train"]
    observers = [site for site in sites if agreed.study.site(site.name).role == "observer"]
    final = sites[0].parameters
    return _tested(agreed, training, observers, lambda site: final, final)


def _tested(
    agreed: AgreedStudy,
    training: Sequence[Site],
    observers: Sequence[Site],
    at_site: Callable[[Site], Parameters | None],
    elsewhere: Parameters | None,
) -> Result:
    per_site = {site.name: Scores(**site.evaluate(at_site(site))) for site in training}
    return Result(per_site=per_site, held_out=_held_out(observers, elsewhere, agreed))


def _held_out(observers: Sequence[Site], parameters: Parameters | None, method: AgreedStudy) -> Scores:
    found = [site.predictions(parameters, method) for site in observers]
    return Scores(**(metrics(*pool(found), positive=method.study.positive) if found else mean([])))


def _scored(
    agreed: AgreedStudy, score: Callable[[NDArray[np.float32]], NDArray[np.float64]], *groups: Sequence[Site]
) -> Result:
    """Figures of scores, the higher the farther from normal, at the first group's sites and at all of the second."""

    def predicted(site: Site) -> Predictions:
        images, labels, patients = site.test_images()
        return Predictions(memory.as_probabilities(score(images)), labels, patients)

    def found(several: Sequence[Site]) -> Scores:
        pooled = pool([predicted(site) for site in several])
        return Scores(**metrics(*pooled, positive=agreed.study.positive)).ranking_alone()

    training, observers = groups
    per_site = {site.name: found([site]) for site in training}
    return Result(per_site=per_site, held_out=found(observers) if observers else Scores())


def _with_method(agreed: AgreedStudy, method: Method) -> AgreedStudy:
    """The same study with another method, for baselines that never leave a site."""
    initial = agreed.initial
    prompts = initial.prompt_features
    adapter = initial_parameters(method, prompts.shape[1], prompts, agreed.study.seed)
    return AgreedStudy(
        agreed.study.model_copy(update={"method": method}), replace(initial, adapter=adapter, basis=None)
    )


def _identity(out: Path, name: str) -> Identity:
    folder = out / "sites" / name / "identity"
    return create_identity(folder, name)


def _write_site_files(agreed: AgreedStudy, plan: Simulation, out: Path, data: Path, server: SiteServer | None) -> None:
    """Write each site's ``site.toml``; one that is there must be the same, but for how to reach the server."""
    random = agreed.study.backbone.weights == "random"
    for played in plan.sites:
        file = SiteFile(
            format=1,
            site=played.name,
            study="../../study.toml",
            state="state",
            identity="identity",
            checkpoint=f"../../{RANDOM_CHECKPOINT}" if random else None,
            data=SiteData(
                folder=str((data / played.folder).resolve()),
                kind=plan.kind,
                unit=plan.unit,
                shares=plan.shares,
                only=played.images,
            ),
            allow_plain=agreed.study.mode == "plain",
            min_sites=agreed.study.min_sites,
        )
        path = out / "sites" / played.name / "site.toml"
        if path.exists():
            known = read_toml(path, SiteFile, SiteFileError)
            if known.model_copy(update={"server": None, "privacy": None}) != file:
                # Before a run nothing was made of the other data, as when a wrong --data was refused.
                if any(SiteState(path.parent / "state").begun_runs()):
                    raise OutputError(
                        f"{path}: not what this template and data folder give; expected the same data as before, "
                        "or another --out"
                    )
            elif server is None or known.server == server:
                continue
            file = file.model_copy(update={"privacy": known.privacy})
        make_folder(path.parent)
        write_toml(path, file.model_copy(update={"server": server}))


def _set_budgets(agreed: AgreedStudy, plan: Simulation, out: Path, budget: Budget) -> None:
    """Write the budget into each ``site.toml``; a site's ledger refuses a higher one than before.

    The declared number of patients comes from the images, which is right for public and simulated data alone.
    """
    for played in plan.sites:
        path = out / "sites" / played.name / "site.toml"
        file = read_toml(path, SiteFile, SiteFileError)
        privacy = SitePrivacy(epsilon=budget.epsilon, delta=budget.delta, runs=budget.runs)
        if file.privacy is not None:
            n_ref = file.privacy.n_ref
        else:
            images = site_images(read_site_file(path).model_copy(update={"privacy": privacy}), agreed)
            count = len({image.patient for image in images if image.split == "train"})
            n_ref = max(10, round(count, -1))
        privacy = privacy.model_copy(update={"n_ref": n_ref})
        if file.privacy != privacy:
            write_toml(path, file.model_copy(update={"privacy": privacy}))


def _accept(agreed: AgreedStudy, out: Path) -> None:
    """Accept the study for every site that has not; no patient is in it."""
    for member in agreed.study.sites:
        file = read_site_file(out / "sites" / member.name / "site.toml")
        identity = _identity(out, member.name)
        try:
            require_acceptance(file, agreed, identity.keys.signing)
        except NotAcceptedError:
            record_acceptance(file, agreed, identity, BY)


def _make_phantoms(plan: Simulation, own: Path, data: Path) -> None:
    missing = [group for group in plan.phantoms if not are_phantoms(own / group.name)]
    if data == own and missing:
        groups = [PhantomSite(**group.model_dump()) for group in missing]
        make_phantoms(own, groups, plan.phantom_seed, masks=plan.masks)


def run_id(study: Study, number: int) -> str:
    """Id of a simulation's run, 64 hex digits: the same study, seed and number give the same draws.

    By the study's name: its id hangs on keys, which are new in each folder, and on the mode, of which no result may
    depend.

    Args:
        study: the study.
        number: of the run in its folder, from 1.
    """
    context = f"secfacmic simulated run 1\n{study.name}\n{study.seed}\n{number}".encode()
    return hashlib.sha256(context).hexdigest()


def accept_another_run(agreed: AgreedStudy, out: Path) -> None:
    """Accept one run more of the study for every site that has taken part in one; no patient is in it."""
    for member in agreed.study.sites:
        file = read_site_file(out / "sites" / member.name / "site.toml")
        if any(file.state_folder.begun_runs()):
            record_acceptance(file, agreed, _identity(out, member.name), BY, again=True)


def open_run(agreed: AgreedStudy, out: Path, sites: Sequence[Site]) -> Coordinator:
    """Go on with an unfinished run, or begin a new one with a new key."""
    folder = out / SERVER
    state = ServerState(folder)
    signing = load_signing_key(state.key)
    if state.current_run is not None:
        coordinator = Coordinator(agreed, folder, signing)
        if not coordinator.finished:
            return coordinator
    key_id = ZERO_DIGEST
    if agreed.study.mode == "he":
        maker = next(site for site in sites if site.name == agreed.study.key_maker)
        epoch, _ = maker.replica.keys.newest
        identity = load_identity(out / "sites" / maker.name / "identity", maker.name)
        sealed = create_sealed_key(agreed, identity, epoch + 1)
        for site in sites:
            key_id = site.replica.keys.accept(sealed).key
    accept_another_run(agreed, out)
    return Coordinator.begin(agreed, folder, signing, key_id, run=_next_run(agreed.study, state))


def _next_run(study: Study, state: ServerState) -> str:
    number = 1
    while state.run(run_id(study, number)).path.exists():
        number += 1
    last = run_id(study, number - 1)
    if number > 1 and state.current_run != last:
        shutil.rmtree(state.run(last).path)  # killed before anybody heard of it
        return last
    return run_id(study, number)


def run_rounds(agreed: AgreedStudy, coordinator: Coordinator, sites: Sequence[Site], listener: Listener) -> None:
    """Exchange messages until every site has applied the last round.

    Raises:
        NotEnoughSitesError: fewer than the quorum can still train.
        StudyPausedError: a sum is out of range.
        SecfacmicError: whatever a site or the coordinator refuses.
    """
    told = 0
    while True:
        step = coordinator.step
        able = sum(_bring_up(coordinator, site) for site in sites)
        for entry in coordinator.rounds[told:]:
            share = validation_share(sites[0].replica.state.validation) if entry is coordinator.rounds[-1] else None
            listener.round(round_facts(agreed, entry, share))
        told = len(coordinator.rounds)
        if coordinator.finished:
            coordinator.journal.chain.refuse_short()
            return
        if coordinator.paused:
            raise StudyPausedError(paused_text(coordinator))
        if coordinator.advance() is None and coordinator.step == step:
            coordinator.require_enough(able)


def _bring_up(coordinator: Coordinator, site: Site) -> bool:
    """Pass requests to a site until it lacks no record; whether it has a word to give for the round."""
    while True:
        reply = site.respond(coordinator.request(site.name, site.run, site.position))
        coordinator.receive(reply)
        if reply.code != ReplyCode.MORE:
            return reply.code in WORDS


def validation_share(counts: Validation | None) -> float | None:
    """Share of correct validation images that came with an aggregate, None if none are shared."""
    return counts.correct / counts.images if counts is not None and counts.images else None


def round_facts(agreed: AgreedStudy, entry: JournalEntry, validation: float | None) -> RoundFacts:
    """What a record tells of its round, and a site that has applied it of the validation."""
    return RoundFacts(
        round=entry.header.round,
        sites_in=entry.sites,
        bytes_up=entry.bytes_up,
        bytes_down=entry.size * len(agreed.study.sites),
        seconds=max(0, entry.header.closed_ms - entry.header.opened_ms) / 1000,  # a clock may have been set back
        validation=validation,
    )


def _privacy(agreed: AgreedStudy, out: Path) -> dict[str, Spent]:
    """By site, for those that have a ledger; labelled simulated, as all of it is here."""
    spent = {}
    for member in agreed.study.sites:
        folder = ledger_folder(read_site_file(out / "sites" / member.name / "site.toml"))
        if Ledger.exists(folder):
            with opened(folder) as ledger:
                spent[member.name] = Spent.of(ledger.summary())
    return spent


def _rounds(
    agreed: AgreedStudy, sites: Sequence[Site], rounds: Sequence[JournalEntry], budgeted: Collection[str]
) -> tuple[Round, ...]:
    """Facts and learning curves by round, the curves from a replay of a site's journal."""
    states = {state.round: state for state in sites[0].replica.history()}
    training = [site for site in sites if agreed.study.site(site.name).role == "train"]
    found = []
    for entry in rounds:
        state = states.get(entry.header.round)
        facts = round_facts(agreed, entry, None if state is None else validation_share(state.validation))
        curves = {
            site.name: None
            if state is None or site.name in budgeted
            else site.validate(site.personal(state.parameters, state.round))
            for site in training
        }
        found.append(
            Round(
                round=facts.round,
                sites_in=len(facts.sites_in),
                bytes_up=facts.bytes_up,
                bytes_down=facts.bytes_down,
                seconds=facts.seconds,
                validation=facts.validation,
                val_balanced_accuracy=curves,
            )
        )
    return tuple(found)
