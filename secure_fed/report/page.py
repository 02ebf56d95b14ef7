"""The report as one HTML page, as Markdown and as CSV.

The page loads nothing: style and script are in it, and its content security policy allows just these two, so that
not even a name that slips through escaping could run or fetch anything.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secure_fed.lab.sweep_file import in_words
from secure_fed.privacy.ledger import Account, claim
from secure_fed.report import svg
from secure_fed.report.chart import UNKNOWN, Cell, Chart, Section, Table, cell, size_text
from secure_fed.report.figures import sections
from secure_fed.report.groups import (
    HELD_OUT,
    Analysis,
    Group,
    Mean,
    as_float32,
    balanced,
    epsilon_text,
    receivers_of,
    seconds,
    sent,
    setting_text,
)
from secure_fed.report.results import Setting, Trial, flat

SHADES = 11
"""Steps from nothing to all in a shaded table."""
_LIGHT = ("#ffffff", "#79b4ea")
_DARK = ("#1b1f24", "#1d5a92")
MARKDOWN = "[//]: # (report by secfacmic)\n\n"
"""By which a report in Markdown is known again: a link's definition, of which nothing is shown."""
CSV_COLUMNS = ("trial", "origin", "status", "error", "study_id", "method", "mode", "seed", "epsilon")
"""With which a report as CSV begins."""
LOCAL_WARNING = (
    "For this site's eyes only. This page holds metrics on the site's own patients that no privacy budget paid for: "
    "keep it on the site's disk and pass on nothing of it."
)


@dataclass(frozen=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    detail: str = ""


def is_page(head: bytes) -> bool:
    """Whether a file that begins so is a page of ours, by what ``head.html`` names as its generator."""
    return b'<meta name="generator" content="secfacmic ' in head


def as_html(analysis: Analysis) -> str:
    """The page."""
    script = source("report.js")
    return fill(
        "report.html",
        _shades(),
        f"script-src '{digest(script)}'; base-uri 'none'",
        **_content(analysis),
        script=Markup(script),
    )


def fill(template: str, style: str, policy: str, **content: Any) -> str:
    """A page that loads nothing: what it needs is in it, and its policy allows nothing else.

    Args:
        template: its name; it begins with the macro of ``head.html``.
        style: rules of its own, behind those of all pages.
        policy: what it allows beyond its style.
        content: of the template.
    """
    style = source("report.css") + style
    return (
        environment()
        .get_template(template)
        .render(
            {"version": version("secfacmic")} | content,
            style=style,
            policy=f"default-src 'none'; style-src '{digest(style)}'; {policy}",
        )
    )


def as_markdown(analysis: Analysis) -> str:
    """The same figures as tables in Markdown."""
    text = environment().get_template("report.md").render(**_content(analysis))
    return MARKDOWN + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def as_csv(analysis: Analysis) -> str:
    """One row a trial, with an empty ``round``, then one for each of its rounds; every metric is a column."""
    rows = []
    for trial in analysis.results.trials:
        head = _csv_head(trial)
        summary = trial.summary
        metrics = {name: result.model_dump() for name, result in summary.metrics.items()} if summary else {}
        if summary and summary.one_sum:
            metrics["one_sum"] = summary.one_sum.model_dump()
        found = {key: value for key, value in flat(metrics).items() if value is not None}
        rows.append({**head, "round": None, "seconds": trial.seconds, **found})
        for entry in summary.rounds if summary else ():
            rows.append({**head, **flat(entry.model_dump())})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writerow({column: _csv_text(column) for column in columns})
    writer.writerows({key: _csv_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _csv_head(trial: Trial) -> dict[str, Setting]:
    summary = trial.summary
    receivers = receivers_of(summary) if summary else None
    agreed = (summary.study_id, summary.method, summary.mode) if summary else (None, None, None)
    about = (trial.name, trial.origin, "failed" if trial.error else "done", trial.error)
    return {
        **dict(zip(CSV_COLUMNS, (*about, *agreed, trial.seed, trial.epsilon), strict=True)),
        **{f"setting.{key}": value for key, value in trial.settings.items()},
        "values": summary.values if summary else None,
        "receivers": receivers,
    }


def _csv_text(value: Setting) -> Setting:
    """A spreadsheet takes text that starts like a formula for one."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _content(analysis: Analysis) -> dict[str, Any]:
    results = analysis.results
    return {
        "title": results.title or "Attacks",
        "version": version("secfacmic"),
        "chips": _chips(analysis),
        "warning": LOCAL_WARNING if results.local_only else "",
        "headline": headline(analysis),
        "tiles": tiles(analysis),
        "sections": [_with_reproduction(analysis, section) for section in sections(analysis)],
        "trials": _trials(analysis) if len(results.trials) > 1 else None,
        "facts": results.facts,
        "claims": results.claims or _claims(analysis),
        "unclaimed": UNCLAIMED if results.trials and not analysis.private else "",
        "caveat": CAVEAT if results.sweeps or results.kinds & {"public", "simulated"} else "",
        "notes": results.notes,
        "recommendations": _recommendations(analysis),
        "commands": results.commands,
        "attack_commands": results.attack_commands,
    }


CAVEAT = (
    "Everything here is for choosing on public or simulated data: on patients' data every trial would be a release and "
    "spend budget. Patients' data may give other figures."
)
UNCLAIMED = (
    "None: there is no privacy budget here. Encryption hides single updates from the server, but nothing bounds what "
    "the finished adapter tells about a patient."
)


def headline(analysis: Analysis) -> str:
    """The coordinator's question in one sentence: what setting, and what it costs."""
    best, results = analysis.best, analysis.results
    if best is None:
        return "Attacks on the study, and what they found." if results.attacks else "No trial was finished."
    where = f"{best.label} {'at ' if best.epsilon is not None else ''}{analysis.at(best)}"
    mean, up, plain = best.mean(analysis.score()), best.mean(sent), best.mean(as_float32)
    cost = ""
    if up is not None:
        ratio = f", {up.value / plain.value:.2f} of its size as float32" if plain else ""
        cost = f"a site sends {size_text(up.value)} each round{ratio}"
    if best.trials[0].origin == "site":
        rounds = max((len(summary.rounds) for summary in best.summaries), default=0)
        reached = f" and reaches {mean} balanced accuracy on its own test images" if mean else ""
        return f"{best.trials[0].name} has applied {rounds} round{'s' * (rounds != 1)}{reached}" + (
            f"; {cost}." if cost else "."
        )
    if mean is None:
        return f"Of {where} no accuracy is known" + (f"; {cost}." if cost else ".")
    start = f"Take {where}: it reaches" if len(analysis.scored()) > 1 else f"The one setting tried, {where}, reaches"
    text = f"{start} {mean} {analysis.measure}"
    zero = best.mean(analysis.score("zero_shot"))
    if zero is not None and zero.value > mean.value:
        below = f"{zero.value - mean.value:.1f} points below the untrained zero-shot model ({zero.value:.1f} %)"
        return f"Do not train {where}: it reaches {mean} {analysis.measure}, {below}."
    base = analysis.without_privacy(best)
    without = base.mean(analysis.score()) if base else None
    if without is not None:
        lost = without.value - mean.value
        text += f", gives up {lost:.1f} points for privacy" if lost > 0.05 else ", gives up nothing for privacy"
        return f"{text}, and {cost}." if cost else f"{text}."
    return f"{text}; {cost}." if cost else f"{text}."


def tiles(analysis: Analysis) -> list[Tile]:
    """Key figures of the group that the page tells most of."""
    best = analysis.best
    if best is None:
        return []
    found = []
    mean, held_out = best.mean(analysis.score()), best.mean(balanced("federated", HELD_OUT))
    base = analysis.without_privacy(best)
    without = base.mean(analysis.score()) if base else None
    if mean is not None:
        found.append(
            Tile("Balanced accuracy", *_figure(mean, f"mean {analysis.over}" if analysis.averaged else analysis.over))
        )
    if held_out is not None:
        found.append(Tile("On the held-out site", *_figure(held_out, "which trained nothing")))
    if mean is not None and without is not None:
        found.append(Tile("Given up for privacy", f"{without.value - mean.value:z.1f} points", f"{without} without"))
    if best.epsilon is not None:
        spent = [one.epsilon_spent for summary in best.summaries for one in summary.privacy.values()]
        found.append(
            Tile(analysis.epsilon.capitalize(), f"{best.epsilon:g}", f"{max(spent):.2f} spent" if spent else "")
        )
    up, plain, took = (best.mean(value) for value in (sent, as_float32, seconds))
    if up is not None:
        ratio = f"{up.value / plain.value:.2f} × float32" if plain else ""
        found.append(Tile("A site sends a round", size_text(up.value), ratio))
    if took is not None:
        rounds = max(len(one.rounds) for one in best.summaries)
        found.append(Tile("A round", f"{took.value:.1f} s", f"{rounds} round{'s' * (rounds != 1)}"))
    return found


def _figure(mean: Mean, what: str) -> tuple[str, str]:
    """A mean apart from its error, so that it fits a tile."""
    error = "" if mean.error is None else f"± {mean.error:.1f}, "
    return f"{mean.value:.1f} %", error + what + (f", {mean.seeds} seeds" if mean.seeds > 1 else "")


def _chips(analysis: Analysis) -> list[str]:
    results = analysis.results
    modes = {summary.mode for group in analysis.groups for summary in group.summaries}
    chips = [{"he": "encrypted with CKKS", "plain": "not encrypted"}.get(mode, mode) for mode in sorted(modes) if mode]
    if results.kinds:
        chips.append(f"data: {', '.join(sorted(results.kinds))}")
    budgets = [f"{level:g}" for level in analysis.levels if level is not None]
    if budgets:
        chips.append(f"{analysis.epsilon} {', '.join(budgets)}")
    if None in analysis.levels:
        chips.append("without differential privacy" if not budgets else "and without privacy")
    count = len(results.trials)
    return [*chips, f"{count} trials"] if count > 1 else chips


def _claims(analysis: Analysis) -> list[str]:
    """What the ledgers of a simulated group say, which would be claimed of patients."""
    best = analysis.best
    found = []
    for site, spent in best.summaries[0].privacy.items() if best is not None and best.summaries else ():
        kind: Literal["public", "simulated"] = "public" if "public" in analysis.results.kinds else "simulated"
        found.append(claim(Account(site, "", spent.unit, kind, spent.epsilon_budget, spent.delta)))
    return found


def _trials(analysis: Analysis) -> dict[str, Any]:
    """The table of trials, and what it can be filtered by."""
    varied = analysis.varied if len(analysis.varied) <= 6 else []
    kept = {id(trial): group for group in analysis.groups for trial in group.trials}
    rows = []
    for trial in analysis.results.trials:
        group = kept[id(trial)]
        summary = trial.summary
        one = Group(group.label, group.epsilon, group.style, [trial])
        up = sent(summary) if summary else None
        took = seconds(summary) if summary else None
        score, held_out = one.mean(analysis.score()), one.mean(balanced("federated", HELD_OUT))
        numbers = [
            cell(score.value if score else None),
            cell(held_out.value if held_out else None),
            cell(up / 1e6 if up is not None else None, "{:.2f}"),
            cell(took, "{:.2f}"),
            cell(trial.seconds, "{:.0f}"),
        ]
        settings = [_setting_cell(trial.settings.get(key)) for key in varied] or [Cell(group.label)]
        epsilon = Cell(epsilon_text(trial.epsilon), float("inf") if trial.epsilon is None else trial.epsilon)
        status = Cell(f"failed: {trial.error}" if trial.error else "done")
        rows.append((Cell(_short(trial.name)), *settings, epsilon, cell(trial.seed, "{:d}"), *numbers, status))
    names = tuple(key.rsplit(".", 1)[-1].replace("_", " ") for key in varied) or ("setting",)
    columns = (
        "trial", *names, "epsilon", "seed", "at sites, %", "held out, %", "MB sent", "s a round", "s in all", "status"
    )  # fmt: skip
    table = Table("Trials", columns, tuple(rows))
    filters = []
    for index in range(1, len(names) + 2):
        texts = list(dict.fromkeys(row[index].text for row in rows))
        if 1 < len(texts) <= 30:
            filters.append({"column": index, "name": columns[index], "values": texts})
    return {
        "table": table,
        "filters": filters,
        "failed": sum(trial.error is not None for trial in analysis.results.trials),
    }


def _setting_cell(value: Setting) -> Cell:
    return Cell(
        setting_text("", value),
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None,
    )


def _short(name: str) -> str:
    return name[:8] if re.fullmatch(r"[0-9a-f]{16}", name) else name


def _recommendations(analysis: Analysis) -> dict[str, Any] | None:
    found = analysis.recommendations
    if not found:
        return None
    rows = []
    for one in found:
        chosen = _of(one.chosen.settings, analysis)
        rows.append(
            (
                Cell(epsilon_text(one.epsilon), float("inf") if one.epsilon is None else one.epsilon),
                Cell(chosen),
                cell(100 * one.chosen.sites.mean if one.chosen.sites else None),
                cell(
                    100 * one.chosen.sites.error if one.chosen.sites and one.chosen.sites.error is not None else None,
                    "{:.2f}",
                ),
                cell(100 * one.chosen.held_out.mean if one.chosen.held_out else None),
                cell(one.chosen.bytes / 1e6),
                Cell(
                    "the best itself"
                    if one.chosen == one.best
                    else f"{_of(one.best.settings, analysis)}: {one.best.sites} %"
                ),
            )
        )
    columns = (
        "epsilon",
        "setting",
        "at sites, %",
        "standard error",
        "held out, %",
        "MB of a run",
        "best setting",
    )
    table = Table("The cheapest setting within one standard error of the best", columns, tuple(rows)).without_empty()
    best = analysis.best
    words = [
        {
            "name": f"{_of(one.chosen.settings, analysis)}, "
            + ("without privacy" if one.epsilon is None else f"{analysis.epsilon} {one.epsilon:g}"),
            "text": one.words,
            "open": best is not None
            and (one.epsilon, _of(one.chosen.settings, analysis)) == (best.epsilon, best.label),
        }
        for one in found
    ]
    return {"table": table, "words": words}


def _of(settings: dict[str, Any], analysis: Analysis) -> str:
    flattened = flat(settings)
    for group in analysis.groups:
        if group.settings == {key: value for key, value in flattened.items() if key != "epsilon"}:
            return group.label
    return in_words({key: value for key, value in settings.items() if key != "epsilon"})


def _with_reproduction(analysis: Analysis, section: Section) -> dict[str, Any]:
    legends = [(chart, _legend(chart)) for chart in section.charts]
    return {"section": section, "charts": legends}


def _legend(chart: Chart) -> list[tuple[str, str]]:
    """Samples and names; bars name themselves, and a line alone needs no name."""
    entries = [(svg.sample(one), one.name) for one in chart.series if not one.bars]
    entries = entries if len(entries) > 1 or chart.rows else []
    references = {one.label: svg.reference_sample(dotted=one.style is None) for one in chart.references}
    guessing = [(svg.reference_sample(dotted=True), "guessing")] if chart.diagonal else []
    return entries + [(drawn, label) for label, drawn in references.items()] + guessing


@cache
def environment() -> Environment:
    """Templates of pages, with what they may call."""
    made = Environment(
        loader=PackageLoader("secure_fed.report"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["md"] = _md
    made.filters["together"] = lambda text: re.sub(r" (?=[%×±])", "\u00a0", text)
    made.globals["draw"] = lambda chart, name, width: Markup(svg.draw(chart, name, width))
    made.globals["markup"] = Markup
    made.globals |= {"NARROW": svg.NARROW, "WIDE": svg.WIDE, "UNKNOWN": UNKNOWN, "shade": shade}
    return made


def shade(share: float | None) -> str:
    """The class of a share's shade."""
    return "w-none" if share is None else f"w{round(min(max(share, 0.0), 1.0) * (SHADES - 1))}"


def _md(text: object) -> str:
    """Text that Markdown shows as it is."""
    flat_text = re.sub(r"\s+", " ", str(text))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", flat_text.replace("&", "&amp;"))


def source(name: str) -> str:
    """A template's own text."""
    templates = environment()
    assert templates.loader is not None
    return templates.loader.get_source(templates, name)[0]


def digest(text: str) -> str:
    """By which a content security policy allows a style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _shades() -> str:
    """Style rules of the shaded tables, by day and by night."""

    def rules(ends: tuple[str, str]) -> str:
        low, high = (tuple(int(end[i : i + 2], 16) for i in (1, 3, 5)) for end in ends)
        steps = range(SHADES)
        mixed = [
            "#" + "".join(f"{round(a + (b - a) * step / (SHADES - 1)):02x}" for a, b in zip(low, high, strict=True))
            for step in steps
        ]
        return "".join(f".w{step}{{background:{colour}}}" for step, colour in enumerate(mixed))

    return f"{rules(_LIGHT)}@media screen and (prefers-color-scheme:dark){{{rules(_DARK)}}}"
