"""Handing an adapter on: a safetensors file, a model card that says where it comes from, and ONNX if asked for.

What goes into an export leaves the site for good. The adapter is the sum that every site holds already. What is made of
one site's own images (temperature, batch norm's statistics, metrics) goes in if the data are public or simulated; of
patients only when the site asks for it, and never under a privacy budget, which has not paid for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secure_fed.clients.budget import has_budget, ledger_folder, unpaid
from secure_fed.clients.calibration import calibrate
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.core.errors import AdapterFileError, BudgetError, OutputError
from secure_fed.core.layout import ADAPTER, CALIBRATION, SUMMARY
from secure_fed.core.storage import exclusive, made_folder, write_durable
from secure_fed.model.adapter_file import AdapterFile, Calibration, load_adapter, save_adapter
from secure_fed.model.backbone import load_backbone
from secure_fed.model.scores import SCALARS, Scores
from secure_fed.model.text_tower import TextTower
from secure_fed.operate.summary import METHODS, StudySummary, read_summary
from secure_fed.privacy.ledger import Ledger, opened
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.one_sum import NO_LIMIT, Limits, never_predicted
from secure_fed.protocol.records import Chain, Record
from secure_fed.protocol.study import AgreedStudy, Study, load_study

CARD = "README.md"
"""The name under which a model hub shows a card."""
ONNX = "adapter.onnx"


@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from and what may be told of it.

    Attributes:
        exporter: the site, or None of a whole simulation.
        kind: of the data.
        rounds: that are in it.
        contributors: how many sites' updates each of these rounds summed.
        privacy: claims of ledgers with the epsilon spent, one text each.
        results: metrics by what was tested where, in the order of the card's table.
        no_results: why there are none.
        validation: share of correct validation images over all contributors, all of whom paid for it.
        calibration: what may go into the file.
    """

    exporter: str | None
    kind: str
    rounds: int
    contributors: tuple[int, ...]
    privacy: tuple[str, ...]
    results: Mapping[str, Scores] = field(default_factory=dict)
    no_results: str = ""
    validation: float | None = None
    calibration: Calibration | None = None


def export_site(site_file: Path, out: Path, *, onnx: bool, own_results: bool) -> list[Path]:
    """Export the adapter that a site holds after its last applied round.

    Args:
        site_file: its ``site.toml``.
        out: folder that gets ``adapter.safetensors, README.md`` and perhaps ``adapter.onnx``.
        onnx: write the latter.
        own_results: of patients' data, put metrics, temperature and batch norm's statistics into it.

    Returns:
        What was written.

    Raises:
        BudgetError: own results of patients under a privacy budget, which has not paid for them.
        AdapterFileError: no round is applied yet.
        OnnxError: as :func:`secure_fed.model.onnx_export.write_onnx`.
        OutputError: the folder holds an export already.
        SecfacmicError: others, as the site and its data give them.
    """
    file = read_site_file(site_file)
    agreed = load_study(Path(file.study))
    _refuse_used(out)
    with exclusive(file.state_folder.path):
        site = Site(file, agreed)
        if not site.round:
            raise AdapterFileError(
                f"{site_file}: no round of study {agreed.study.name} is applied here yet; expected at least one: take "
                "part first (secfacmic client)"
            )
        origin = _origin_of_site(file, agreed, site, own_results)
        with made_folder(out):
            return _write(agreed, site.parameters, origin, site.tower, out, onnx)


def export_run(folder: Path, out: Path, *, onnx: bool) -> list[Path]:
    """Export what ``simulate`` or ``demo`` wrote.

    Args:
        folder: their ``--out``; its data are public or simulated, so that all results are told.
        out: as in :func:`export_site`.
        onnx: likewise.

    Raises:
        AdapterFileError: there is no finished run, or its data are patients'.
        SummaryError: its summary is malformed, or of a newer format.
        SecfacmicError: others, as :func:`export_site`.
    """
    _refuse_used(out)
    if not (folder / SUMMARY).exists():
        raise AdapterFileError(
            f"{folder}: no {SUMMARY}; expected a finished run of secfacmic simulate or demo: run the same command "
            "again, it goes on"
        )
    summary = read_summary(folder / SUMMARY, StudySummary)
    agreed = load_study(folder / "study.toml")
    files = [read_site_file(folder / "sites" / site.name / "site.toml") for site in agreed.study.sites]
    kinds = {file.data.kind for file in files}
    if "patients" in kinds:
        raise AdapterFileError(f"{folder}: patients' data; expected a simulation: export from a site, with --site")
    adapter = load_adapter(folder / ADAPTER)
    results: dict[str, Scores] = {}
    for name, found in (("zero_shot", summary.metrics.zero_shot), ("federated", summary.metrics.federated)):
        results |= {f"{METHODS[name]}, {site}": scores for site, scores in found.per_site.items()}
        if summary.observers:
            results[f"{METHODS[name]}, held out"] = found.held_out
    origin = Origin(
        exporter=None,
        kind="/".join(sorted(kinds)),
        rounds=len(summary.rounds),
        contributors=tuple(entry.sites_in for entry in summary.rounds),
        privacy=tuple(text for file in files for text in _claim(file)),
        results=results,
        calibration=adapter.calibration,
    )
    tower = None
    if onnx and (tokens := adapter.initial.prompt_tokens) is not None:
        checkpoint = None if files[0].checkpoint is None else Path(files[0].checkpoint)
        tower = load_backbone(adapter.backbone, checkpoint).text_tower(tokens)
    with made_folder(out):
        return _write(agreed, adapter.initial.adapter, origin, tower, out, onnx)


def _origin_of_site(file: SiteFile, agreed: AgreedStudy, site: Site, own_results: bool) -> Origin:
    sums = list(_applied(site.replica.files.records.replay(Chain(agreed))))
    last = sums[-1]
    patients = file.data.kind == "patients"
    if own_results and unpaid(file):
        raise BudgetError(
            f"site {site.name}: its own metrics and temperature are made of patients' images, and its privacy budget "
            "has not paid for them; expected an export without --own-results"
        )
    paid = all(entry.ledger != NO_LEDGER for entry in last.contributors)
    counts = site.replica.state.validation if paid else None
    origin = Origin(
        exporter=site.name,
        kind=file.data.kind,
        rounds=site.round,
        contributors=tuple(len(record.contributors) for record in sums),
        privacy=tuple(_claim(file)),
        validation=counts.correct / counts.images if counts is not None and counts.images > 0 else None,
    )
    if patients and not own_results:
        return replace(origin, no_results="they would be of patients, and nobody has asked or paid for them to be here")
    calibration = calibrate(agreed, [site], site.parameters, personal=False)
    results = {
        f"{METHODS['zero_shot']}, {site.name}": Scores(**site.evaluate(None)),
        f"{METHODS['federated']}, {site.name}": Scores(**site.evaluate(site.parameters)),
    }
    return replace(origin, results=results, calibration=replace(calibration, head=None))


def _applied(records: Iterable[Record]) -> Iterable[Record]:
    """The aggregates, in order."""
    kept: dict[int, Record] = {}
    for record in records:
        if record.header.kind == "aggregate":
            kept[record.header.round] = record
    return kept.values()


def _claim(file: SiteFile) -> list[str]:
    folder = ledger_folder(file)
    if not Ledger.exists(folder):
        if not has_budget(file):
            return []
        return [f"Site {file.site} has a privacy budget and has released nothing under it: it has only looked on."]
    with opened(folder) as ledger:
        facts = ledger.public_summary("")
    declared = ", ".join(f"{plan['epsilon']:.3f}" for plan in facts["plans"])
    return [f"{facts['claim']} Declared for the runs so far: epsilon {declared or 'none'} at delta {facts['delta']:g}."]


def _refuse_used(out: Path) -> None:
    found = [name for name in (ADAPTER, CARD, ONNX) if (out / name).exists()]
    if found:
        raise OutputError(f"{out}: holds {', '.join(found)} already; expected a folder without: choose another --out")


def _write(
    agreed: AgreedStudy,
    parameters: dict[str, Any],
    origin: Origin,
    tower: TextTower | None,
    out: Path,
    onnx: bool,
) -> list[Path]:
    study = agreed.study
    file = AdapterFile(
        study.id,
        study.backbone,
        study.class_names,
        study.method,
        replace(agreed.initial, adapter=parameters),
        origin.calibration,
        study.per_patient,
        study.windows,
        study.background,
    )
    card = model_card(agreed, file, origin, onnx)
    written = []
    if onnx:
        from secure_fed.model.onnx_export import write_onnx

        facts = {
            "study": study.id,
            "backbone": study.backbone.digest,
            "backbone_id": study.backbone.id or "",
            "adapter_digest": file.digest,
        }
        write_onnx(out / ONNX, file, tower, {**facts, "temperature": f"{file.temperature:.6g}", "model_card": card})
        written.append(out / ONNX)
    write_durable(out / CARD, card.encode())
    save_adapter(out / ADAPTER, agreed, parameters, origin.calibration, card)
    return [out / ADAPTER, out / CARD, *written]


def model_card(agreed: AgreedStudy, file: AdapterFile, origin: Origin, onnx: bool) -> str:
    """The model card, in markdown, in the form of the Hugging Face hub: a head in YAML, and its sections.

    https://huggingface.co/docs/hub/model-cards and the hub's annotated template of a card.
    """
    study, backbone = agreed.study, agreed.study.backbone
    values = sum(value.size for value in file.initial.adapter.values())
    weights = backbone.tag or backbone.file or ("seeded random weights" if backbone.weights == "random" else "its own")
    few, many = min(origin.contributors, default=0), max(origin.contributors, default=0)
    method = study.method
    details = {
        "study": f"{study.name}, digest `{study.id}`",
        "adapter": f"{method.adapter}, {values:,} values, digest `{file.digest}`",
        "backbone": f"{backbone.model} ({weights}), digest `{backbone.digest}`",
        "its features": f"activation {backbone.activation or 'not stated'}, id `{backbone.id or 'not stated'}`",
        "licence of the backbone": backbone.licence or "not stated in the study: ask its publisher before use",
    }
    training = {
        "sites": ", ".join(
            site.name + (" (observer)" if site.role == "observer" else f" (weight {site.weight:g})")
            for site in study.sites
        ),
        "rounds": f"{origin.rounds}, each the sum of {few} to {many} sites' updates" if few < many else
        f"{origin.rounds}, each the sum of {many} sites' updates",
        "training": f"{study.work}; aggregation {study.aggregation.rule}",
        "encryption": "updates were encrypted (CKKS, exact sums); the server held no key"
        if study.mode == "he"
        else "none: updates were sent in plain",
        "data": f"{origin.kind} images of the sites; none of them is in this file",
    }  # fmt: skip
    classes = "\n".join(f"{i}. {entry.name}: {'; '.join(entry.prompts)}" for i, entry in enumerate(study.classes))
    parts = [
        _head(study),
        f"# Adapter of study {study.name}, after round {origin.rounds} of {max(origin.rounds, study.rounds)}",
        "## Model Details",
        _facts(details),
        "### Classes",
        f"In the order of the outputs, from 0, with the prompts that training started at.\n\n{classes}",
    ]
    if method.one_sum:
        parts += ["### Sets and strangers", _claims_of_cases(file)]
    says = _ONLY_A_SCORE if study.task == "anomaly" else _ALWAYS_A_CLASS
    parts += ["## Uses", _USES, "## Bias, Risks, and Limitations", f"{says} {_LIMITS}"]
    parts += ["## How to Get Started with the Model", _use(file, onnx)]
    claims = [*(origin.privacy or (_no_claim(origin),)), study.features.origin]
    parts += ["## Training Details", _facts(training), "### Privacy", "\n\n".join(filter(None, claims))]
    parts += ["## Evaluation", _results(origin), "### Calibration", _calibration(file)]
    return "\n\n".join(parts) + "\n"


def _head(study: Study) -> str:
    """What a hub files a card under. Of the licence only what the study states, which is the backbone's: that of an
    adapter is for its sites to choose."""
    lines = [
        "library_name: secfacmic",
        "pipeline_tag: image-classification",
        f"model_name: {json.dumps(study.name)}",
        "tags:",
        *(f"- {tag}" for tag in ("federated-learning", "clip", "medical-imaging", study.method.adapter)),
        "metrics:",
        "- roc_auc" if study.task == "anomaly" else "- accuracy",
        "inference: false",
    ]
    return "\n".join(["---", *lines, "---"])


def _facts(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


_USES = """For research on the task and the classes above, with images like those of the sites. **It is no medical
device**: not for diagnosis, triage or any decision about a patient."""
_ALWAYS_A_CLASS = "It always names one of its classes, also for images\nthat show none of them."
_ONLY_A_SCORE = "Its score says how far an image is\nfrom the sites' normal ones, not what is wrong with it."
_LIMITS = """Figures hold for the sites that they were measured at; another scanner, population or prevalence
can change them: measure on images of your own first. Without a privacy claim below, what the adapter may reveal of
single patients is not bounded; with one, it holds for the sites that make it."""


def _claims_of_cases(file: AdapterFile) -> str:
    limits = Limits.of(file.initial.adapter)
    unknown = never_predicted(file.initial.adapter, file.classes)
    left_out = f"Never predicted, for too few patients in the sum: {', '.join(unknown)}. " if unknown else ""
    if limits.patients == 0:
        return left_out + "Nothing is claimed of single cases: no histograms of patients are in the sum."
    return left_out + (
        "`secfacmic predict` gives each image a set of classes, which holds the true one of "
        f"{100 * file.method.coverage:g} % of patients like the {limits.patients:.0f} calibration patients of the "
        "study"
        + (
            ", and flags images that lie farther from all class means than 95 % of those"
            if limits.farthest < NO_LIMIT
            else "; it flags no image as a stranger, as these patients are too few, or lie too far apart, for that"
        )
        + ". Other patients may fare worse: measure."
    )


def _no_claim(origin: Origin) -> str:
    if origin.exporter is None:
        return "No site trained under differential privacy."
    return (
        f"Site {origin.exporter} did not train under differential privacy. Other sites may have; their claims are with "
        "them."
    )


def _results(origin: Origin) -> str:
    lines = []
    if origin.validation is not None:
        lines.append(
            f"Correct validation images over all contributing sites, before the last round: "
            f"{100 * origin.validation:.1f} % (with noise; paid for by the privacy budgets of all of them)."
        )
    if not origin.results:
        return "\n\n".join([*lines, f"No metrics of single sites: {origin.no_results}."])
    lines.append(
        f"On test images ({origin.kind}), at temperature 1, with 95 % bootstrap intervals by patient where there are "
        "any."
    )
    head = ["", *SCALARS.values(), "images"]
    rows = [head, ["---"] * len(head)]
    for name, found in origin.results.items():
        rows.append([name, *(_value(found, key) for key in SCALARS), str(found.images)])
    lines.append("\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join(lines)


def _value(found: Scores, key: str) -> str:
    share: float | None = getattr(found, key)
    if share is None:
        return "-"
    interval = (found.intervals or {}).get(key)
    spread = "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return f"{share:.3f}{spread}"


def _calibration(file: AdapterFile) -> str:
    own = file.calibration
    if own is None or own.temperature is None:
        text = "Probabilities are not calibrated: the temperature is fitted at each site and stays there."
    else:
        text = f"Temperature {own.temperature:.4f}, fitted on {own.images} validation images, is in the file."
    if own is not None and own.statistics:
        text += " So are batch norm's statistics."
    elif (file.method.adapter, file.method.norm) == ("facmic", "batch"):
        text += f" Batch norm's statistics stay at each site, too: without {CALIBRATION} of a site it predicts nothing."
    return text


def _use(file: AdapterFile, onnx: bool) -> str:
    dim, classes = file.initial.prompt_features.shape[1], len(file.classes)
    text = f"```\nsecfacmic predict --adapter {ADAPTER} --images DIR\n```"
    if onnx:
        text += (
            f"\n\n`{ONNX}`: input `features` float32 [n, {dim}], image features of the backbone above (of any length); "
            f"outputs `logits` and `probabilities` float32 [n, {classes}]. Images must be prepared and encoded by that "
            "very backbone."
        )
    return text
