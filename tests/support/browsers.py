"""Debian's chromium, driven by playwright, for tests of pages; what is missing is a reason to skip."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.sources import ROOT

CHROMIUM = Path("/usr/bin/chromium")
_AXE = "axe-core@4.14.1"


@contextmanager
def opened() -> Iterator[Any]:
    """The browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.lock")
    if not CHROMIUM.exists():
        pytest.skip("apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, what it logged as an error, and which hosts it asked."""

    page: Any
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)


def submit(page: Any, button: str, within_ms: int = 60_000) -> None:
    """Click the button with this text, and wait for the next page and for the end of the command whose output it shows."""
    with page.expect_navigation():  # a click does not wait for it, and the old page shows no running command either
        page.click(f"text={button}")
    page.wait_for_function("() => !document.querySelector('[data-running]')", timeout=within_ms)


@contextmanager
def visiting(browser: Any, url: str, **context: Any) -> Iterator[Visit]:
    """An open page in a context of its own, at least 1280 wide unless `context` says otherwise; it must log no error."""
    place = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    visit = Visit(place.new_page())
    visit.page.on("console", lambda message: visit.errors.append(message.text) if message.type in ("error", "warning") else None)
    visit.page.on("pageerror", lambda error: visit.errors.append(str(error)))
    visit.page.on("request", lambda request: visit.hosts.add(request.url.split("/")[2]))
    visit.page.goto(url)
    yield visit
    place.close()


def axe() -> str:
    """The source of axe-core, from npm's registry if it is not in build/ yet."""
    folder = ROOT / "build/axe"
    script = folder / "package/axe.min.js"
    if not script.exists():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not here, so there is no axe-core")
        folder.mkdir(parents=True, exist_ok=True)
        got = subprocess.run([npm, "pack", _AXE, "--silent"], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        if got.returncode:
            pytest.skip("npm's registry does not answer, so there is no axe-core")
        subprocess.run(["tar", "xzf", got.stdout.split()[-1]], cwd=folder, check=True)
    return script.read_text(encoding="utf-8")
