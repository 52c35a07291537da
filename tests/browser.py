"""A headless Chromium for tests of pages; without it, tests are skipped with the reason."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")

MOST_SECONDS = 60.0
"""The time after which a test gives up; pages are ready in about a second."""


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Yield a driver, and quit it at the end."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed: pages are not tested in a browser")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip(f"no browser: chromium is {binary}, chromedriver is {driver}")
    assert selenium
    from selenium.webdriver import Chrome
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def open_page(chrome: Any, path: Path, *, width: int = 1280, media: dict[str, str] | None = None) -> None:
    """Open a local page in a window of a given width; an error in its console fails the test."""
    features = [{"name": name, "value": value} for name, value in (media or {}).items()]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chrome.get(path.as_uri())
    # a page of many megabytes may still be parsed when `get` returns
    deadline = time.monotonic() + MOST_SECONDS
    while chrome.execute_script("return document.documentElement.dataset.ready") != "yes":
        assert time.monotonic() < deadline, f"the page's script did not finish: {console(chrome)}"
        time.sleep(0.05)
    assert console(chrome) == []


def console(chrome: Any) -> list[str]:
    """Return the messages in the console since the last call."""
    return [entry["message"] for entry in chrome.get_log("browser")]
