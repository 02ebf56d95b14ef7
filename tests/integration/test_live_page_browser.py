"""The live page in a real browser, with real clicks and keys; without Chromium these tests fail.

Run with ``make test-browser``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from secure_fed.clients.sitefile import read_site
from secure_fed.lab.simulation import simulate
from secure_fed.operate.live_page import LivePage
from tests.conftest import TRAINING, make_template, template_table
from tests.integration.test_report_browser import SIZES, Browser

pytestmark = pytest.mark.browser

ROUNDS = 30


class _Link:
    """What :class:`Browser` takes for a page: an address instead of a file."""

    def __init__(self, url: str) -> None:
        self._url = url

    def as_uri(self) -> str:
        return self._url


@pytest.fixture
def site(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    return tmp_path / "out/sites/ash"


@pytest.fixture
def browser(site: Path) -> Iterator[Browser]:
    page = LivePage(site)
    thread = threading.Thread(target=page.serve, daemon=True)
    thread.start()
    found = Browser(_Link(page.url))  # type: ignore[arg-type]
    yield found
    found.driver.quit()
    page.close()
    thread.join(10)


def test_it_fits_screens_in_both_schemes_and_nothing_is_refused_by_its_own_policy(browser: Browser) -> None:
    for size in SIZES:
        for scheme in ("light", "dark"):
            browser.open(size, scheme=scheme)
            browser.wait(lambda: "Finished. Round 3 of 3" in browser.find("#headline").text)
            assert browser.ask("document.documentElement.scrollWidth") <= SIZES[size][0]
            assert browser.find("#title").text.startswith("Site ash, study ")
            colour = browser.ask("getComputedStyle(document.body).backgroundColor")
            light = float(re.findall(r"\d+", colour)[0]) > 128
            assert light == (scheme == "light")
    worst = [one for one in browser.driver.get_log("browser") if "favicon" not in one["message"]]  # type: ignore[no-untyped-call]
    assert worst == []


def test_terms_are_accepted_by_keyboard_and_the_page_follows(browser: Browser, site: Path) -> None:
    file, _ = read_site(site)
    shutil.rmtree(file.state_folder.accepted)
    browser.open("phone")
    browser.wait(lambda: "Nobody has accepted" in browser.find("#accepted").text)
    name = browser.find("#by")
    name.send_keys("Dr. Beech", Keys.ENTER)
    browser.wait(lambda: "accepted by Dr. Beech at" in browser.find("#said").text)
    browser.wait(lambda: "Accepted: Dr. Beech" in browser.find("#accepted").text)
    assert not browser.find("#accept").is_displayed()
    assert file.state_folder.accepted.exists()


def _until(browser: Browser, condition: Callable[[], object], seconds: float) -> None:
    WebDriverWait(browser.driver, seconds).until(lambda _: condition())


def _open(place: Path) -> tuple[LivePage, threading.Thread, Browser]:
    page = LivePage(place)
    thread = threading.Thread(target=page.serve, daemon=True)
    thread.start()
    return page, thread, Browser(_Link(page.url))  # type: ignore[arg-type]


def _round(browser: Browser) -> int:
    found = re.match(r"Running\. Round ([0-9]+)", browser.find("#headline").text)
    return int(found[1]) if found else 0


def test_pages_that_are_open_or_killed_change_nothing_of_a_study(tmp_path: Path, images: Path) -> None:
    """A whole demo beside pages of a site and of the server, and its adapter is the one that no page has seen."""
    expected = simulate(make_template(rounds=ROUNDS), tmp_path / "simulated", images)["adapter_digest"]
    template, out = tmp_path / "small.toml", tmp_path / "out"
    template.write_text(tomli_w.dumps(template_table(rounds=ROUNDS)))
    start = [sys.executable, "-P", "-m", "secure_fed.cli"]
    command = [*start, "demo", str(template), "--data", str(images), "--out", str(out), "--json"]
    pages: list[subprocess.Popen[str]] = []
    browsers: list[Browser] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as demo:
        try:
            while not (out / "logs").is_dir():  # from now on its processes start
                assert demo.poll() is None
                time.sleep(0.1)
            for place in (out / "server", out / "sites/ash"):
                page = subprocess.Popen([*start, "page", str(place)], stdout=subprocess.PIPE, text=True)
                pages.append(page)
                assert page.stdout is not None
                browsers.append(Browser(_Link(page.stdout.readline().strip())))  # type: ignore[arg-type]
                browsers[-1].open("desk")
            here = browsers[1]
            for browser in browsers:
                _until(browser, lambda browser=browser: _round(browser) > 0, 240)  # type: ignore[misc]
            assert {os.getpriority(os.PRIO_PROCESS, page.pid) for page in pages} == {19}
            pages[0].kill()
            assert demo.poll() is None  # in the middle
            told, _ = demo.communicate(timeout=400)
            assert demo.returncode == 0
            _until(here, lambda: "Finished." in here.find("#headline").text, 60)
            pages[1].send_signal(signal.SIGINT)
            assert pages[1].wait(30) == 130
        finally:
            demo.terminate()
            for page in pages:
                page.kill()
                page.wait()
                assert page.stdout is not None
                page.stdout.close()
            for browser in browsers:
                browser.driver.quit()
    summary = json.loads(told)
    assert summary["adapter_digest"] == expected
    assert [row["sites_in"] for row in summary["rounds"]] == [len(TRAINING)] * ROUNDS


def test_a_demo_that_runs_is_followed_checked_and_stopped(tmp_path: Path) -> None:
    """A real demo, a page of one site and one of the server, and a press of each button."""
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "secure_fed.cli", "demo", "--rounds", "400", "--out", str(out)]
    site, server = out / "sites/north", out / "server"
    opened: list[tuple[LivePage, threading.Thread, Browser]] = []
    with (tmp_path / "told").open("w") as told, subprocess.Popen(command, stdout=told, stderr=told) as demo:
        try:
            end = time.monotonic() + 240
            while not (site / "state/status.json").exists() or not (server / "status.json").exists():
                assert time.monotonic() < end
                assert demo.poll() is None, (tmp_path / "told").read_text()
                time.sleep(0.2)
            opened = [_open(server), _open(site)]
            (_, _, above), (_, _, here) = opened
            for browser in (above, here):
                browser.open("desk")
            _until(above, lambda: re.search(r"train in\b", above.find("#members").text), 240)
            rows = above.find("#members").text
            assert {"north", "east", "south", "west", "observer"} <= set(re.findall("[a-z]+", rows))
            _until(here, lambda: re.search(r"Running\. Round [2-9]", here.find("#headline").text), 240)
            assert "Accepted: simulation" in here.find("#accepted").text
            assert "messages" in here.find("#sent p").text
            # What was accepted is taken back, and accepted anew on the page, while the study goes on.
            file, _ = read_site(site)
            shutil.rmtree(file.state_folder.accepted)
            _until(here, lambda: here.find("#accept").is_displayed(), 60)
            here.find("#by").send_keys("Dr. Beech")
            here.find("#accept button").click()
            _until(here, lambda: "accepted by Dr. Beech at" in here.find("#said").text, 60)
            _until(here, lambda: "Accepted: Dr. Beech" in here.find("#accepted").text, 60)
            assert file.state_folder.accepted.exists()
            number = _round(here)
            _until(here, lambda: _round(here) > number, 120)
            here.find("#doctor").click()
            _until(here, lambda: re.match(r"[0-9]+ checks, [0-9]+ failed", here.find("#said").text), 120)
            here.find("#stop").click()
            here.wait(lambda: here.find("#stop").text == "Stop it: press again")
            here.find("#stop").click()
            here.wait(lambda: "told to stop" in here.find("#said").text)
            _until(here, lambda: "Running." not in here.find("#headline").text, 60)
            assert demo.wait(60) == 87  # the demo says which of its processes has ended
            _until(above, lambda: "NOT running." in above.find("#headline").text, 60)
        finally:
            demo.terminate()
            for page, thread, browser in opened:
                browser.driver.quit()
                page.close()
                thread.join(10)
    assert "north ended with 130" in (tmp_path / "told").read_text()
