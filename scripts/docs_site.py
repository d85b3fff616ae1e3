"""Builds the documentation as a site in build/site: python scripts/docs_site.py, or make docs.

mkdocs lives in an environment of its own (build/docs-venv, requirements-docs.lock), because training needs none of it. The pages are laid
out in build/pages: README.md as the first page, the pages of docs/ beside it, and whatever they point to outside of docs/. A link to a
folder of the repository, which a site cannot show, becomes its text. Exit status: 0 built, 1 a page has a broken link, 4 mkdocs cannot be
installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES, ENVIRONMENT = ROOT / "build/pages", ROOT / "build/docs-venv"
FRONT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "SECURITY.md": "SECURITY.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages at the root of the repository, and their names in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(\s*([^)#:\s]+)(#[^)\s]*)?\s*\)")
_CODE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def moved(page: Path, text: str, pages: Path) -> str:
    """`text` of `page` with links that hold in the site; files outside of docs/ that it points to are copied into `pages`."""

    def link(match: re.Match[str]) -> str:
        mark, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        place = (page.parent / target).resolve()
        if not place.is_relative_to(ROOT):
            return match[0]
        name = place.relative_to(ROOT).as_posix()
        if place.is_dir() or place.suffix in {".py", ".lock", ".toml"}:
            return label
        new = FRONT.get(name, name.removeprefix("docs/"))
        if place.is_file() and name not in FRONT and not name.startswith("docs/"):
            (pages / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(place, pages / new)
        return f"{mark}[{label}]({os.path.relpath(pages / new, (pages / site_name(page)).parent)}{anchor})"

    parts = _CODE.split(text)
    return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))


def site_name(page: Path) -> str:
    """The name of a page in the site."""
    name = page.relative_to(ROOT).as_posix()
    return FRONT.get(name, name.removeprefix("docs/"))


def lay_out(folder: Path) -> None:
    """Write every page and picture into `folder`, which is made anew, and a list of the decisions."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", folder)
    for page in [*(ROOT / name for name in FRONT), *sorted((ROOT / "docs").rglob("*.md"))]:
        (folder / site_name(page)).write_text(moved(page, page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    decisions = sorted((ROOT / "docs/decisions").glob("*.md"))
    lines = [f"- [{page.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}]({page.name})" for page in decisions]
    (folder / "decisions/index.md").write_text("\n".join(["# Decisions", "", *lines, ""]), encoding="utf-8")


def mkdocs() -> Path:
    """The mkdocs of its environment, which is made if it is not there."""
    command = ENVIRONMENT / "bin/mkdocs"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        pip = [ENVIRONMENT / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", ROOT / "requirements-docs.lock"], check=True)
    return command


def main() -> int:
    """Build the site; return the exit status."""
    try:
        command = mkdocs()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error[machine.install-failed]: mkdocs cannot be installed: {error}", file=sys.stderr)
        return 4
    lay_out(PAGES)
    built = [command, "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]  # --quiet would hide warnings from --strict
    done = subprocess.run(built, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        print("".join(line for line in done.stdout.splitlines(keepends=True) if not line.startswith("INFO")), end="", file=sys.stderr)
        return 1
    print("the site: build/site/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
