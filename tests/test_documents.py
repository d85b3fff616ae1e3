"""What is written down is true: the agreed settings, the list of errors, the list of source files, links, decisions."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from ruamel.yaml import YAML
from tests.support.sources import PACKAGE, ROOT, SOURCES, assert_none, imports, nodes, room, tail

import tour
from llamahome.config.schema import Config

AREAS = {*Config.model_fields, "config", "export", "machine", "run", "sweep", "usage"}
FILE_ENDINGS = {"csv", "html", "json", "jsonl", "yaml", "safetensors", "svg", "txt", "md", "py", "model", "weight"}
CODE = re.compile(r"[a-z]+\.[a-z0-9]+(?:-[a-z0-9]+)*")


def settings() -> list[tuple[str, str]]:
    """Every (section, key) of the schema."""
    return [
        (section, key)
        for section, field in Config.model_fields.items()
        for key in (info.alias for info in field.annotation.model_fields.values())
    ]


def test_the_settings_are_the_ones_agreed_on() -> None:
    """A setting is a promise: whoever adds or removes one changes tests/settings.txt too, where a reader of the change sees it."""
    agreed = (ROOT / "tests/settings.txt").read_text(encoding="utf-8").split()
    assert sorted(f"{section}.{key}" for section, key in settings()) == sorted(agreed)


def test_every_setting_is_read_by_the_program() -> None:
    read = {pair for name in SOURCES if room(name) != "config" for pair in _settings_read(nodes(PACKAGE / name))}
    assert_none(sorted(f"{section}.{key}" for section, key in set(settings()) - read))


def _settings_read(module: Sequence[ast.AST]) -> Iterator[tuple[str, str]]:
    """Pairs like (training, seed) for `config.training.seed`, and for `settings.seed` where `settings` is that section."""
    classes = {field.annotation.__name__: section for section, field in Config.model_fields.items()}
    sections = {section: {section} for section in Config.model_fields}
    for node in module:
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            for word in re.findall(r"\w+", ast.unparse(node.annotation)):
                if word in classes:
                    sections.setdefault(node.arg if isinstance(node, ast.arg) else tail(node.target), set()).add(classes[word])
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr in Config.model_fields:
            for target in node.targets:
                sections.setdefault(tail(target), set()).add(node.value.attr)
    for node in module:
        if isinstance(node, ast.Attribute):
            for section in sections.get(tail(node.value), ()):
                yield section, node.attr.rstrip("_")


def test_the_list_of_source_files_is_current_and_names_every_folder() -> None:
    page = (ROOT / "docs/Architecture.md").read_text(encoding="utf-8")
    assert tour.updated(page) == page, "python scripts/tour.py"
    listed = re.findall(r"^- `([\w/]+\.py)`", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name in SOURCES if not name.endswith("__init__.py"))


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") < 150


@cache
def codes() -> dict[str, str]:
    """Every error code of the program and the place of one use: the values of `code=`, and other words that look like one."""
    found: dict[str, str] = {}
    known = {f"{section}.{key}" for section, key in settings()}
    for path in [PACKAGE / name for name in SOURCES] + sorted((ROOT / "scripts").glob("*.py")):
        for node in nodes(path):
            if isinstance(node, ast.keyword) and node.arg == "code":
                words = {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                area, _, slug = node.value.partition(".")
                words = {node.value} if area in AREAS and node.value not in known and slug not in FILE_ENDINGS else set()
            else:
                continue
            found |= dict.fromkeys(words, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    return found


def test_a_code_is_an_area_and_a_slug_and_stands_whole_in_the_source() -> None:
    """Whoever meets a code searches the source for it: so none is put together from pieces."""
    wrong = [f"{where}: {code}" for code, where in codes().items() if not CODE.fullmatch(code) or code.split(".")[0] not in AREAS]
    assert_none(wrong)


def test_the_list_of_errors_holds_every_code_and_no_other() -> None:
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z0-9.-]+)` \|", text, flags=re.MULTILINE)
    assert listed == sorted(listed), "in the order of the alphabet"
    assert_none([f"not in the list: {code} ({where})" for code, where in sorted(codes().items()) if code not in listed])
    assert_none([f"no longer in the source: {code}" for code in sorted(set(listed) - set(codes()))])


def test_a_dependency_is_declared_and_each_declared_one_is_used() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = module_names(project["dependencies"])
    extras = module_names(line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines)
    used = {module.split(".")[0] for name in SOURCES for _, module in imports(name)} - sys.stdlib_module_names - {"llamahome"}
    assert used - declared - extras == set()
    assert declared - used == set()
    assert extras - used == set()


def module_names(asked: Iterable[str]) -> set[str]:
    """The modules that these requirements bring, as an import names them."""
    names = {re.split(r"[>=<\[]", line)[0] for line in asked}
    return {"pynvml" if name == "nvidia-ml-py" else name.replace("-", "_").removesuffix(".yaml").removesuffix("_skinny") for name in names}


def test_what_the_documentation_and_the_source_point_to_is_there() -> None:
    wrong = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *PACKAGE.rglob("*.py"), *(ROOT / ".config").glob("*.yaml")]:
        text = page.read_text(encoding="utf-8")
        linked = [page.parent / target for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)] if page.suffix == ".md" else []
        named = [ROOT / target for target in re.findall(r"\bdocs/[\w/-]+\.md", text)]
        wrong += [f"{page.relative_to(ROOT)}: {target}" for target in linked + named if not target.exists()]
    assert_none(wrong)


def test_a_decision_fits_on_a_page() -> None:
    pages = sorted((ROOT / "docs/decisions").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    assert [page.name for page in pages if page.read_text(encoding="utf-8").count("\n") > 40] == []


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = YAML(typ="safe").load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^check:\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert recipe is not None
    commands = re.findall(r"\$\(python\) -m (.+)", recipe[1])
    entries = [hook["entry"].removeprefix(".venv/bin/python -m ") for hook in hooks]
    assert [bare(command) for command in entries] == [bare(command) for command in commands]


def bare(command: str) -> str:
    """A command without its options and the folder that pre-commit leaves out."""
    return " ".join(word for word in command.split() if not word.startswith("-") and word != ".")


def test_ci_runs_on_every_supported_python_and_the_citation_names_this_version() -> None:
    yaml, text = YAML(typ="safe"), (ROOT / "README.md").read_text(encoding="utf-8")
    job = yaml.load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]["check-and-test"]
    oldest, newest = re.search(r"\(3\.(\d+) to 3\.(\d+)\)", text).groups()
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(oldest), int(newest) + 1)]
    assert job["steps"][-1]["run"] == "bash .ci/run"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert yaml.load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == project["version"]


def test_a_long_line_of_a_page_is_one_sentence() -> None:
    """So that a change of a sentence is a change of one line. Tables, code and links are as long as they must be."""
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"))]
    written = (page for page in pages if page.name != "configuration.md")  # which the schema writes
    assert_none([f"{page.name}:{number}" for page in written for number in _long_lines(page.read_text(encoding="utf-8"))])


def _long_lines(text: str) -> Iterator[int]:
    """The numbers of lines of more than 120 characters that hold several sentences."""
    within_code = False
    for number, line in enumerate(text.splitlines(), start=1):
        within_code ^= line.lstrip().startswith("```")
        if within_code or len(line) <= 120 or line.lstrip().startswith(("|", "#", ">", "!", "<")) or line.startswith("    "):
            continue
        if _SENTENCE_ENDS.search(_CODE_OR_LINK.sub("x", line)):
            yield number


_CODE_OR_LINK = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)")
_SENTENCE_ENDS = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!\d)[.!?] [A-Z\"]")
