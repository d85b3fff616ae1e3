"""The form that prepares a training, in a browser: it fits, it can be used without seeing it, and it says what is not taken."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.browsers import axe, opened, submit, visiting
from tests.support.dashboards import Dashboard, started

TOKEN = "a-token-of-some-length"
LOOKS = (("light", 1280), ("dark", 1280), ("light", 390))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with opened() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    home = tmp_path_factory.mktemp("form")
    (home / "data/models/base/tiny").mkdir(parents=True)
    (home / "data/models/base/tiny/config.json").write_text("{}")
    with started(home, "--allow-start", "--token", TOKEN) as server:
        yield server
        server.end()  # and the commands that run for its pages


@pytest.mark.medium
@pytest.mark.parametrize("epochs", [None, "many", "2"], ids=["empty", "refused", "answered"])
def test_the_form_is_accessible_and_fits(browser: Any, server: Dashboard, epochs: str | None) -> None:
    source = axe()
    with visiting(browser, f"{server.url}/start?token={TOKEN}") as visit:
        if epochs is not None:
            visit.page.fill("#data", "rows.jsonl")
            visit.page.select_option("#model", "tiny")
            visit.page.fill("#epochs", epochs)
            submit(visit.page, "Show the plan")
        if epochs == "2":
            answer = visit.page.locator("[aria-labelledby=plan-title]").inner_text()
            assert "llamahome plan rows.jsonl --model tiny --method lora --epochs 2" in answer
            assert "error[data.not-found]" in answer and "exit status 3" in answer
        if epochs == "many":
            assert "Epochs: 'many' is no number." in visit.page.locator("[role=alert]").inner_text()
            assert visit.page.locator("#data").input_value() == "rows.jsonl"
            visit.errors.clear()  # a browser logs the status 422
        visit.page.evaluate(source)
        for scheme, width in LOOKS:
            visit.page.emulate_media(color_scheme=scheme)
            visit.page.set_viewport_size({"width": width, "height": 844})
            found = visit.page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")["violations"]
            assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == [], (scheme, width)
            assert visit.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), f"wider than {width}"
        assert visit.errors == []


def test_a_file_that_is_not_taken_is_said_beside_the_field(browser: Any, server: Dashboard, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text("1\n")
    with visiting(browser, f"{server.url}/start?token={TOKEN}") as visit:
        visit.page.set_input_files("#file", str(script))
        visit.page.wait_for_function(
            "() => document.getElementById('uploaded').textContent.startsWith('It is not taken: files of rows end')"
        )
        assert visit.page.locator("#data").input_value() == ""
