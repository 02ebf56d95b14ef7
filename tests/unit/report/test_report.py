"""The report: its numbers are those of the folders, computed here a second time, and it loads nothing."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import ReportError, SecfacmicError, SummaryError
from secure_fed.lab.simulation import Listener, simulate
from secure_fed.operate.site_results import write_results
from secure_fed.report import write_report
from secure_fed.report.chart import nice_axis
from secure_fed.report.page import SHADES, source
from tests.conftest import Federation, make_template, run_round
from tests.report_folders import CLASSES, EPSILONS, METHODS, SITES, VALUES, make_attack, make_sweep, summary

HOSTILE = "</style><script>alert(1)</script>\"' onload=alert(2) ${x} {{ 7*7 }} <img src=http://evil.example/x>"


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.sections: dict[str, str] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self._section = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        self._open.append(tag)
        if tag == "section":
            self._section = found["id"]
        elif tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "script" in self._open or "style" in self._open:
            return
        data = data.replace("\xa0", " ")
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if "caption" in self._open:
            self._caption += data
        elif self._open and self._open[-1] in ("td", "th"):
            self._rows[-1][-1] += data

    def rows(self, caption: str) -> list[dict[str, str]]:
        """A table's rows by the names of its columns."""
        head, *body = self.tables[caption]
        return [dict(zip(head, row, strict=True)) for row in body]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def report(folders: list[Path], tmp_path: Path, **options: Any) -> Page:
    path = tmp_path / "report.html"
    write_report(folders, path, "html", **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Page]:
    folder = tmp_path_factory.mktemp("swept") / "pu"
    lines = make_sweep(folder, failed=1)
    make_attack(folder)
    return folder, lines, report([folder], folder.parent)


def chosen(lines: list[dict[str, Any]], method: str, epsilon: float | None) -> list[dict[str, Any]]:
    """Summaries of one setting."""
    found = [line for line in lines if line["settings"]["method.adapter"] == method]
    return [line["summary"] for line in found if line["settings"]["epsilon"] == epsilon and line["summary"]]


def over_sites(one: dict[str, Any], metric: str = "balanced_accuracy", method: str = "federated") -> float:
    return mean(one["metrics"][method]["per_site"][site][metric] for site in SITES)


def test_the_curve_is_the_mean_over_seeds_with_its_standard_error(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    for caption, value in (
        ("Mean balanced accuracy over the sites, %", over_sites),
        (
            "Balanced accuracy on the held-out site, %",
            lambda one: one["metrics"]["federated"]["held_out"]["balanced_accuracy"],
        ),
    ):
        rows = page.rows(caption)
        assert len(rows) == len(METHODS) * len(EPSILONS)
        for row in rows:
            epsilon = None if row["epsilon"] == "none" else float(row["epsilon"])
            values = [100 * value(one) for one in chosen(lines, row["setting"], epsilon)]
            base = mean(100 * value(one) for one in chosen(lines, row["setting"], None))
            assert row["seeds"] == str(len(values))
            assert row["mean"] == f"{mean(values):.1f}"
            assert row["standard error"] == f"{stdev(values) / math.sqrt(len(values)):.2f}"
            assert row["points lost to privacy"] == ("–" if epsilon is None else f"{base - mean(values):.1f}")


def test_the_untrained_line_is_shown_where_all_settings_share_it(tmp_path: Path) -> None:
    lines = make_sweep(tmp_path / "s", failed=2)
    by_seed = {line["settings"]["seed"]: line["summary"] for line in lines if line["summary"]}
    zero = mean(100 * over_sites(one, method="zero_shot") for one in by_seed.values())
    line = f"zero-shot, untrained: {zero:.1f} %"
    assert line in report([tmp_path / "s"], tmp_path).sections["utility"]
    last = next(line["summary"] for line in reversed(lines) if line["summary"])
    last["metrics"]["zero_shot"]["per_site"]["north"]["balanced_accuracy"] /= 2  # as of other images
    (tmp_path / "s" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (held_out,) = set(re.findall("zero-shot, untrained: .*? %", report([tmp_path / "s"], tmp_path).sections["utility"]))
    assert held_out != line


def test_what_a_setting_does_is_shown_for_the_held_out_site_too(tmp_path: Path) -> None:
    lines = make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(None,), seeds=2)
    more: list[dict[str, Any]] = []
    for line in lines:
        more.append(copy.deepcopy(line) | {"trial": f"{len(more):016x}"})
        more[-1]["settings"]["simulation.phantoms.observer.scanner"] = 3
        more.append(copy.deepcopy(line) | {"trial": f"{len(more):016x}"})
        more[-1]["settings"]["simulation.phantoms.observer.scanner"] = 9
        more[-1]["summary"]["metrics"]["federated"]["held_out"]["balanced_accuracy"] = 0.25
    (tmp_path / "s" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    about = json.loads((tmp_path / "s" / "sweep.json").read_text())
    about["trials"] = [{"trial": line["trial"], "settings": line["settings"]} for line in more]
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(about))
    page = report([tmp_path / "s"], tmp_path)
    values = {
        row["value"]: row["mean"] for row in page.rows("Balanced accuracy on the held-out site against scanner, %")
    }
    before = mean(100 * line["summary"]["metrics"]["federated"]["held_out"]["balanced_accuracy"] for line in lines)
    assert values == {"3": f"{before:.1f}", "9": "25.0"}
    ours = [row["mean"] for row in page.rows("Mean balanced accuracy over the sites against scanner, %")]
    assert len(ours) == 2
    assert len(set(ours)) == 1


def test_marks_say_what_they_show(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    tips = [attrs["aria-label"] for tag, attrs in page.elements if tag == "g" and "mark" in attrs.get("class", "")]
    values = [100 * over_sites(one) for one in chosen(lines, "facmic", 3.0)]
    error = stdev(values) / math.sqrt(len(values))
    assert f"facmic, simulated epsilon 3: {mean(values):.1f} % ± {error:.1f} (3 seeds)" in tips
    assert "plain update: 61.0 % of 120, 55.0 to 67.0" in tips


def test_who_pays(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    (method,) = {row["setting"] for row in page.rows("One site and one round")} & {"text_head"}  # the recommended one
    falls = []
    for row in page.rows("Recall, %"):
        place, _, name = row["site, class"].partition(", ")
        epsilon = None if row["epsilon"] == "none" else float(row["epsilon"])
        index = CLASSES.index(name)
        found = []
        for one in chosen(lines, method, epsilon):
            federated = one["metrics"]["federated"]
            matrix = (federated["held_out"] if place == "held out" else federated["per_site"][place])[
                "confusion_matrix"
            ]
            found.append(100 * matrix[index][index] / sum(matrix[index]))
        assert row["mean"] == f"{mean(found):.1f}"
        falls.append((row["site, class"], epsilon, mean(found)))
    before = {name: value for name, epsilon, value in falls if epsilon is None}
    worst, value = min(
        ((name, value) for name, epsilon, value in falls if epsilon == 1.0), key=lambda one: one[1] - before[one[0]]
    )
    place, _, name = worst.partition(", ")
    expected = f"{name} at {place} pays most: recall falls from {before[worst]:.1f} % without privacy to {value:.1f} %"
    assert expected in page.sections["fairness"]


def test_bytes_against_float32(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    for row in page.rows("One site and one round"):
        epsilon = None if row["epsilon"] == "none" else float(row["epsilon"])
        summaries = chosen(lines, row["setting"], epsilon)
        rounds = [entry for one in summaries for entry in one["rounds"]]
        up = mean(entry["bytes_up"] / 4 for entry in rounds)
        down = mean(entry["bytes_down"] / 5 for entry in rounds)  # four train, one observes
        assert row["sent ÷ float32"] == f"{up / (4 * VALUES[row['setting']]):.2f}"
        assert row["received ÷ float32"] == f"{down / (4 * VALUES[row['setting']]):.2f}"
        assert row["MB sent"] == f"{up / 1e6:.3f}"
        assert row["seconds"] == f"{mean(mean(entry['seconds'] for entry in one['rounds']) for one in summaries):.2f}"


def test_confusion_matrices_are_sums_over_seeds(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    caption = next(name for name in page.tables if name.startswith("Held out: text_head, without privacy"))
    expected = [[0] * 4 for _ in CLASSES]
    for one in chosen(lines, "text_head", None):
        for true, row in enumerate(one["metrics"]["federated"]["held_out"]["confusion_matrix"]):
            for predicted, count in enumerate(row):
                expected[true][predicted] += count
    assert [row[1:] for row in page.tables[caption][1:]] == [[str(count) for count in row] for row in expected]


def test_the_recommended_setting_is_the_cheapest_within_one_standard_error(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    rows = page.rows("The cheapest setting within one standard error of the best")
    assert [row["epsilon"] for row in rows] == ["1", "3", "8", "none"]
    best_of_all = []
    for row, epsilon in zip(rows, EPSILONS, strict=True):
        found = {method: [over_sites(one) for one in chosen(lines, method, epsilon)] for method in METHODS}
        best = max(METHODS, key=lambda method: mean(found[method]))
        least = mean(found[best]) - stdev(found[best]) / math.sqrt(len(found[best]))
        near = [method for method in METHODS if mean(found[method]) >= least]
        cheapest = min(near, key=lambda method: VALUES[method])  # bytes grow with the values
        assert row["setting"] == cheapest
        assert row["at sites, %"] == f"{100 * mean(found[cheapest]):.1f}"
        best_of_all.append((epsilon, mean(found[best]), stdev(found[best]) / math.sqrt(len(found[best])), cheapest))
    top = max((one for one in best_of_all if one[0] is not None), key=lambda one: one[1])
    epsilon, *_, setting = next(one for one in best_of_all if one[1] >= top[1] - top[2])
    assert f"Take {setting} at simulated epsilon {epsilon:g}: it reaches" in page.sections[""]
    words = page.sections["recommended"]
    assert f"With a privacy budget of epsilon = {epsilon:g} and delta = 1e-05 at each site" in words
    assert page.text.rindex("<section") == page.text.index('<section id="recommended"')  # the report ends with it


def test_the_caveat_and_the_label(swept: tuple[Path, list[Any], Page]) -> None:
    page = swept[2]
    assert "for choosing on public or simulated data" in page.sections[""]
    assert "on patients' data every trial would be a release and spend budget" in page.sections[""]
    charts = [
        attrs["aria-label"]
        for tag, attrs in page.elements
        if "aria-label" in attrs and "epsilon" in attrs["aria-label"]
    ]
    assert charts
    assert all("simulated epsilon" in label for label in charts)
    assert "Simulated (simulated data): Everything that leaves site north is (8, 1e-05)" in page.sections["claim"]


def test_attacks(swept: tuple[Path, list[Any], Page], tmp_path: Path) -> None:
    content = make_attack(tmp_path)
    rows = swept[2].rows("Attacks")
    assert [row["epsilon"] for row in rows] == ["none", "none", "none", "3"]
    for row, view in zip(rows, content["views"], strict=True):
        assert row["membership AUC"] == f"{view['membership']['auc']:.3f}"
        assert row["inversion hits, %"] == f"{100 * view['inversion']['hit_rate']:.1f}"
        assert row["members found at 1 % false alarms, %"] == f"{100 * view['membership']['tpr_at_1_fpr']:.1f}"
    alone = report([tmp_path], tmp_path)
    assert alone.rows("Attacks") == rows
    assert list(alone.sections) == ["", "attacks"]
    again = f"secfacmic attack TEMPLATE.toml --data DATA --shadows 16 --epsilon 3 --delta 1e-05 --out {tmp_path.name}"
    assert again in alone.sections["attacks"]


def test_trials_are_listed_the_failed_ones_too(swept: tuple[Path, list[Any], Page]) -> None:
    _, lines, page = swept
    rows = page.rows("Trials")
    assert len(rows) == len(lines) == 36
    assert [row["status"] for row in rows] == ["failed: no space left <on> device"] + ["done"] * 35
    last = lines[-1]["summary"]
    assert rows[-1]["at sites, %"] == f"{100 * over_sites(last):.1f}"
    assert (rows[-1]["adapter"], rows[-1]["epsilon"], rows[-1]["seed"]) == ("facmic", "none", "2")
    assert "36 trials, 1 of them failed" in page.sections["trials"]


def test_the_page_loads_nothing_and_allows_nothing(swept: tuple[Path, list[Any], Page]) -> None:
    page = swept[2]
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "image", "use")
        assert not {"src", "style", "srcset", "xlink:href", "action"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
    assert not re.search(r"https?:|//\w|url\(|@import|fetch\(|XMLHttp|WebSocket|eval\(", page.text)
    assert page.count("script") == page.count("style") == 1
    policy = next(
        attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


def test_every_figure_has_a_table_a_name_and_a_way_to_make_it_again(swept: tuple[Path, list[Any], Page]) -> None:
    page = swept[2]
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    charts = [attrs for tag, attrs in page.elements if tag == "svg" and attrs["class"] == "chart"]
    assert len(charts) >= 12
    assert all(attrs["role"] == "group" and attrs["aria-labelledby"] in identifiers for attrs in charts)
    marks = [attrs for tag, attrs in page.elements if tag == "g" and "mark" in attrs.get("class", "")]
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in marks)
    assert sum(attrs["tabindex"] == "0" for attrs in marks) == len(charts)  # one stop a chart
    figures = ["utility", "comparison", "fairness", "learning", "confusion", "traffic", "attacks"]
    for key in figures:
        again = "secfacmic attack TEMPLATE.toml" if key == "attacks" else "secfacmic sweep privacy_utility --out pu"
        assert again in page.sections[key]
        assert "The numbers as a table" in page.sections[key]
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(headings))


def test_csv_has_a_row_a_trial_and_a_row_a_round(swept: tuple[Path, list[Any], Page], tmp_path: Path) -> None:
    folder, lines, page = swept
    write_report([folder], tmp_path / "r.csv", "csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    trials = [row for row in rows if not row["round"]]
    assert len(trials) == 36
    assert len(rows) == 36 + 35 * 10
    for row, line in zip(trials, lines, strict=True):
        assert (row["trial"], row["status"]) == (line["trial"], line["status"])
        if line["summary"]:
            held_out = line["summary"]["metrics"]["federated"]["held_out"]
            assert float(row["federated.held_out.balanced_accuracy"]) == held_out["balanced_accuracy"]
            assert (
                int(row["federated.per_site.west.confusion_matrix.3.0"])
                == (line["summary"]["metrics"]["federated"]["per_site"]["west"]["confusion_matrix"][3][0])
            )
    assert [int(row["bytes_up"]) for row in rows if row["trial"] == lines[1]["trial"] and row["round"]] == [
        entry["bytes_up"] for entry in lines[1]["summary"]["rounds"]
    ]
    # Every column that the page names for a figure is there.
    named = re.findall(r"<code>([a-zA-Z_.0-9]+)</code>", page.text)
    for name in set(named) - {"attack.json"}:
        pattern = re.sub("SITE", r"\\w+", re.sub(r"\bTRUE\b|\bPREDICTED\b", r"\\d+", name.replace(".", r"\.")))
        pattern = pattern.replace("METRIC", r"\w+").replace("METHOD", r"\w+")
        columns = [column for column in rows[0] if re.fullmatch(f"(setting\\.)?{pattern}", column)]
        assert columns, name


def test_facts_of_a_sweep_are_not_those_that_it_changes(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", methods=("facmic",), seeds=1)
    facts = json.loads((tmp_path / "s" / "sweep.json").read_text())
    write_report([tmp_path / "s"], tmp_path / "r.md", "md")
    text = (tmp_path / "r.md").read_text()
    for name in (*facts["axes"], *facts["fixed"]):
        last = name.rsplit(".", 1)[-1]
        assert text.count(f"\n- {last.capitalize()}: ") == 0, name
        assert f"{last} " not in text.partition("\n- Method: ")[2].partition("\n")[0], name


def test_markdown_and_picture_show_the_same(swept: tuple[Path, list[Any], Page], tmp_path: Path) -> None:
    folder, _, page = swept
    write_report([folder], tmp_path / "r.md", "md")
    text = (tmp_path / "r.md").read_text()
    for row in page.rows("Mean balanced accuracy over the sites, %"):
        escaped = row["setting"].replace("_", r"\_")
        assert f"| {escaped} | {row['epsilon']} | {row['seeds']} | {row['mean']} | {row['standard error']} |" in text
    assert "<" not in re.sub(r"\\<", "", text)
    write_report([folder], tmp_path / "r.png", "png")
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 100  # not blank


def test_the_same_folders_give_the_same_bytes(swept: tuple[Path, list[Any], Page], tmp_path: Path) -> None:
    assert report([swept[0]], tmp_path).text == swept[2].text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    make_sweep(folder, methods=("facmic", "low_rank"), epsilons=(1.0, None), seeds=2, failed=1)
    facts = json.loads((folder / "sweep.json").read_text())
    for key in ("name", "title", "study", "command"):
        facts[key] = f"{key} {HOSTILE}"
    facts["facts"]["classes"] = [f"{name} {HOSTILE}" for name in CLASSES]
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for line, asked in zip(lines, facts["trials"], strict=True):
        line["trial"] = asked["trial"] = f"=1+1 {HOSTILE} {asked['trial']}"
        setting = f"{line['settings']['method.adapter']} {HOSTILE}"
        line["settings"]["method.adapter"] = asked["settings"]["method.adapter"] = setting
        line["error"] = line["error"] and HOSTILE
        if line["summary"]:
            line["summary"]["sites"] = [f"{site} {HOSTILE}" for site in SITES]
            for result in line["summary"]["metrics"].values():
                result["per_site"] = {f"{site} {HOSTILE}": found for site, found in result["per_site"].items()}
    (folder / "sweep.json").write_text(json.dumps(facts))
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attack = make_attack(folder)
    attack["views"][0]["view"] = HOSTILE
    (folder / "attack.json").write_text(json.dumps(attack))
    page = report([folder], tmp_path)
    test_the_page_loads_nothing_and_allows_nothing((folder, lines, _without_words(page)))
    assert page.count("img") == 0
    assert page.text.count("<script") == 1
    assert HOSTILE in page.sections["trials"]
    assert HOSTILE in page.sections["attacks"]
    assert "49" not in page.rows("Trials")[0]["trial"]
    for form in ("md", "csv", "png"):
        write_report([folder], tmp_path / f"r.{form}", form)  # type: ignore[arg-type]
    markdown = (tmp_path / "r.md").read_text()
    assert not re.search(r"(?<!\\)<(script|img|/style)", re.sub(r"(?m)^    .*$", "", markdown))
    cells = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert cells[0]["trial"].startswith("'=1+1")


def _without_words(page: Page) -> Page:
    """The page without the hostile text itself, escaped as it is, which names an address."""
    page.text = page.text.replace("http://evil.example/x", "")
    return page


def test_results_of_older_versions_show_what_they_have(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    lines = make_sweep(folder, methods=("facmic",), epsilons=(1.0, None), seeds=2)
    for line in lines:
        one = line["summary"]
        del one["kind"], one["format"], one["device"], one["values"], one["observers"]
        for entry in one["rounds"]:
            del entry["validation"], entry["val_balanced_accuracy"]
        for result in one["metrics"].values():
            for found in [*result["per_site"].values(), result["held_out"]]:
                for key in set(found) - {"balanced_accuracy", "accuracy", "macro_f1", "auroc"}:
                    del found[key]
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = json.loads((folder / "sweep.json").read_text())
    del facts["facts"]["observers"]
    (folder / "sweep.json").write_text(json.dumps(facts))
    page = report([folder], tmp_path)
    assert "hold no confusion matrices" in page.sections["confusion"]
    assert "recall by class is not shown" in page.sections["fairness"]
    assert "send no validation counts: each would have to be paid for" in page.sections["learning"]
    assert "do not say how many values are trained" in page.sections["traffic"]
    assert "sent ÷ float32" not in page.sections["traffic"]
    assert "secfacmic attack" in page.sections["attacks"]


def test_a_setting_that_is_worse_than_no_training_is_not_recommended(tmp_path: Path) -> None:
    lines = make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(1.0,), seeds=2)
    for line in lines:
        for found in line["summary"]["metrics"]["zero_shot"]["per_site"].values():
            found["balanced_accuracy"] = 0.97
    (tmp_path / "s" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reached = mean(100 * over_sites(line["summary"]) for line in lines)
    page = report([tmp_path / "s"], tmp_path)
    assert "Do not train facmic at simulated epsilon 1" in page.sections[""]
    assert f"{97 - reached:.1f} points below the untrained zero-shot model (97.0 %)" in page.sections["recommended"]


def test_a_line_cut_short_and_trials_to_come(tmp_path: Path) -> None:
    lines = make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(1.0,), seeds=3)
    whole = (tmp_path / "s" / "trials.jsonl").read_text()
    (tmp_path / "s" / "trials.jsonl").write_text(whole[: -len(json.dumps(lines[-1])) // 2])
    page = report([tmp_path / "s"], tmp_path)
    assert len(page.rows("Trials")) == 2
    assert "1 trial of sweep privacy-utility did not run yet" in page.sections[""]


def test_a_sweep_without_a_finished_trial(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(1.0,), seeds=2, failed=2)
    page = report([tmp_path / "s"], tmp_path)
    assert "No trial was finished" in page.sections[""]
    assert len(page.rows("Trials")) == 2
    for form in ("md", "csv", "png"):
        write_report([tmp_path / "s"], tmp_path / f"r.{form}", form)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "out"
    quiet = Listener(encoding=lambda site, done, total: None, round=lambda facts: None, stage=lambda text: None)
    simulate(make_template(), out, images, quiet)
    return out


def test_a_simulated_study(simulated: Path, tmp_path: Path) -> None:
    found = json.loads((simulated / "summary.json").read_text())
    result = CliRunner().invoke(app, ["report", str(simulated)])
    assert result.exit_code == 0, result.output
    page = Page((simulated / "report.html").read_text())
    (simulated / "report.html").unlink()
    federated = [found["metrics"]["federated"]["per_site"][site]["balanced_accuracy"] for site in found["sites"]]
    assert f"{100 * mean(federated):.1f} %" in page.sections[""]
    rows = {(row["site"], row["method"]): row for row in page.rows("Metrics in percent: facmic, without privacy")}
    for site in found["sites"]:
        expected = found["metrics"]["zero_shot"]["per_site"][site]
        assert rows[site, "zero-shot"]["accuracy"] == f"{100 * expected['accuracy']:.1f}"
    rounds = page.rows("Rounds: facmic, without privacy")
    assert [row["MB sent, all sites"] for row in rounds] == [
        f"{entry['bytes_up'] / 1e6:.3f}" for entry in found["rounds"]
    ]
    ratio = found["rounds"][0]["bytes_up"] / 3 / (4 * found["values"])
    assert f"{ratio:.2f} × float32" in page.sections["traffic"]
    assert "secfacmic simulate TEMPLATE.toml --seed 3 --mode he --data DATA --out out" in page.sections["traffic"]
    assert found["study_id"] in page.sections["facts"]
    assert "No trial has a privacy budget" in page.sections["utility"]


def test_single_runs_are_compared_like_a_sweep(simulated: Path, tmp_path: Path) -> None:
    """Two runs of one study with other seeds are one setting with two seeds; a private third is compared with them."""
    folders = []
    for number, (seed, epsilon) in enumerate(((3, None), (3, None), (3, 2.0), (3, 2.0))):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        for name in ("study.toml", "study.safetensors"):
            (folder / name).write_bytes((simulated / name).read_bytes())
        content = summary("facmic", epsilon, number)
        (folder / "summary.json").write_text(json.dumps(content | {"seed": seed}))
        folders.append(folder)
    page = report(folders, tmp_path)
    rows = page.rows("Mean balanced accuracy over the sites, %")
    assert [(row["epsilon"], row["seeds"]) for row in rows] == [("2", "2"), ("none", "2")]
    values = [100 * over_sites(summary("facmic", 2.0, number)) for number in (2, 3)]
    assert rows[0]["mean"] == f"{mean(values):.1f}"
    assert "epsilon = 2 and delta = 1e-05" in page.sections["recommended"]


def site_folder(federation: Federation, kind: str, privacy: str = "") -> Path:
    """A site's folder as a deployment leaves it after two rounds."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    run_round(coordinator, sites)
    folder = federation.folder / "sites" / "ash"
    metrics = {"balanced_accuracy": 0.8123, "accuracy": 0.8, "macro_f1": 0.79, "auroc": 0.9}
    content = {
        "kind": "site",
        "format": 2,
        "study_id": federation.agreed.study.id,
        "site": "ash",
        "run": sites[0].run,
        "round": 1,
        "rounds": 3,
        "adapter_digest": "ab" * 32,
        "validations": {"1": 0.7654},
        "metrics": {"zero_shot": metrics | {"balanced_accuracy": 0.4321}, "federated": metrics},
    }
    (folder / "state" / "summary.json").write_text(json.dumps(content))
    text = (folder / "site.toml").read_text().replace('kind = "simulated"', f'kind = "{kind}"')
    (folder / "site.toml").write_text(text + privacy)
    return folder


@pytest.mark.parametrize("inner", ["", "state"])
def test_a_site_of_a_deployment(federation: Federation, tmp_path: Path, inner: str) -> None:
    folder = site_folder(federation, "patients")
    page = report([folder / inner], tmp_path)
    assert "keep it on the site's disk" in page.sections[""]
    rows = {row["method"]: row["balanced accuracy"] for row in page.rows("Metrics in percent: facmic, without privacy")}
    assert rows == {"federated": "81.2", "zero-shot": "43.2"}
    (row,) = page.rows("Rounds: facmic, without privacy")
    (entry,) = [one for one in federation.reopen().rounds if one.header.round == 1]
    assert row["MB sent, all sites"] == f"{entry.bytes_up / 1e6:.3f}"
    assert row["MB received, all sites"] == f"{4 * entry.size / 1e6:.3f}"
    assert "1 of 3" in page.sections["facts"]
    assert "76.5" in page.sections["learning"]
    assert "simulated" not in page.sections[""]
    assert "recommended" not in page.sections
    assert "81.2 % at ash" in page.sections[""]
    assert "mean over" not in page.sections[""]
    assert "Without privacy: 76.5 % in round 1." in page.sections["learning"]
    assert "Correct validation images of all sites" not in page.text  # of one round there is no curve
    assert "held_out" not in page.text
    assert "nothing bounds what the finished adapter tells about a patient" in page.sections["claim"]


def test_a_sites_page_shows_its_rounds_as_a_curve(federation: Federation, tmp_path: Path) -> None:
    """Each round as the site noted it, also the rounds before it was started again."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    expected = {}
    for _ in range(2):
        run_round(coordinator, sites)
        site = federation.site("ash")
        site.respond(coordinator.request(site.name, site.run, site.position))
        write_results(Path(file.state), federation.agreed, site)
        counts = site.replica.state.validation
        assert counts is not None
        expected[str(site.round)] = counts.correct / counts.images
    assert json.loads((Path(file.state) / "summary.json").read_text())["validations"] == expected
    assert expected.keys() == {"1", "2"}
    page = report([federation.folder / "sites/ash"], tmp_path)
    shares = [f"{100 * share:.1f}" for share in expected.values()]
    assert [(row["round"], row["mean"]) for row in page.rows("Validation, %")] == list(zip("12", shares, strict=True))
    assert f"from {shares[0]} % in round 1 to {shares[1]} % in round 2" in page.sections["learning"]
    assert "Correct validation images of all sites" in page.text


def test_what_another_run_noted_is_no_part_of_the_curve(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    site = federation.site("ash")
    site.respond(coordinator.request(site.name, site.run, site.position))
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    for left in ('{"run": "another", "validations": {"7": 0.5}}', '{"run": "' + site.run + '"}', "[]", "half of a fi"):
        (Path(file.state) / "summary.json").write_text(left)
        write_results(Path(file.state), federation.agreed, site)
        assert list(json.loads((Path(file.state) / "summary.json").read_text())["validations"]) == ["1"]


def test_a_site_is_no_part_of_a_mean_over_sites(federation: Federation, tmp_path: Path) -> None:
    """Beside a sweep a site is a trial of its own, and what the sweep says of itself stays as it is."""
    make_sweep(tmp_path / "s", methods=("facmic",), seeds=2)
    alone = report([tmp_path / "s"], tmp_path)
    page = report([tmp_path / "s", site_folder(federation, "simulated")], tmp_path)
    caption = "Mean balanced accuracy over the sites, %"
    assert page.rows(caption) == alone.rows(caption)
    for key in ("comparison", "fairness", "confusion"):
        assert "Held out" in page.sections[key] or "held out" in page.sections[key], key
        assert "ash" not in page.sections[key].replace("dashed", ""), key
    (row,) = [row for row in page.rows("Trials") if row["trial"] == "ash"]
    assert row["at sites, %"] == "–"


def test_several_sites_are_told_apart(federation: Federation, tmp_path: Path) -> None:
    ash = site_folder(federation, "simulated")
    birch = federation.folder / "sites" / "birch"
    content = json.loads((ash / "state" / "summary.json").read_text()) | {"site": "birch"}
    content["metrics"]["federated"]["balanced_accuracy"] = 0.7
    (birch / "state" / "summary.json").write_text(json.dumps(content))
    page = report([ash, birch], tmp_path)
    rows = {row["trial"]: (row["setting"], row["at sites, %"]) for row in page.rows("Trials")}
    assert rows == {"ash": ("site ash", "81.2"), "birch": ("site birch", "70.0")}
    assert "mean balanced accuracy" not in page.text.lower()


def test_what_no_budget_paid_for_is_left_out(federation: Federation, tmp_path: Path) -> None:
    folder = site_folder(federation, "patients", "\n[privacy]\nepsilon = 3.0\ndelta = 1e-5\nn_ref = 10\n")
    for form in ("html", "md", "csv"):
        write_report([folder], tmp_path / "r", form)
        text = (tmp_path / "r").read_text()
        for value in ("81.2", "0.8123", "43.2", "0.4321", "76.5", "0.7654"):
            assert value not in text, (form, value)
    page = report([folder], tmp_path)
    assert "keep it on the site's disk" not in page.sections[""]
    for key in ("comparison", "fairness", "learning", "confusion", "utility"):
        assert "the budget paid for the updates alone" in page.sections[key]
    assert page.rows("Rounds: facmic, epsilon 3")  # what the journal says is everybody's
    assert "epsilon 3, delta 1e-05: no ledger yet, nothing is spent" in page.sections["facts"]
    assert "trains without differential privacy" not in page.text
    assert "claim" not in page.sections
    shown = report([folder], tmp_path, local_metrics=True)
    assert "81.2" in shown.sections["comparison"]
    assert "keep it on the site's disk" in shown.sections[""]


def test_public_data_at_a_site_are_not_withheld(federation: Federation, tmp_path: Path) -> None:
    folder = site_folder(federation, "public", "\n[privacy]\nepsilon = 3.0\ndelta = 1e-5\nn_ref = 10\n")
    page = report([folder], tmp_path)
    assert "81.2" in page.sections["comparison"]
    assert "keep it on the site's disk" not in page.sections[""]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("attack.json", "[]"),
        ("attack.json", '{"views": 3}'),
        ("attack.json", '{"views": [{"view": "x", "inversion": {"hit_rate": "much"}}]}'),
        ("attack.json", "{"),
        ("sweep.json", "[]"),
        ("sweep.json", "{}"),
        ("sweep.json", '{"format": 1}'),
        ("trials.jsonl", "[]\n"),
        ("trials.jsonl", "{}\n"),
        ("trials.jsonl", "nonsense\n"),
    ],
)
def test_malformed_folders_are_refused_and_nothing_is_written(tmp_path: Path, name: str, content: str) -> None:
    make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(1.0,), seeds=1)
    (tmp_path / "s" / name).write_text(content)
    with pytest.raises(SecfacmicError):
        write_report([tmp_path / "s"], tmp_path / "report.html", "html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "broken",
    [
        {"rounds": [{"round": 0}]},
        {"rounds": 3},
        {"metrics": {"federated": {"per_site": 4}}},
        {"metrics": {"federated": {"per_site": {"north": {"confusion_matrix": [[1], [2]], "intervals": 4}}}}},
        {"metrics": {}},
        {"metrics": []},
        {"sites": 4},
        {"values": -1},
        {"privacy": {"north": 3}},
        {"format": 3},
        {"kind": "site"},
    ],
)
def test_malformed_summaries_are_refused_with_their_line_and_field(tmp_path: Path, broken: dict[str, Any]) -> None:
    lines = make_sweep(tmp_path / "s", methods=("facmic",), epsilons=(1.0, None), seeds=1)
    lines[0]["summary"] |= broken
    (tmp_path / "s" / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SummaryError, match=r"trials\.jsonl, line 1, summary: ") as refused:
        write_report([tmp_path / "s"], tmp_path / "report.html", "html")
    assert next(iter(broken)) in str(refused.value)
    assert not (tmp_path / "report.html").exists()


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    runner = CliRunner()
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ReportError):
            write_report([folder], tmp_path / "r.html", "html")
    assert runner.invoke(app, ["report", str(tmp_path), "--format", "pdf"]).exit_code == 2
    assert list(tmp_path.iterdir()) == []


# --- style ---


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of a colour as #rrggbb."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_aa_by_day_and_by_night(swept: tuple[Path, list[Any], Page]) -> None:
    style = source("report.css")
    blocks = re.findall(r":root\{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    shades = re.findall(r"\.w(\d+)\{background:(#\w{6})\}", swept[2].text)
    assert len(shades) == 2 * SHADES
    colours: dict[str, str] = {}
    for mode, block in enumerate(blocks):
        colours |= dict(re.findall(r"--(\w[\w-]*):(#[0-9a-f]{6})", block))
        for surface in ("page", "card"):
            for text in ("ink", "muted", "link"):
                assert contrast(colours[text], colours[surface]) >= 4.5, (mode, text, surface)
            for index in range(8):
                assert contrast(colours[f"s{index}"], colours[surface]) >= 3, (mode, index)
            assert contrast(colours["focus"], colours[surface]) >= 3
        assert contrast(colours["ink"], colours["soft"]) >= 4.5
        assert contrast(colours["ink"], colours["warn-page"]) >= 4.5
        assert contrast(colours["warn"], colours["warn-page"]) >= 4.5
        for _, shade in shades[mode * SHADES : (mode + 1) * SHADES]:
            assert contrast(colours["ink"], shade) >= 4.5, (mode, shade)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=6))
def test_axes_hold_their_values_and_few_ticks(values: list[float]) -> None:
    axis = nice_axis("y", values)
    ticks = [value for value, _ in axis.ticks]
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert all(abs(float(text) - value) <= slack for value, text in axis.ticks)
