"""The report's figures: what is drawn, said and tabled about the groups, whatever the format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from secure_fed.model.scores import SCALARS
from secure_fed.operate.summary import METHODS
from secure_fed.report.chart import (
    MAX_SERIES,
    Axis,
    Cell,
    Chart,
    Mark,
    Matrix,
    Reference,
    Section,
    Series,
    Table,
    cell,
    epsilon_axis,
    extent,
    nice_axis,
    rows_axis,
    size_text,
    whole_axis,
)
from secure_fed.report.groups import (
    HELD_OUT,
    Analysis,
    Group,
    Mean,
    Value,
    as_float32,
    balanced,
    confusion,
    epsilon_text,
    mean_of,
    metric,
    recall,
    received,
    scores,
    seconds,
    sent,
    setting_text,
    validation,
)
from secure_fed.report.results import Setting, View

VIEWS = {
    "plain_update": "plain update",
    "server_he": "server's view, encrypted",
    "released": "released adapter",
    "released_dp": "private released adapter",
}
WITHHELD = (
    "Left out. This site has patients' data and a privacy budget, and the budget paid for the updates alone: metrics "
    "on its patients are for its own eyes. secfacmic report --local-metrics shows them, in a page that must not leave "
    "the site."
)
AGAIN = "run the study again with this version"


def sections(analysis: Analysis) -> list[Section]:
    """All figures, in the order of the page; of a withheld one, why. Where nothing but attacks was read, just these."""
    if not analysis.results.trials:
        return [_attacks(analysis)]
    made = [
        _utility(analysis),
        _settings(analysis),
        _comparison(analysis),
        _fairness(analysis),
        _learning(analysis),
        _confusion(analysis),
        _one_sum(analysis),
        _anomaly(analysis),
        _traffic(analysis),
        _attacks(analysis),
    ]
    if analysis.results.withheld:
        local = {"utility", "comparison", "fairness", "learning", "confusion", "one_sum", "anomaly"}
        made = [
            replace(EMPTY, key=one.key, title=one.title, missing=WITHHELD) if one.key in local else one for one in made
        ]
    return [one for one in made if one.missing or one.tables]


EMPTY = Section("", "")


def _utility(analysis: Analysis) -> Section:
    key, title = "utility", "Privacy and utility"
    untrained = (analysis.score("zero_shot"), balanced("zero_shot", HELD_OUT))
    measures = [(*measure, zero) for measure, zero in zip(_measures(analysis), untrained, strict=False)]
    if not analysis.private or not analysis.scored():
        why = "No finished trial has a balanced accuracy."
        if not analysis.private:
            why = (
                "No trial has a privacy budget; secfacmic simulate --epsilon or a sweep over epsilon gives this curve."
            )
        return Section(key, title, missing=why)
    made = [_curve(analysis, *measure) for measure in measures]
    best = analysis.best
    finding = ""
    if best is not None:
        base = analysis.without_privacy(best)
        parts = [
            f"{mean} {what}" + (f" ({without} without privacy)" if base and (without := base.mean(value)) else "")
            for what, value, _ in measures
            if (mean := best.mean(value)) is not None
        ]
        finding = f"At {analysis.at(best)}, {best.label} reaches {_listed(parts)}."
    notes = (
        "Points are means over seeds, bars one standard error; a dashed line is the same setting without privacy.",
        *_hidden(len({group.label for group in analysis.groups})),
    )
    charts, tables = tuple(chart for chart, _ in made), tuple(table for _, table in made)
    return Section(key, title, finding, charts, (), tables, _columns(analysis, "balanced_accuracy"), notes=notes)


def _curve(analysis: Analysis, what: str, value: Value, untrained: Value) -> tuple[Chart, Table]:
    """A measure against epsilon, a line a setting."""
    x, place = epsilon_axis(analysis.levels, analysis.epsilon)
    scored = [(group, mean) for group in analysis.groups if (mean := group.mean(value)) is not None]
    series, references, rows = [], [], []
    for label in dict.fromkeys(group.label for group, _ in scored):
        mine = [(group, mean) for group, mean in scored if group.label == label]
        base = next((mean for group, mean in mine if group.epsilon is None), None)
        style = mine[0][0].style
        marks = [
            Mark(
                place(group.epsilon), mean.value, f"{analysis.where(group)}: {mean} ({_seeds(mean.seeds)})", *mean.ends
            )
            for group, mean in mine
        ]
        series.append(Series(label, tuple(marks), style))
        if base is not None:
            references.append(Reference(base.value, "the same setting without privacy", style))
        for group, mean in mine:
            lost = None if base is None or group.epsilon is None else base.value - mean.value
            seeds = Cell(str(mean.seeds), mean.seeds)
            rows.append((Cell(label), _epsilon(group), seeds, cell(mean.value), _error(mean), cell(lost)))
    zero = _the_same(untrained, [group for group, _ in scored])
    shown = series[:MAX_SERIES]
    references = [one for one in references if one.style in {line.style for line in shown}]
    if zero is not None:
        references.append(Reference(zero.value, f"zero-shot, untrained: {zero.value:.1f} %"))
    y = nice_axis("%", [*extent(shown), *(one.value for one in references)], most=100, span=10)
    chart = Chart(f"{_capital(what)}, %", x, y, tuple(shown), tuple(references))
    names = ("setting", "epsilon", "seeds", "mean", "standard error", "points lost to privacy")
    return chart, Table(f"{_capital(what)}, %", names, tuple(rows))


def _the_same(value: Value, groups: Sequence[Group]) -> Mean | None:
    """What has nothing to do with the settings, over seeds; None if it differs: then they are of other data."""
    found: dict[int | None, set[float]] = {}
    for trial in (trial for group in groups for trial in group.trials):
        if trial.summary is not None and (one := value(trial.summary)) is not None:
            found.setdefault(trial.seed, set()).add(round(one, 6))
    return mean_of(one for (one,) in found.values()) if all(len(ones) == 1 for ones in found.values()) else None


def _settings(analysis: Analysis) -> Section:
    """What trials reach against each setting in which they differ, besides epsilon."""
    charts, tables = [], []
    for name in analysis.varied if len(analysis.varied) <= 4 else []:
        for what, value in _measures(analysis):
            chart, rows = _against_setting(analysis, name, what, value)
            if chart is not None:
                charts.append(chart)
                names = ("setting", "value", "with", "seeds", "mean", "standard error")
                tables.append(Table(chart.title, names, tuple(rows)))
    if not charts:
        return Section("settings", "What the settings do")
    measured = _listed([what for what, _ in _measures(analysis)])
    verb = "change" if analysis.held_out else "changes"
    return Section(
        "settings",
        "What the settings do",
        f"How {measured} {verb} with each setting in which the trials differ.",
        tuple(charts),
        (),
        tuple(tables),
        _columns(analysis, "balanced_accuracy"),
    )


def _measures(analysis: Analysis) -> list[tuple[str, Value]]:
    """What adapters are measured by: at the sites, and on the held-out site if there is one."""
    held_out = [("balanced accuracy on the held-out site", balanced("federated", HELD_OUT))]
    return [(analysis.measure, analysis.score()), *(held_out if analysis.held_out else ())]


def _against_setting(
    analysis: Analysis, name: str, what: str, value: Value
) -> tuple[Chart | None, list[tuple[Cell, ...]]]:
    """A measure against a setting, a line for each combination of the others; None if no line has two points."""
    others = [other for other in analysis.varied if other != name]
    lines: dict[str, list[tuple[Setting, Mean]]] = {}
    for group in analysis.groups:
        mean = group.mean(value)
        if mean is None:
            continue
        words = [setting_text(other, group.settings.get(other), alone=len(others) == 1) for other in others]
        words += [analysis.at(group)] if analysis.private else []
        lines.setdefault(", ".join(words) or "all trials", []).append((group.settings.get(name), mean))
    lines = {label: line for label, line in lines.items() if len(line) > 1}
    values = list(dict.fromkeys(at for line in lines.values() for at, _ in line))
    numbers: dict[Setting, float] = {
        at: float(at) for at in values if isinstance(at, int | float) and not isinstance(at, bool)
    }
    numeric = len(numbers) == len(values)
    if not lines or (not numeric and analysis.private and not others):
        return None, []  # of a few methods the curve against epsilon shows the same
    places = numbers if numeric else {at: float(index) for index, at in enumerate(values)}
    short = name.rsplit(".", 1)[-1].replace("_", " ")
    series: list[Series] = []
    rows: list[tuple[Cell, ...]] = []
    for style, (label, line) in enumerate(lines.items()):
        points = sorted(line, key=lambda point: places[point[0]])
        marks = [
            Mark(
                places[at], mean.value, f"{setting_text(name, at)}, {label}: {mean} ({_seeds(mean.seeds)})", *mean.ends
            )
            for at, mean in points
        ]
        series.append(Series(label, tuple(marks), style, line=numeric))
        for at, mean in points:
            shown = Cell(setting_text("", at), numbers.get(at) if numeric else None)
            seeds = Cell(str(mean.seeds), mean.seeds)
            rows.append((Cell(short), shown, Cell(label), seeds, cell(mean.value), _error(mean)))
    series = sorted(series, key=lambda one: -max(mark.y for mark in one.marks))[:MAX_SERIES]
    series = [replace(one, style=style) for style, one in enumerate(series)]
    ticks = tuple(sorted((place, setting_text("", at)) for at, place in places.items()))
    margin = 0.05 * (ticks[-1][0] - ticks[0][0]) if numeric else 0.5
    x = Axis(short, ticks[0][0] - margin, ticks[-1][0] + margin, ticks)
    y = nice_axis(f"{what}, %", extent(series), most=100, span=10)
    return Chart(f"{_capital(what)} against {short}, %", x, y, tuple(series)), rows


def _comparison(analysis: Analysis) -> Section:
    key, title = "comparison", "Does the federation pay?"
    best = analysis.best
    places = analysis.places_of(best) if best else []
    known = {name for summary in best.summaries for name in summary.metrics} if best else set()
    present = [name for name in reversed(METHODS) if name in known]
    if best is None or not present or not places:
        return Section(key, title, missing="These results hold no metrics.")
    series, rows = [], []
    for style, name in enumerate(present):
        marks = []
        for index, place in enumerate(places):
            mean = best.mean(balanced(name, place))
            if mean is None:
                continue
            ends, how = mean.ends, f", {_seeds(mean.seeds)}"
            interval = _interval(best, name, place)
            if mean.seeds == 1 and interval is not None:
                ends, how = interval, f", 95 % interval {interval[0]:.1f} to {interval[1]:.1f}"
            row = index + (style - (len(present) - 1) / 2) * 0.9 / len(present)
            marks.append(Mark(mean.value, row, f"{METHODS[name]}, {place}: {mean}{how}", *ends))
        series.append(Series(METHODS[name], tuple(marks), style, line=False, across=True))
    for place in places:
        for name in present:
            means = [best.mean(metric(name, place, one)) for one in SCALARS]
            found = [one for summary in best.summaries if (one := scores(summary, name, place)) is not None]
            counts = [mean_of(getattr(one, count) for one in found) for count in ("images", "patients")]
            shares = (cell(mean.value if mean else None) for mean in means)
            rows.append(
                (
                    Cell(place),
                    Cell(METHODS[name]),
                    *shares,
                    *(cell(one.value if one else None, "{:.0f}") for one in counts),
                )
            )
    x = nice_axis("balanced accuracy, %", extent(series, across=True), most=100, span=10)
    chart = Chart(f"Balanced accuracy, %: {analysis.where(best)}", x, rows_axis(places), tuple(series), rows=True)
    table = Table(
        f"Metrics in percent: {analysis.where(best)}",
        ("site", "method", *SCALARS.values(), "images", "patients"),
        tuple(rows),
    )
    finding = ""
    federated = best.mean(analysis.score())
    if federated is not None:
        others = [(METHODS[name], best.mean(analysis.score(name))) for name in present if name != "federated"]
        parts = [f"{_signed(federated.value - mean.value)} points against {name}" for name, mean in others if mean]
        finding = f"Federated training reaches {federated} {analysis.measure}: {_listed(parts)}." if parts else ""
    notes = []
    baselines = {"local_only", "text_head", "pooled"}
    if best.epsilon is not None and set(present) & baselines:
        notes.append(
            "The baselines (local only, text head, pooled) are trained without privacy, on public or simulated data."
        )
    if analysis.results.kinds == {"patients"} and not set(present) & baselines:
        notes.append("A deployment trains no baselines on patients' data; a simulation of the study shows them.")
    if "pooled" in present:
        notes.append(
            "Pooled is the same method on all sites' images in one place: what federation is measured against."
        )
    columns = ("epsilon", "seed", *(f"{name}.per_site.SITE.METRIC" for name in present))
    columns += ("METHOD.held_out.METRIC",) if analysis.held_out else ()
    return Section(key, title, finding, (chart,), (), (table.without_empty(),), columns, notes=tuple(notes))


def _fairness(analysis: Analysis) -> Section:
    key, title = "fairness", "Who pays for privacy?" if analysis.private else "Who is served how well?"
    best = analysis.best
    places = analysis.places_of(best) if best else []
    mine = analysis.like(best) if best else []
    if best is None or not places:
        return Section(key, title, missing="These results hold no metrics by site.")
    classes = analysis.class_names(mine)
    tested = (
        [HELD_OUT] if analysis.held_out and confusion(best, HELD_OUT) else [one for one in places if one != HELD_OUT]
    )
    charts, tables = [], []
    matrices: list[Matrix] = []
    by_site = [(place, balanced("federated", place)) for place in places]
    by_class = [(name, recall(tested, index)) for index, name in enumerate(classes)]
    if len(mine) > 1:
        charts.append(_against_epsilon(analysis, mine, "Balanced accuracy by site, %", by_site))
        if classes:
            where = "the held-out site" if tested == [HELD_OUT] else "all sites"
            charts.append(_against_epsilon(analysis, mine, f"Recall by class on {where}, %", by_class))
    tables.append(_by_epsilon("Balanced accuracy, %", "site", by_site, mine))
    cells = [
        (place, name, recall([place], index))
        for place in places
        for index, name in enumerate(classes)
        if any(group.mean(recall([place], index)) for group in mine)
    ]
    if cells:
        matrices = _recall_matrices(mine, places, cells)
        tables.append(
            _by_epsilon("Recall, %", "site, class", [(f"{place}, {name}", value) for place, name, value in cells], mine)
        )
    notes = []
    if matrices:
        notes.append(
            "Recall is the share of a class's images that are found; darker is higher. Few images make a wide error."
        )
    else:
        notes.append(f"These results hold no confusion matrices, so that recall by class is not shown: {AGAIN}.")
    columns = (
        "epsilon",
        "seed",
        "federated.per_site.SITE.balanced_accuracy",
        "federated.per_site.SITE.confusion_matrix.TRUE.PREDICTED",
    )
    finding = _fairness_finding(analysis, mine, by_site, cells)
    return Section(key, title, finding, tuple(charts), tuple(matrices), tuple(tables), columns, notes=tuple(notes))


def _recall_matrices(
    groups: Sequence[Group], places: Sequence[str], cells: Sequence[tuple[str, str, Value]]
) -> list[Matrix]:
    """A table a site: classes by epsilon, all shaded on one scale from the lowest recall to the highest."""
    means = {(place, name): [group.mean(value) for group in groups] for place, name, value in cells}
    known = [mean.value for row in means.values() for mean in row if mean is not None]
    low, high = min(known), max(known)
    heads = tuple(f"ε\u00a0{epsilon_text(group.epsilon)}" for group in groups)
    made = []
    for place in places:
        rows = {name: row for (at, name), row in means.items() if at == place}
        shares = [
            tuple(None if mean is None else (mean.value - low) / max(high - low, 1e-9) for mean in row)
            for row in rows.values()
        ]
        texts = [tuple("–" if mean is None else f"{mean.value:.0f}" for mean in row) for row in rows.values()]
        if rows:
            made.append(Matrix(f"Recall, %: {place}", "class", tuple(rows), heads, tuple(shares), tuple(texts)))
    return made


def _against_epsilon(
    analysis: Analysis, groups: Sequence[Group], title: str, values: Sequence[tuple[str, Value]]
) -> Chart:
    x, place = epsilon_axis([group.epsilon for group in groups], analysis.epsilon)
    series = []
    for style, (name, value) in enumerate(values[:MAX_SERIES]):
        found = [(group, mean) for group in groups if (mean := group.mean(value)) is not None]
        marks = [
            Mark(place(group.epsilon), mean.value, f"{name}, {analysis.at(group)}: {mean}", *mean.ends)
            for group, mean in found
        ]
        series.append(Series(name, tuple(marks), style))
    return Chart(title, x, nice_axis("%", extent(series), most=100, span=10), tuple(series))


def _by_epsilon(caption: str, what: str, values: Sequence[tuple[str, Value]], groups: Sequence[Group]) -> Table:
    rows = []
    for name, value in values:
        for group in groups:
            mean = group.mean(value)
            rows.append((Cell(name), _epsilon(group), cell(mean.value if mean else None), _error(mean)))
    return Table(caption, (what, "epsilon", "mean", "standard error"), tuple(rows))


def _fairness_finding(
    analysis: Analysis,
    groups: Sequence[Group],
    by_site: Sequence[tuple[str, Value]],
    cells: Sequence[tuple[str, str, Value]],
) -> str:
    strict, free = groups[0], groups[-1]
    if strict.epsilon is not None and free.epsilon is None:
        named = [(f"{name} at {place}", "recall", value) for place, name, value in cells]
        named = named or [(place, "balanced accuracy", value) for place, value in by_site]
        changes = [
            (with_privacy.value - without.value, name, what, without.value, with_privacy.value)
            for name, what, value in named
            if (with_privacy := strict.mean(value)) and (without := free.mean(value))
        ]
        if changes and (worst := min(changes))[0] < 0:
            _, name, what, before, after = worst
            fall = f"from {before:.1f} % without privacy to {after:.1f} %"
            return f"At {analysis.at(strict)}, {name} pays most: {what} falls {fall}."
        if changes:
            return f"Nobody loses at {analysis.at(strict)} against training without privacy."
    found = [(mean.value, place) for place, value in by_site if place != HELD_OUT and (mean := strict.mean(value))]
    if len(found) < 2:
        return ""
    low, high = min(found), max(found)
    gap = f"{high[0] - low[0]:.1f} points"
    return f"The gap between sites is {gap}: {high[0]:.1f} % at {high[1]}, {low[0]:.1f} % at {low[1]}."


def _learning(analysis: Analysis) -> Section:
    key, title = "learning", "Learning curves"
    best = analysis.best
    mine = analysis.like(best) if best else []
    charts, rows = [], []
    shared: list[Series] = []
    for group in mine:
        line, added = _over_rounds(group, analysis.at(group), None, len(shared))
        shared += [line] if line.marks else []
        rows += added
    sites = []
    for style, site in enumerate(analysis.sites):
        line, added = _over_rounds(best, site, site, style) if best else (Series(site, (), style), [])
        sites += [line] if line.marks else []
        rows += added
    if best is not None:
        for name, series in (
            ("Correct validation images of all sites, %", shared),
            (f"Validation balanced accuracy by site, %: {analysis.where(best)}", sites),
        ):
            if series:
                x = whole_axis("round", [mark.x for one in series for mark in one.marks])
                charts.append(
                    Chart(name, x, nice_axis("%", extent(series), most=100, span=10), tuple(series[:MAX_SERIES]))
                )
    if not charts:
        return Section(key, title, missing=_no_curve(analysis))
    line = charts[0].series[-1]
    first, last = line.marks[0], line.marks[-1]
    start = f"from {first.y:.1f} % in round {first.x:.0f} to " if last is not first else ""
    finding = f"{_capital(line.name)}: {start}{last.y:.1f} % in round {last.x:.0f}."
    notes = [
        "A round's shared value is that of the adapter from which the round starts, since it travels with the round's "
        "updates; a site's own value is that of the adapter after the round."
    ]
    if best is not None and best.trials[0].origin == "site":
        notes.append("Of rounds that a site caught up with later it has no value.")
    if shared and len(shared) < len(mine):
        notes.append("Sites with a privacy budget send no validation counts, so that they have no shared curve.")
    table = Table("Validation, %", ("of", "epsilon", "round", "mean", "standard error"), tuple(rows))
    columns = ("epsilon", "seed", "round", "validation", "val_balanced_accuracy.SITE")
    drawn = tuple(chart for chart in charts if any(len(one.marks) > 1 for one in chart.series))  # one round is no curve
    return Section(key, title, finding, drawn, (), (table,), columns, notes=tuple(notes))


def _over_rounds(group: Group, name: str, site: str | None, style: int) -> tuple[Series, list[tuple[Cell, ...]]]:
    marks: list[Mark] = []
    rows: list[tuple[Cell, ...]] = []
    for number in group.rounds:
        mean = group.mean(validation(number, site))
        if mean is not None:
            marks.append(Mark(number, mean.value, f"round {number}, {name}: {mean}", *mean.ends))
            of = Cell(site or "all sites")
            rows.append((of, _epsilon(group), Cell(str(number), number), cell(mean.value), _error(mean)))
    return Series(name, tuple(marks), style), rows


def _no_curve(analysis: Analysis) -> str:
    if analysis.private:
        return "Sites with a privacy budget send no validation counts: each would have to be paid for."
    if "patients" in analysis.results.kinds:
        return "A site keeps the validation share of the last round alone, and here it has none."
    return f"These results hold no validation by round: {AGAIN}."


def _confusion(analysis: Analysis) -> Section:
    key, title = "confusion", "Confusion matrices"
    best = analysis.best
    mine = analysis.like(best) if best else []
    classes = analysis.class_names(mine)
    if best is None or not classes:
        return Section(key, title, missing=f"These results hold no confusion matrices: {AGAIN}.")
    matrices, rows = [], []
    for group in sorted(mine, key=lambda group: group is not best):
        for place in sorted(analysis.places, key=lambda place: place != HELD_OUT):
            counts = confusion(group, place)
            if counts is None:
                continue
            if group is best or (place == HELD_OUT and group in (mine[0], mine[-1])):
                shares = tuple(tuple(one / sum(row) if sum(row) else None for one in row) for row in counts)
                texts = tuple(tuple(f"{one:g}" for one in row) for row in counts)
                name = f"{_capital(place)}: {analysis.where(group)}"
                matrices.append(Matrix(name, "true class", classes, classes, shares, texts))
            for true, row in zip(classes, counts, strict=True):
                for predicted, count in zip(classes, row, strict=True):
                    rows.append((Cell(place), _epsilon(group), Cell(true), Cell(predicted), cell(count, "{:g}")))
    place = HELD_OUT if HELD_OUT in analysis.places else analysis.places_of(best)[0]
    names = ("site", "epsilon", "true class", "predicted class", "images")
    return Section(
        key,
        title,
        _most_confused(confusion(best, place), classes, place),
        (),
        tuple(matrices),
        (Table("Images", names, tuple(rows)),),
        (
            "epsilon",
            "seed",
            *(("federated.held_out.confusion_matrix.TRUE.PREDICTED",) if analysis.held_out else ()),
            "federated.per_site.SITE.confusion_matrix.TRUE.PREDICTED",
        ),
        notes=(
            "Rows are true classes, columns predicted ones. Images of all seeds, shaded by their share of the row.",
        ),
    )


def _most_confused(counts: Sequence[Sequence[float]] | None, classes: Sequence[str], place: str) -> str:
    wrong = [
        (count / sum(row), classes[true], classes[predicted])
        for true, row in enumerate(counts or ())
        for predicted, count in enumerate(row)
        if true != predicted and count
    ]
    if not wrong:
        return f"{_capital(place)}: no class is taken for another."
    share, true_name, predicted_name = max(wrong)
    return f"{_capital(place)}: the commonest error takes {100 * share:.0f} % of {true_name} for {predicted_name}."


def _anomaly(analysis: Analysis) -> Section:
    """Of memories of normal images: ROC by site, scores of normal and anomalous images, and heat maps against masks."""
    key, title = "anomaly", "Anomalies"
    known = [(group, one.anomaly) for group in analysis.groups for one in group.summaries if one.anomaly is not None]
    if not known:
        return Section(key, title)
    group, first = known[0]
    sites = [
        (name, found) for name, found in (*first.per_site.items(), (HELD_OUT, first.held_out)) if found is not None
    ]
    curves = tuple(
        Series(
            name, tuple(Mark(100 * x, 100 * y, f"{name}: {100 * x:.0f}, {100 * y:.0f}") for x, y in found.roc), style
        )
        for style, (name, found) in enumerate(sites)
        if found.roc
    )
    roc = Chart(
        f"Anomalies found against false alarms, %: {group.label}",
        nice_axis("false alarms, %", [0, 100]),
        nice_axis("anomalies found, %", [0, 100]),
        curves,
    )
    histograms = tuple(
        _histogram(f"Scores at {name}, % of images: {group.label}", found.normal, found.anomalous)
        for name, found in sites
    )
    matrices = tuple(
        matrix
        for name, found in sites
        for matrix in _heat(f"{name}: {group.label}", found.normal_map, found.anomalous_map)
    )
    rows, scores_at, places = [], [], []
    for one, figures in known:
        for name, found in (*figures.per_site.items(), (HELD_OUT, figures.held_out)):
            if found is None:
                continue
            rows.append(
                (
                    Cell(one.label),
                    Cell(name),
                    cell(figures.threshold, "{:.3f}"),
                    cell(100 * figures.false_alarms),
                    cell(None if found.flagged_normal is None else 100 * found.flagged_normal),
                    cell(None if found.flagged_anomalous is None else 100 * found.flagged_anomalous),
                    cell(sum(found.normal), "{:.0f}"),
                    cell(sum(found.anomalous), "{:.0f}"),
                )
            )
            width = 2 / len(found.normal)
            for low, high in _merged(found.normal, found.anomalous):
                counts = [sum(side[low:high]) for side in (found.normal, found.anomalous)]
                ends = f"{low * width:.2f} to {high * width:.2f}"
                scores_at.append((Cell(one.label), Cell(name), Cell(ends), *(cell(n, "{:.0f}") for n in counts)))
        for place, maps in figures.places.items():
            constant, equal = maps.constant_pixel_auroc, maps.equal_place_auroc
            places.append(
                (
                    Cell(one.label),
                    Cell(place),
                    cell(100 * maps.pixel_auroc),
                    cell(100 * maps.pro),
                    cell(None if constant is None else 100 * constant),
                    cell(None if equal is None else 100 * equal),
                    cell(maps.images, "{:.0f}"),
                )
            )
    tables = (
        Table(
            "Flags",
            ("setting", "where", "threshold", "false alarms promised at most, %", "normal patients flagged, %",
             "anomalous patients flagged, %", "normal images", "anomalous images"),
            tuple(rows),
        ),
        Table("Scores", ("setting", "where", "score", "normal images", "anomalous images"), tuple(scores_at)),
        Table(
            "Heat maps against masks",
            ("setting", "where", "pixel AUROC, %", "PRO, %", "the same map for every image: pixel AUROC, %",
             "AUROC at equal places, %", "images"),
            tuple(places),
        ),
    )  # fmt: skip
    flagged = [one.flagged_normal for one in first.per_site.values() if one.flagged_normal is not None]
    finding = f"At most {100 * first.false_alarms:g} % false alarms are promised"
    finding += f"; {100 * fmean(flagged):.1f} % of the sites' own normal test patients are flagged." if flagged else "."
    notes = (
        "The promise holds for normal patients like those of all sites' validation, with as many images; a patient is "
        "flagged by any of them. It does not hold for every site by itself.",
    )
    charts = (*((roc,) if curves else ()), *histograms)
    return Section(key, title, finding, charts, matrices, tables, notes)


def _histogram(title: str, normal: Sequence[int], anomalous: Sequence[int]) -> Chart:
    """Shares of images by score."""
    width, ranges, series = 2 / len(normal), _merged(normal, anomalous), []
    for style, (name, counts) in enumerate((("normal", normal), ("anomalous", anomalous))):
        marks = []
        for low, high in ranges if sum(counts) else ():
            share = 100 * sum(counts[low:high]) / sum(counts)
            ends = f"{low * width:.2f} to {high * width:.2f}"
            marks.append(Mark((low + high) / 2 * width, share, f"{name}, {ends}: {share:.0f} %"))
        series.append(Series(name, tuple(marks), style))
    known = [one for one in series if one.marks]
    x = nice_axis("score", [mark.x for one in known for mark in one.marks] or [0, 2])
    return Chart(title, x, nice_axis("images, %", [0, *(mark.y for one in known for mark in one.marks)]), tuple(known))


def _heat(where: str, normal: Sequence[Sequence[float]], anomalous: Sequence[Sequence[float]]) -> list[Matrix]:
    """Mean heat maps, on one scale."""
    known = [(name, heat) for name, heat in (("normal", normal), ("anomalous", anomalous)) if heat]
    values = [value for _, heat in known for row in heat for value in row]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [
        Matrix(
            f"Mean heat map of {name} test images, {where}",
            "place",
            tuple(str(place + 1) for place in range(len(heat))),
            tuple(str(place + 1) for place in range(len(heat[0]))),
            tuple(tuple((value - low) / max(high - low, 1e-9) for value in row) for row in heat),
            tuple(tuple(f"{value:.2f}" for value in row) for row in heat),
        )
        for name, heat in known
    ]


def _merged(normal: Sequence[int], anomalous: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of bins, eight of them, over those that hold anything."""
    used = [place for place, both in enumerate(zip(normal, anomalous, strict=True)) if any(both)]
    if not used:
        return []
    step = max(1, -(-(used[-1] + 1 - used[0]) // 8))
    return [(low, min(low + step, len(normal))) for low in range(used[0], used[-1] + 1, step)]


def _one_sum(analysis: Analysis) -> Section:
    """Of heads of one sum: shrinkage and spectrum, sets and strangers, and what a byte buys beside other methods."""
    key, title = "one_sum", "One sum"
    heads = [(group, one.one_sum) for group in analysis.groups for one in group.summaries if one.one_sum is not None]
    if not heads:
        return Section(key, title)
    rows, cases = [], []
    for group, head in heads:
        pooled = head.validation
        rows.append(
            (
                Cell(group.label),
                _epsilon(group),
                cell(head.shrinkage, "{:g}"),
                cell(pooled.patients if pooled else None, "{:.0f}"),
                cell(100 * pooled.balanced_accuracy if pooled else None),
                cell(pooled.auroc if pooled else None, "{:.3f}"),
                cell(pooled.expected_calibration_error if pooled else None, "{:.3f}"),
                Cell(", ".join(head.left_out) or "none"),
            )
        )
        for place, found in (*head.per_site.items(), (HELD_OUT, head.held_out)):
            if found is None or head.promised is None:
                continue
            worst = min(found.coverage_by_class, key=lambda name, found=found: found.coverage_by_class[name])  # type: ignore[misc]
            cases.append(
                (
                    Cell(group.label),
                    Cell(place),
                    cell(100 * head.promised),
                    cell(100 * found.coverage),
                    Cell(f"{100 * found.coverage_by_class[worst]:.1f} ({worst})", 100 * found.coverage_by_class[worst]),
                    cell(found.set_size, "{:.2f}"),
                    cell(None if found.strangers is None else 100 * found.strangers),
                    cell(found.images, "{:.0f}"),
                )
            )
    bytes_rows = []
    for group in analysis.groups:
        up = mean_of(
            sum(entry.bytes_up / entry.sites_in for entry in one.rounds if entry.sites_in) for one in group.summaries
        )
        measures = [(what, group.mean(value)) for what, value in _measures(analysis)]
        if up is not None:
            bytes_rows.append(
                (
                    Cell(group.label),
                    _epsilon(group),
                    cell(up.value / 1e6, "{:.3f}"),
                    *(cell(mean.value if mean else None) for _, mean in measures),
                )
            )
    ranks = sorted({rank for _, head in heads for rank in head.spectrum})
    spectra = tuple(
        (
            Cell(group.label),
            cell(head.noise_floor, "{:.3g}"),
            *(cell(head.spectrum.get(rank), "{:.3g}") for rank in ranks),
        )
        for group, head in heads
    )
    spectrum = heads[0][1].spectrum
    marks = tuple(
        Mark(math.log2(rank), math.log10(max(value, 1e-12)), f"{rank}: {value:.3g}") for rank, value in spectrum.items()
    )
    line = Series("standard deviation", marks, 0)
    chart = Chart(
        f"Spectrum within classes: {heads[0][0].label}",
        nice_axis("log2 of rank", [mark.x for mark in marks]),
        nice_axis("log10 of standard deviation", [mark.y for mark in marks]),
        (line,),
    )
    tables = (
        Table(
            "The head, and the consortium's patients under one that does not know them",
            ("setting", "epsilon", "shrinkage", "patients", "balanced accuracy, %", "AUROC", "calibration error",
             "classes left out"),
            tuple(rows),
        ).without_empty(),
        Table(
            "Spectrum: standard deviations within classes, by rank",
            ("setting", "least that noise leaves", *(str(rank) for rank in ranks)),
            spectra,
        ),
        Table(
            "Sets and strangers on test images",
            ("setting", "where", "promised, %", "covered, %", "least covered class, %", "classes in a set",
             "strangers, %", "images"),
            tuple(cases),
        ),
        Table(
            "What a byte buys",
            ("setting", "epsilon", "MB sent by a site in all", *(what for what, _ in _measures(analysis))),
            tuple(bytes_rows),
        ).without_empty(),
    )  # fmt: skip
    covered = [found.coverage for _, head in heads for found in (head.held_out,) if found is not None]
    promised = heads[0][1].promised
    chosen = heads[0][1].validation is not None
    finding = (
        f"The pooled histograms chose a shrinkage of {heads[0][1].shrinkage:g}."
        if chosen
        else f"The shrinkage, {heads[0][1].shrinkage:g}, is the one that the study declares: no histograms chose it."
    )
    if covered and promised is not None:
        finding += f" Held out, sets hold the class of {100 * fmean(covered):.1f} %; {100 * promised:g} % are promised."
    notes = (
        "Pooled figures come from summed histograms of patients that the head judged without knowing them; no single "
        "site's are known. The promise holds for patients like those, not for every site or class."
        if any(head.validation is not None for _, head in heads)
        else "Without histograms nothing is claimed of single cases.",
    )
    return Section(
        key, title, finding, (chart,), (), tuple(table for table in tables if table.rows), ("method",), notes=notes
    )


def _traffic(analysis: Analysis) -> Section:
    key, title = "traffic", "What a round costs"
    best = analysis.best
    groups = [group for group in analysis.groups if group.mean(sent) is not None]
    if best is None or not groups:
        return Section(key, title, missing="No round is finished.")
    rows = []
    for group in groups:
        up, down, plain, took = (group.mean(value) for value in (sent, received, as_float32, seconds))
        sizes = [mean.value / 1e6 if mean else None for mean in (up, down)]
        ratios = [mean.value / plain.value if mean and plain else None for mean in (up, down)]
        in_all = mean_of(trial.seconds for trial in group.trials if trial.summary)
        rows.append(
            (
                Cell(group.label),
                _epsilon(group),
                *(cell(size, "{:.3f}") for size in sizes),
                *(cell(ratio, "{:.2f}") for ratio in ratios),
                cell(took.value if took else None, "{:.2f}"),
                _error(took),
                cell(in_all.value if in_all else None, "{:.0f}"),
            )
        )
    charts = [_bytes_chart(groups)]
    marks, round_rows = [], []
    for number in best.rounds:
        found = [entry for summary in best.summaries for entry in summary.rounds if entry.round == number]
        took = mean_of(entry.seconds for entry in found)
        if took is not None:
            error = "" if took.error is None else f" ± {took.error:.2f}"
            marks.append(Mark(number, took.value, f"round {number}: {took.value:.2f} s{error}", *took.ends))
            sizes = [fmean(entry.bytes_up for entry in found) / 1e6, fmean(entry.bytes_down for entry in found) / 1e6]
            round_rows.append(
                (
                    Cell(str(number), number),
                    cell(fmean(entry.sites_in for entry in found), "{:g}"),
                    *(cell(size, "{:.3f}") for size in sizes),
                    cell(took.value, "{:.2f}"),
                )
            )
    if marks:
        line = Series("seconds", tuple(marks), 0)
        x = whole_axis("round", [mark.x for mark in marks])
        charts.append(
            Chart(f"Seconds a round: {analysis.where(best)}", x, nice_axis("seconds", extent([line]), least=0), (line,))
        )
    names = (
        "MB sent",
        "MB received",
        "sent ÷ float32",
        "received ÷ float32",
        "seconds",
        "standard error",
        "seconds in all",
    )
    tables = [
        Table("One site and one round", ("setting", "epsilon", *names), tuple(rows)).without_empty(),
        Table(
            f"Rounds: {analysis.where(best)}",
            ("round", "sites in", "MB sent, all sites", "MB received, all sites", "seconds"),
            tuple(round_rows),
        ),
    ]
    notes = [
        "float32 is an update as it is, four bytes a value. Every site, observers too, receives the round's record."
    ]
    if best.mean(as_float32) is None:
        notes.append(f"These results do not say how many values are trained, so that no ratio is shown: {AGAIN}.")
    if any(trial.origin != "site" for trial in analysis.results.trials):
        notes.append(
            "Seconds are those of one machine that plays all sites; in a deployment sites work at the same time."
        )
    columns = ("round", "sites_in", "receivers", "bytes_up", "bytes_down", "values", "seconds")
    return Section(key, title, _traffic_finding(best), tuple(charts), (), tuple(tables), columns, notes=tuple(notes))


def _bytes_chart(groups: Sequence[Group]) -> Chart:
    """What one site sends and receives a round: of one setting in megabytes, of several against float32."""
    settings = list({group.label: group for group in groups}.values())[: 2 * MAX_SERIES]
    if len(settings) > 1 and all(group.mean(as_float32) for group in settings):
        series = []
        for style, (what, value) in enumerate((("sent", sent), ("received", received))):
            marks = []
            for row, group in enumerate(settings):
                size, plain = group.mean(value), group.mean(as_float32)
                if size is not None and plain is not None:
                    ratio = size.value / plain.value
                    tip = f"{group.label}, {what}: {size_text(size.value)}, {ratio:.2f} × float32"
                    marks.append(Mark(ratio, row + 0.3 * style - 0.15, tip))
            series.append(Series(what, tuple(marks), style, line=False, across=True))
        x = nice_axis("bytes of one site and round ÷ bytes as float32", extent(series, across=True), least=0.0)
        size_of_float32 = (Reference(1.0, "as large as float32", upright=True),) if x.high >= 1 else ()
        rows = rows_axis([group.label for group in settings])
        return Chart("Bytes against float32", x, rows, tuple(series), size_of_float32, rows=True)
    bars: list[tuple[str, float, int]] = []
    for group in settings:
        name = f"{group.label}, " if len(settings) > 1 else ""
        for what, value, style in (("as float32", as_float32, 5), ("sent", sent, 0), ("received", received, 1)):
            mean = group.mean(value)
            bars += [(f"{name}{what}", mean.value, style)] if mean is not None else []
    drawn = tuple(
        Series(name, (Mark(size / 1e6, row, f"{name}: {size_text(size)}"),), style, line=False, bars=True, across=True)
        for row, (name, size, style) in enumerate(bars)
    )
    x = nice_axis("MB a site and round", [0.0, *(size / 1e6 for _, size, _ in bars)])
    return Chart("Bytes of one site and round, MB", x, rows_axis([name for name, *_ in bars]), drawn, rows=True)


def _traffic_finding(group: Group) -> str:
    up, down, plain, took = (group.mean(value) for value in (sent, received, as_float32, seconds))
    parts = []
    for verb, mean in (("sends", up), ("receives", down)):
        if mean is not None:
            ratio = f" ({mean.value / plain.value:.2f} × float32)" if plain else ""
            parts.append(f"{verb} {size_text(mean.value)}{ratio}")
    return f"Each round a site {_listed(parts)}" + (f"; a round took {took.value:.1f} s." if took else ".")


def _attacks(analysis: Analysis) -> Section:
    key, title = "attacks", "What an attacker finds"
    views = analysis.results.attacks
    if not views:
        why = (
            "No attack.json in these folders: secfacmic attack runs inversion and membership inference and writes one."
        )
        return Section(key, title, missing=why)
    names = [
        VIEWS.get(view.view, view.view) + ("" if view.epsilon is None else f", ε = {view.epsilon:g}") for view in views
    ]
    charts = [chart for make in (_roc, _membership, _inversion) if (chart := make(views, names)) is not None]
    rows = []
    for view in views:
        member, inversion = view.membership, view.inversion
        found = None if member is None or member.tpr_at_1_fpr is None else 100 * member.tpr_at_1_fpr
        rows.append(
            (
                Cell(VIEWS.get(view.view, view.view)),
                Cell(epsilon_text(view.epsilon), math.inf if view.epsilon is None else view.epsilon),
                cell(member.auc if member else None, "{:.3f}"),
                cell(found),
                cell(100 * inversion.hit_rate if inversion else None),
                cell(100 * inversion.chance if inversion else None),
            )
        )
    columns = (
        "view",
        "epsilon",
        "membership AUC",
        "members found at 1 % false alarms, %",
        "inversion hits, %",
        "chance, %",
    )
    inverted = [(name, view.inversion) for name, view in zip(names, views, strict=True) if view.inversion is not None]
    finding = ""
    if inverted:
        chance = 100 * fmean(one.chance for _, one in inverted)
        hits = [f"{100 * one.hit_rate:.1f} % from the {name}" for name, one in inverted]
        finding = f"Of an attacker's reconstructions, {_listed(hits)} hit a training image; by chance {chance:.1f} %."
    notes = tuple(analysis.results.attack_notes) or (
        "What an attack does not find may still be there: attacks catch wrong builds, and are no estimate of epsilon.",
    )
    tables = (Table("Attacks", columns, tuple(rows)),)
    return Section(key, title, finding, tuple(charts), (), tables, ("attack.json",), notes=notes)


def _roc(views: Sequence[View], names: Sequence[str]) -> Chart | None:
    series = []
    for style, (name, view) in enumerate(zip(names, views, strict=True)):
        if view.membership is not None and view.membership.roc:
            marks = [
                Mark(
                    100 * false,
                    100 * true,
                    f"{name}: {100 * true:.1f} % of members at {100 * false:.1f} % false alarms",
                )
                for false, true in view.membership.roc
            ]
            series.append(Series(name, tuple(marks), style, shown=len(marks) <= 20))
    if not series:
        return None
    ends = (0.0, 100.0, tuple((float(tick), str(tick)) for tick in range(0, 101, 20)))
    x, y = Axis("false positives, %", *ends), Axis("true positives, %", *ends)
    return Chart("Membership inference, ROC: true positives, %", x, y, tuple(series[:MAX_SERIES]), diagonal=True)


def _membership(views: Sequence[View], names: Sequence[str]) -> Chart | None:
    found = [(name, view.membership) for name, view in zip(names, views, strict=True) if view.membership is not None]
    if not found:
        return None
    marks = []
    for row, (name, one) in enumerate(found):
        interval = "" if one.auc_interval is None else f", {one.auc_interval[0]:.3f} to {one.auc_interval[1]:.3f}"
        marks.append(Mark(one.auc, row, f"{name}: AUC {one.auc:.3f}{interval}", *(one.auc_interval or (None, None))))
    series = (Series("AUC and its interval", tuple(marks), 0, line=False, across=True),)
    x = nice_axis("AUC", extent(series, across=True), least=0.5)
    guessing = (Reference(0.5, "guessing: 0.5", upright=True),)
    return Chart("Membership inference, AUC", x, rows_axis([name for name, _ in found]), series, guessing, rows=True)


def _inversion(views: Sequence[View], names: Sequence[str]) -> Chart | None:
    found = [(name, view.inversion) for name, view in zip(names, views, strict=True) if view.inversion is not None]
    if not found:
        return None
    chance = 100 * fmean(one.chance for _, one in found)
    marks = []
    for row, (name, one) in enumerate(found):
        low, high = (100 * one.interval[0], 100 * one.interval[1]) if one.interval else (None, None)
        spread = "" if low is None else f", {low:.1f} to {high:.1f}"
        marks.append(Mark(100 * one.hit_rate, row, f"{name}: {100 * one.hit_rate:.1f} % of {one.n}{spread}", low, high))
    series = (Series("hits and their interval", tuple(marks), 1, line=False, across=True),)
    x = nice_axis(
        "reconstructions nearest to a training image, %", [0.0, chance, *extent(series, across=True)], most=100
    )
    references = (Reference(chance, f"chance: {chance:.1f} %", upright=True),)
    return Chart("Inversion, hits in %", x, rows_axis([name for name, _ in found]), series, references, rows=True)


# --- words and cells ---


def _interval(group: Group, method: str, place: str) -> tuple[float, float] | None:
    found = scores(group.summaries[0], method, place) if group.summaries else None
    ends = (found.intervals or {}).get("balanced_accuracy") if found else None
    return None if ends is None else (100 * ends[0], 100 * ends[1])


def _columns(analysis: Analysis, name: str) -> tuple[str, ...]:
    measured = f"federated.held_out.{name}" if analysis.held_out else f"federated.per_site.SITE.{name}"
    return ("epsilon", "seed", *(analysis.varied if len(analysis.varied) <= 4 else ()), measured)


def _epsilon(group: Group) -> Cell:
    return Cell(epsilon_text(group.epsilon), math.inf if group.epsilon is None else group.epsilon)


def _error(mean: Mean | None) -> Cell:
    return cell(mean.error if mean else None, "{:.2f}")


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def _hidden(count: int) -> list[str]:
    return [f"The chart shows {MAX_SERIES} of {count} settings; the table has all."] if count > MAX_SERIES else []


def _signed(value: float) -> str:
    return f"{value:+z.1f}".replace("-", "−")


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
