"""The report in a real browser, with real clicks and keys; without Chromium these tests fail.

Run with ``make test-browser``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from secure_fed.report import write_report
from tests.report_folders import make_attack, make_sweep

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


class Browser:
    """Headless Chromium on one page."""

    def __init__(self, page: Path) -> None:
        assert CHROMIUM.exists(), f"{CHROMIUM}: expected Chromium; on Debian: apt-get install chromium chromium-driver"
        options = Options()
        options.binary_location = str(CHROMIUM)
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
        self.page = page

    def open(self, size: str = "desk", *, scheme: str = "light", media: str = "", scripts: bool = True) -> None:
        width, height = SIZES[size]
        self.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.get(self.page.as_uri())

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def ask(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.driver, 20).until(lambda _: condition())

    def column(self, name: str) -> list[str]:
        """Shown cells of the trials' table."""
        heads = [head.text.strip() for head in self.all("#trials th")]
        index = next(index for index, head in enumerate(heads) if head.rstrip(" ↑↓") == name)
        return self.ask(
            "[...document.querySelectorAll('#trials tbody tr')].filter(row => row.offsetParent !== null)"
            ".map(row => row.cells[arguments[0]].textContent)",
            index,
        )

    def head(self, name: str) -> WebElement:
        return next(one for one in self.all("#trials th button") if one.text.strip() == name)

    def focused(self) -> str:
        return str(self.ask("document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("browser") / "pu"
    make_sweep(found, failed=2)
    make_attack(found)
    write_report([found], found / "report.html", "html")
    return found


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    found = Browser(folder / "report.html")
    yield found
    found.driver.quit()


def test_sort_by_clicks(browser: Browser) -> None:
    browser.open()
    browser.head("at sites, %").click()
    shown = [float(text) for text in browser.column("at sites, %") if text != "–"]
    assert shown == sorted(shown)
    assert browser.find("#trials th[aria-sort]").get_attribute("aria-sort") == "ascending"
    browser.head("at sites, %").click()
    shown = [float(text) for text in browser.column("at sites, %") if text != "–"]
    assert shown == sorted(shown, reverse=True)
    browser.head("epsilon").click()
    order = browser.column("epsilon")
    assert order == ["1"] * 9 + ["3"] * 9 + ["8"] * 9 + ["none"] * 9
    assert len(browser.all("#trials th[aria-sort]")) == 1


def test_sort_by_keys(browser: Browser) -> None:
    browser.open()
    browser.ask("arguments[0].focus()", browser.head("adapter"))
    browser.press(Keys.ENTER)
    assert browser.column("adapter") == sorted(browser.column("adapter"))
    browser.press(Keys.SPACE)
    assert browser.column("adapter") == sorted(browser.column("adapter"), reverse=True)


def test_filter(browser: Browser) -> None:
    browser.open()
    assert browser.find("#shown").text == "36 of 36 trials shown"
    selects = {select.get_attribute("data-column"): Select(select) for select in browser.all(".filters select")}
    assert len(selects) == 2
    by_method, by_epsilon = selects.values()
    by_method.select_by_value("facmic")
    assert set(browser.column("adapter")) == {"facmic"}
    by_epsilon.select_by_value("none")
    assert browser.find("#shown").text == "3 of 36 trials shown"
    assert browser.column("epsilon") == ["none"] * 3
    browser.find(".filters button").click()
    browser.wait(lambda: browser.find("#shown").text == "36 of 36 trials shown")
    browser.find("#filter-text").send_keys("failed <on>")
    assert browser.find("#shown").text == "2 of 36 trials shown"
    assert all(text.startswith("failed: no space left <on> device") for text in browser.column("status"))
    assert browser.find("#shown").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("size", SIZES)
def test_hover_tells_the_value(browser: Browser, size: str) -> None:
    browser.open(size)
    mark = browser.all("#utility svg.chart .mark")[1]
    browser.ask("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", mark)
    ActionChains(browser.driver).move_to_element(mark.find_element(By.CSS_SELECTOR, ".hit")).perform()
    tip = browser.find("#tip")
    browser.wait(tip.is_displayed)
    label = mark.get_attribute("aria-label")
    assert tip.text == label
    assert "text_head, simulated epsilon 3" in label
    box, place = tip.rect, mark.find_element(By.CSS_SELECTOR, ".hit").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= SIZES[size][0]
    assert abs(box["y"] + box["height"] - place["y"]) < 40 or abs(box["y"] - place["y"] - place["height"]) < 40
    browser.press(Keys.ESCAPE)
    assert not tip.is_displayed()
    ActionChains(browser.driver).move_to_element(browser.find("#utility h2")).perform()
    assert not tip.is_displayed()


def test_keys_walk_through_a_chart(browser: Browser) -> None:
    browser.open()
    marks = browser.all("#utility svg.chart")[0].find_elements(By.CSS_SELECTOR, ".mark")
    labels = [mark.get_attribute("aria-label") for mark in marks]
    browser.ask("document.querySelector('#utility h2').setAttribute('tabindex', '-1')")
    browser.ask("document.querySelector('#utility h2').focus()")
    browser.press(Keys.TAB)
    assert browser.focused() == labels[0]
    assert browser.find("#tip").text == labels[0]
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.focused() == labels[2]
    assert browser.find("#tip").text == labels[2]
    ring = browser.ask("getComputedStyle(document.activeElement.querySelector('.hit')).strokeWidth")
    assert float(ring.removesuffix("px")) >= 2
    browser.press(Keys.END)
    assert browser.focused() == labels[-1]
    browser.press(Keys.HOME, Keys.ARROW_LEFT)
    assert browser.focused() == labels[0]
    browser.press(Keys.TAB)  # to the next chart, not through every mark
    assert browser.focused() == browser.all("#utility svg.chart")[1].find_element(
        By.CSS_SELECTOR, ".mark"
    ).get_attribute("aria-label")
    browser.press(Keys.ESCAPE)
    assert not browser.find("#tip").is_displayed()


def test_everything_can_be_reached_with_tab_and_shows_it(browser: Browser) -> None:
    browser.open()
    browser.press(Keys.TAB)
    assert browser.focused() == "Skip to the figures"
    assert browser.find(".skip").rect["x"] >= 0
    seen = set()
    for _ in range(120):
        browser.press(Keys.TAB)
        name = browser.ask(
            "(() => { const e = document.activeElement; const mark = e.closest('.mark');"
            " const style = getComputedStyle(mark ? mark.querySelector('.hit') : e);"
            " return [e.tagName.toLowerCase(), mark ? style.strokeWidth : style.outlineWidth] })()"
        )
        assert float(name[1].removesuffix("px")) >= 2, name
        seen.add(name[0])
    assert {"a", "g", "summary", "div", "input", "select", "button"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_no_page_scrolls_sideways(browser: Browser, size: str, scheme: str) -> None:
    browser.open(size, scheme=scheme)
    browser.ask("[...document.querySelectorAll('details')].forEach(one => { one.open = true })")
    assert browser.ask("document.documentElement.scrollWidth") <= SIZES[size][0]
    wider = browser.ask(
        "[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll, .command, svg'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wider == []
    heights = browser.ask(
        "[...document.querySelectorAll('svg.chart text')].map(e => e.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert heights
    assert min(heights) >= 10
    if picture := os.environ.get("REPORT_PICTURES"):
        Path(picture).mkdir(exist_ok=True)
        browser.driver.save_screenshot(f"{picture}/{size}-{scheme}.png")


def test_dark_is_dark_and_paper_is_light(browser: Browser) -> None:
    def brightness() -> tuple[float, float]:
        colours = browser.ask(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        values = [[float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]] for colour in colours]
        return sum(values[0]) / 3, sum(values[1]) / 3

    browser.open(scheme="light")
    page, ink = brightness()
    assert (page > 240, ink < 60) == (True, True)
    browser.open(scheme="dark")
    page, ink = brightness()
    assert (page < 40, ink > 200) == (True, True)
    browser.open(scheme="dark", media="print")
    page, ink = brightness()
    assert (page > 240, ink < 60) == (True, True)


def test_paper_has_the_tables_and_not_the_controls(browser: Browser) -> None:
    browser.open(media="print")
    assert not browser.find(".filters").is_displayed()
    assert not browser.find("nav").is_displayed()
    assert browser.find("#utility svg.chart").is_displayed()
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    tables = browser.all("main table")
    assert len(tables) > 12
    assert all(table.is_displayed() for table in tables)
    browser.ask("dispatchEvent(new Event('afterprint'))")
    assert not browser.find("#utility details table").is_displayed()
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(pdf["data"]) > 50_000


def test_it_reads_without_scripts(browser: Browser) -> None:
    browser.open(scripts=False)
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "js" not in (browser.find("html").get_attribute("class") or "")
    assert not browser.find(".filters").is_displayed()
    assert len(browser.all("#trials tbody tr")) == 36
    titles = browser.all("#utility svg.chart .mark title")
    assert titles
    assert "simulated epsilon" in titles[0].get_attribute("textContent")


def test_nothing_is_fetched_and_nothing_fails(browser: Browser, folder: Path) -> None:
    browser.driver.get_log("browser")
    browser.driver.get_log("performance")
    browser.open()
    browser.head("seed").click()
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requested = {
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    }
    assert requested == {(folder / "report.html").as_uri()}
    # The policy holds even for what slips in.
    browser.ask(
        "document.body.insertAdjacentHTML('beforeend', '<img id=in src=http://127.0.0.1:9/x onerror=\"window.ran=1\">')"
    )
    browser.wait(
        lambda: any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))
    )
    assert browser.ask("window.ran") is None


def test_screen_readers_find_names(browser: Browser) -> None:
    browser.open()
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [
        (node.get("role", {}).get("value"), node.get("name", {}).get("value", ""))
        for node in nodes
        if not node.get("ignored")
    ]
    for role in ("img", "image", "table", "button", "link", "region", "navigation", "textbox", "searchbox", "combobox"):
        assert all(name.strip() for found, name in roles if found == role), role
    assert ("group", "Mean balanced accuracy over the sites, %") in [(role.lower(), name) for role, name in roles]
    headings = [name for role, name in roles if role == "heading"]
    assert headings[0] == "Accuracy against epsilon, by method"
    assert "Who pays for privacy?" in headings
