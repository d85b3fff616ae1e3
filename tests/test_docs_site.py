"""The documentation as a site (make docs): each link that holds in the repository holds in the site too. .ci/run builds it with mkdocs."""

import re
from pathlib import Path

from tests.support.sources import ROOT

import docs_site

_LINK = re.compile(r"\]\(\s*([^)#:\s]+)(?:#[^)]*)?\s*\)")


def test_every_link_of_every_page_leads_to_a_file_of_the_site(tmp_path: Path) -> None:
    docs_site.lay_out(tmp_path / "pages")
    pages = sorted((tmp_path / "pages").rglob("*.md"))
    links = [(page, target) for page in pages for target in _LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 100
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []


def test_every_page_has_a_place_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} | {"index.md", "decisions/index.md"}
    assert pages - set(re.findall(r": (\S+\.md)$", menu, flags=re.MULTILINE)) == set()
