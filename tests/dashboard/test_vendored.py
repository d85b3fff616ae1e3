"""The one library that browsers load is the file that its project released, with its licence beside it."""

import hashlib

from tests.support.sources import PACKAGE

STATIC = PACKAGE / "dashboard/static"


def test_uplot_is_as_it_was_released() -> None:
    stated = dict(reversed(line.split()) for line in (STATIC / "uPlot.sha256").read_text().splitlines())
    assert set(stated) == {"uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"}
    for name, digest in stated.items():
        assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest, name
    assert "MIT License" in (STATIC / "uPlot.LICENSE").read_text()


def test_scripts_of_our_own_are_short() -> None:
    for path in STATIC.iterdir():
        if path.suffix in (".js", ".css") and not path.name.startswith("uPlot"):
            lines = path.read_text().splitlines()
            assert len(lines) <= 300 and max(map(len, lines)) <= 160, path.name
