"""Plain texts that are HTML are named before they are learned; Markdown, code and other tags are not taken for HTML."""

import subprocess
from pathlib import Path

import pytest

from llamahome.config.schema import DataConfig
from llamahome.data.checks.check import Request, check
from llamahome.data.checks.findings import Found
from llamahome.data.files.sources import open_source
from llamahome.data.rows.markup import is_markup, markup_note, markup_problem

PAGE = "<div class='post'>\n<h2>Cats</h2>\n<p>Cats &amp; dogs sit on <b>mats</b>.</p>\n<script src='a.js'>x<y</script></div>\n"
PLAIN = "Cats & dogs sit on mats.\n"


@pytest.mark.parametrize(
    "text",
    [
        PAGE,
        f"\n<p>{'A long paragraph without a tag. ' * 40}</p><p>Another.</p>\n",
        "Name, price\n<td>a</td><td>b</td><td>c</td>\n",
        f"# Title\n\n{PAGE}",
    ],
)
def test_parts_of_pages_are_html(text: str) -> None:
    assert is_markup(text)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "",
        "# Title\n\nSome text<br/>with a break and <b>bold</b> words, which Markdown may hold. " + PLAIN * 20,
        f"How to write a page:\n\n```html\n{PAGE}```\n\nand so on. " + PLAIN,
        f"An open fence:\n\n```\n{PAGE}",
        "<think>\nIs 3 < 4?\n</think>\n<answer>yes</answer><tool>a</tool>",
        "if a < b and c > d: print('</')",
        "List<String> x = new List<String>(); Map<a, b> y; </>" * 5,
    ],
)
def test_what_is_no_page_is_not_html(text: str) -> None:
    assert not is_markup(text)


def test_the_check_names_each_row_and_the_command_in_its_help_takes_the_tags_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a page.md").write_text(PAGE)
    Path("b.md").write_text(PLAIN)
    found: list[Found] = []
    checked = check(Request((".",), DataConfig()), found.append)
    (warning,) = [each for each in found if each.problem.code == "data.markup"]
    assert (warning.level, warning.place.source) == ("warning", "a page.md") and checked.main.facts.usable.all()
    command = str(warning.problem.hint).partition("   ")[0]
    subprocess.run(command, shell=True, check=True)
    assert Path("a page-text.txt").read_text().split() == ["Cats", *PLAIN.split()]
    assert markup_problem(Path("a page-text.txt").read_text(), "a page-text.txt", "a page-text.txt:1") is None
    assert "python3" not in str(markup_problem(PAGE, "a.md.gz", "a.md.gz:1").hint), "the command reads no packed file"


def test_the_share_of_such_rows_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate([PAGE, PLAIN, PLAIN, PAGE]):
        Path(f"{number}.txt").write_text(text)
    source = open_source(".")
    rows = [source.parsed(number) for number in range(4)]
    assert markup_note(rows, {}) == "2 of 4 rows from everywhere look like HTML (50%); their tags are learned as text"
    assert markup_note(rows[1:3], {}) is None
