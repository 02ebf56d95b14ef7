"""The page of ``data check`` in a real browser: it fits screen and paper, loads nothing and shows its pictures.

Run with ``make test-browser``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_fed.clients.rules import Rules
from secure_fed.report.data_page import write_data_page
from tests.integration.test_report_browser import SIZES, Browser
from tests.unit.report.test_data_page import checked, files

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(10):
        grey = rng.integers(0, 256, (90, 60 + 40 * number), dtype=np.uint8)
        Image.fromarray(grey).save(found / f"a-long-name-of-a-picture-{number}.png")
    report = checked(found)
    names = [str(path) for path in sorted(found.glob("*.png"))]
    report["odd"]["blank"] = files(*names, count=31)
    report["odd"]["unlike"] = files(*names[:3])
    report["scanners"] = {f"Acme <X> Magnetic Resonance Tomograph {number}": 3 * number for number in range(12)}
    write_data_page(report, Rules(), found, found / "page.html")
    return found


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    found = Browser(folder / "page.html")
    yield found
    found.driver.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_page_scrolls_sideways_and_letters_can_be_read(browser: Browser, size: str, scheme: str) -> None:
    browser.open(size, scheme=scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= SIZES[size][0]
    wider = browser.ask(
        "[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll, svg'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wider == []
    sizes = browser.ask("[...document.querySelectorAll('main *')].map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 10


def test_the_contact_sheet_shows_whole_pictures_side_by_side(browser: Browser) -> None:
    browser.open()
    boxes = browser.ask(
        "[...document.querySelectorAll('#odd img')].map(e => [e.naturalWidth, getComputedStyle(e).objectFit,"
        " e.getBoundingClientRect().top, e.alt])"
    )
    assert len(boxes) == 13
    for width, fit, _, alt in boxes:
        assert width > 0
        assert fit == "contain"
        assert alt
    assert len({top for *_, top, _ in boxes}) < len(boxes) / 2


def test_paper_is_light_and_has_every_picture_on_it(browser: Browser) -> None:
    browser.open(scheme="dark", media="print")
    colour = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]] >= [240.0] * 3
    assert not browser.find("nav").is_displayed()
    assert all(image.is_displayed() for image in browser.all("#odd img"))
    assert all(table.is_displayed() for table in browser.all("main table"))
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(pdf["data"]) > 50_000


def test_nothing_is_fetched_and_nothing_fails(browser: Browser, folder: Path) -> None:
    browser.driver.get_log("browser")
    browser.driver.get_log("performance")
    browser.open()
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requested = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in requested if not url.startswith("data:")} == {(folder / "page.html").as_uri()}


def test_screen_readers_find_names(browser: Browser) -> None:
    browser.open()
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [
        (node.get("role", {}).get("value"), node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    ]
    for role in ("img", "image", "table", "link", "region", "navigation"):
        assert all(name.strip() for found, name in roles if found == role), role
    assert next(name for role, name in roles if role == "heading") == "ash"
