"""The live page in a real browser, with real clicks and keys; without Chromium these tests fail.

Run with ``make test-browser``.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from secure_fed.clients.sitefile import read_site
from secure_fed.operate.live_page import LivePage
from tests.integration.test_report_browser import SIZES, Browser

pytestmark = pytest.mark.browser


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
