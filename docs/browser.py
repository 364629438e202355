"""A headless Chromium and a running demo: for the pictures of the documents, and for the tests of the page.

On Debian: ``apt-get install chromium chromium-driver``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["Browser", "browser", "missing_programs", "running_demo"]

ROOT = Path(__file__).parent.parent
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
_SECONDS = 90  # that a page, or an answer, may take


def missing_programs() -> str:
    """Return what is missing to run a browser, and how to get it; empty if nothing is."""
    if _chromium() is not None and shutil.which("chromedriver") is not None:
        return ""
    return "Chromium or its driver is missing (on Debian: apt-get install chromium chromium-driver)"


class Browser:
    """A page in Chromium, and what is done with it.

    Attributes:
        driver: Selenium's.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Open an address."""
        self.driver.get(address)

    def resize(self, width: int, height: int = 1000) -> None:
        """Give the page a width and a height, pixels; a window can't be as narrow as a telephone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def use_dark(self, dark: bool) -> None:
        """Say whether the user likes dark pages."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def stop_motion(self) -> None:
        """Let colours and sizes change at once, so that none is seen half-way."""
        self.run(
            "const style = document.createElement('style');"
            "style.textContent = '*, *::before, *::after { transition: none !important; animation: none !important; }';"
            "document.head.append(style);"
        )

    def find(self, selector: str) -> WebElement:
        """Wait for an element and return it."""
        return WebDriverWait(self.driver, _SECONDS).until(
            lambda driver: driver.find_element(By.CSS_SELECTOR, selector), f"{selector} did not appear"
        )

    def find_all(self, selector: str) -> list[WebElement]:
        """Return the elements that are there now."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until something is true, and return it; elements that are replaced meanwhile are looked up again."""
        from selenium.common.exceptions import StaleElementReferenceException

        waiting = WebDriverWait(self.driver, _SECONDS, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda _: condition(), f"{what}: not so after {_SECONDS} s")

    def text(self, selector: str) -> str:
        """Return the text of an element; empty if there is none."""
        found = self.find_all(selector)
        return found[0].text if found else ""

    def wait_for_text(self, selector: str, part: str) -> str:
        """Wait until an element's text holds a part, and return the text."""
        self.wait(lambda: part in self.text(selector), f"{selector} shows {part!r}")
        return self.text(selector)

    def choose_tab(self, name: str) -> None:
        """Open a tab of the demo."""
        tabs = self.find_all("button[role=tab]")
        next(tab for tab in tabs if tab.text == name and tab.is_displayed()).click()

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script in the page returns."""
        return self.driver.execute_script(script, *arguments)

    def overflowing(self) -> list[str]:
        """Return what reaches beyond the page's right edge, unless it can be scrolled to within a smaller box."""
        return list(self.run(_OVERFLOWING))

    def problems_of_access(self, but: Sequence[str] = ()) -> list[str]:
        """Return what axe finds against WCAG 2.1, levels A and AA: contrast, names, keyboard.

        Args:
            but: Selectors of what is not looked at.
        """
        import axe_core_python

        if not self.run("return window.axe !== undefined"):
            self.run((Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(_AXE, [[selector] for selector in but])
        nodes = [(rule["id"], node) for rule in found for node in rule["nodes"]]
        return [f"{rule}: {node['html'][:150]} {node['failureSummary'][:300]}" for rule, node in nodes]

    def requested_elsewhere(self) -> list[str]:
        """Return the addresses outside this machine that were asked for since the last call."""
        addresses = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                addresses.append(message["params"]["request"]["url"])
            elif message["method"] == "Network.webSocketCreated":
                addresses.append(message["params"]["url"])
        local = ("127.0.0.1", "localhost", None)  # None: data and blobs
        return [
            address
            for address in addresses
            if urlsplit(address).hostname not in local and not address.startswith("chrome")
        ]

    def photograph(self, path: Path, selector: str | None = None) -> None:
        """Write a picture of an element, or of what is seen, as a small PNG."""
        import io

        from PIL import Image

        png = (
            self.driver.get_screenshot_as_png() if selector is None else self.find(selector).screenshot_as_png
        )
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


@contextmanager
def browser(width: int = 1280, height: int = 1000) -> Iterator[Browser]:
    """Yield a new browser that reaches nothing outside this machine and forgets everything at the end."""
    options = ChromeOptions()
    options.binary_location = _chromium() or ""
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = Chrome(options=options, service=ChromeService(shutil.which("chromedriver")))
        driver.set_script_timeout(_SECONDS)
        try:
            page = Browser(driver)
            page.resize(width, height)
            yield page
        finally:
            driver.quit()


@contextmanager
def running_demo(
    arguments: Sequence[str | Path], folder: Path, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Run ``vlprompt demo`` on a free port, and yield its address.

    Args:
        arguments: Further words of the command.
        folder: Where it runs.
        environment: Added to this process's.
    """
    words = [sys.executable, "-m", "vlprompt", "demo", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=(folder / "demo.log").open("w"),
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()  # comes when the page can be opened
        if not line.startswith("http"):
            raise RuntimeError(f"the demo did not start: {(folder / 'demo.log').read_text()[-2000:]}")
        yield line.split()[0]
    finally:
        process.terminate()
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < _SECONDS:
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()
            raise RuntimeError("the demo did not end when it was told to")


def _chromium() -> str | None:
    """Return where Chromium lies; None if it is not installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


_AXE = """
const [exclude, done] = arguments;
const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"];
axe.run({exclude}, {runOnly: {type: "tag", values: tags}}).then(result => done(result.violations));
"""

# What can be scrolled to inside a box of its own, such as a wide table, does not count; nor does what is clipped.
_OVERFLOWING = """
const width = document.documentElement.clientWidth;
const found = [];
if (document.documentElement.scrollWidth > width) found.push(`the page: ${document.documentElement.scrollWidth} px`);
for (const element of document.body.querySelectorAll("*")) {
  const box = element.getBoundingClientRect();
  if (box.width === 0 || box.height === 0 || box.right <= width + 1) continue;
  let drawer = element;  // a menu that waits beside the page
  while (drawer && getComputedStyle(drawer).position !== "fixed") drawer = drawer.parentElement;
  if (drawer) continue;
  let inside = element.parentElement;
  while (inside && getComputedStyle(inside).overflowX === "visible") inside = inside.parentElement;
  if (inside && inside !== document.body && inside !== document.documentElement) continue;
  if (getComputedStyle(element).visibility === "hidden") continue;
  found.push(`${element.tagName}.${element.className}: ${Math.round(box.right)} px`);
}
return found;
"""
