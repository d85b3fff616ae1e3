"""Writes the list of source files in docs/Architecture.md from the first sentence of each file's docstring.

python scripts/tour.py            writes the page
python scripts/tour.py --check    exit status 1 when the page is out of date
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/llamahome"
PAGE = ROOT / "docs/Architecture.md"
ROOMS = (
    (".", "The top level: pipelines and the ground floor"),
    ("training", "training/: the loop and what it needs"),
    ("data", "data/: from files to micro-batches"),
    ("data/files", "data/files/: any row of any file by its number"),
    ("data/rows", "data/rows/: rows to conversations"),
    ("data/text", "data/text/: conversations to tokens with targets"),
    ("data/store", "data/store/: tokenized examples, on disk or made ahead of the loop"),
    ("data/steps", "data/steps/: examples to steps"),
    ("data/checks", "data/checks/: what is wrong with the data"),
    ("model", "model/: loading, adapting, placing, saving, generating"),
    ("model/export", "model/export/: a trained model in the forms that other tools load"),
    ("model/backends", "model/backends/: everything that differs by device"),
    ("model/backends/cpu", "model/backends/cpu/: processors"),
    ("model/backends/cuda", "model/backends/cuda/: NVIDIA GPUs"),
    ("checkpoint", "checkpoint/: whole, or not there"),
    ("monitoring", "monitoring/: records, sinks and the terminal"),
    ("monitoring/charts", "monitoring/charts/: a run as charts and as a page"),
    ("planning", "planning/: memory, time and traffic before a run"),
    ("sweep", "sweep/: many runs compared"),
    ("doctor", "doctor/: whether a machine and its settings can train"),
    ("serving", "serving/: the OpenAI API"),
    ("dashboard", "dashboard/: runs in the browser"),
    ("web", "web/: what every server shares"),
    ("distributed", "distributed/: ranks, collectives, launching"),
    ("config", "config/: every setting and where its value came from"),
    ("cli", "cli/: commands"),
)
"""Folder below src/llamahome and its heading, in reading order."""
_MARKS = ("<!-- files -->", "<!-- /files -->")


def first_sentence(path: Path) -> str:
    """The first sentence of the docstring of `path`, on one line; ValueError where it has none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path}: no docstring")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z`)\]])\. ", paragraph)[0]
    return sentence.rstrip(".:;")


def listing() -> str:
    """The list of all source files, one heading for each folder."""
    lines = []
    for folder, heading in ROOMS:
        files = sorted(path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py")
        lines += [f"### {heading}", ""]
        lines += [f"- `{path.relative_to(PACKAGE).as_posix()}`: {first_sentence(path)}" for path in files]
        lines.append("")
    return "\n".join(lines)


def updated(page: str) -> str:
    """`page` with the list between its two marks replaced."""
    before, _, rest = page.partition(_MARKS[0])
    after = rest.partition(_MARKS[1])[2]
    return f"{before}{_MARKS[0]}\n\n{listing()}\n{_MARKS[1]}{after}"


def main() -> int:
    """Write the page, or compare it; the exit status."""
    page = PAGE.read_text(encoding="utf-8")
    current = updated(page)
    if "--check" in sys.argv[1:]:
        return int(current != page)
    PAGE.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
