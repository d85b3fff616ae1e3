"""Takes pictures of every page of the dashboard, light, dark and on a phone, into docs/pictures/.

    python scripts/screenshots.py [--start] [RUN [RUN ...]]

Run it where there are runs (output/runs). The pages of one run are those of the first RUN, without one those of the newest run; all RUNs
are compared. With --start only the page that starts a training is taken, with data/training/raw checked and planned. Needs playwright and
chromium (requirements-browser.lock). A picture over 150 kB is an error, because it is in the repository.
"""

import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).resolve().parents[1] / "docs/pictures"
LOOKS = {
    "light": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 860}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
}
_MOST_BYTES = 150_000
_DRAWN = "() => [...document.querySelectorAll('.chart')].every((figure) => figure.uplot || !figure.querySelector('.nothing').hidden)"


def addresses(runs: list[str]) -> dict[str, str]:
    """Name and address of every page."""
    run = f"/run/{runs[0]}"
    compared = "/compare?" + urlencode([("run", name) for name in runs])
    return {"runs": "/", "run": run, "samples": f"{run}/samples", "data": f"{run}/data", "system": f"{run}/system", "compare": compared}


def start_page(browser: Any, url: str, token: str) -> str:
    """Check and plan a training; the address of its page."""
    page = browser.new_context().new_page()
    page.goto(f"{url}/start?token={token}")
    page.fill("#data", "data/training/raw")
    for button in ("Check the data", "Show the plan"):
        page.click(f"text={button}")
        page.wait_for_function("() => !document.querySelector('[data-running]')", timeout=300_000)
    return str(page.url)


def take(url: str, runs: list[str], token: str) -> list[Path]:
    """Take all pictures of the dashboard at `url`, without runs those of the page that starts a training; the files."""
    taken = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        pages = addresses(runs) if runs else {"start": start_page(browser, url, token).removeprefix(url)}
        for look, context in LOOKS.items():
            page = browser.new_context(**context).new_page()
            page.goto(f"{url}/?token={token}")
            for name, address in pages.items():
                page.goto(url + address)
                page.wait_for_function(_DRAWN)
                page.wait_for_timeout(500)
                taken.append(PICTURES / f"dashboard-{name}-{look}.png")
                page.screenshot(path=taken[-1])
        browser.close()
    return taken


def main() -> int:
    """Take the pictures; the exit status."""
    start, token = "--start" in sys.argv, secrets.token_urlsafe()
    runs = sys.argv[1:] or sorted((path.name for path in Path("output/runs").iterdir()), reverse=True)
    PICTURES.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "llamahome", "dashboard", "--port", "0", "--token", token, *(["--allow-start"] if start else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            taken = take(server.stdout.readline().split()[-1], [] if start else runs, token)
        finally:
            server.terminate()
    large = [path for path in taken if path.stat().st_size > _MOST_BYTES]
    print(f"{len(taken)} pictures in {PICTURES}", *[f"{path.name} is larger than {_MOST_BYTES:,} bytes" for path in large], sep="\n")
    return 1 if large else 0


if __name__ == "__main__":
    raise SystemExit(main())
