"""Reads the source of llamahome as text and syntax, for the tests that judge its shape; imports nothing of it."""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/llamahome"
SOURCES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
WRITTEN = sorted(path for folder in ("src", "scripts", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def assert_none(wrong: Sequence[object]) -> None:
    """Fail with every finding on a line of its own."""
    assert not wrong, "\n" + "\n".join(map(str, wrong))


@cache
def tree(path: Path) -> ast.Module:
    """The syntax of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def nodes(path: Path) -> Sequence[ast.AST]:
    """All nodes of a file, level by level; kept, because a walk through all files takes seconds."""
    return tuple(ast.walk(tree(path)))


def source(name: str) -> ast.Module:
    """The syntax of a file of the package."""
    return tree(PACKAGE / name)


def room(name: str) -> str:
    """`data/steps/order.py` -> data, `pipeline.py` -> pipeline."""
    return name.split("/")[0].removesuffix(".py")


def within(module: str, package: str) -> bool:
    """Whether `module` is `package` or lies in it."""
    return module == package or module.startswith(package + ".")


@cache
def imports(name: str) -> Sequence[tuple[int, str]]:
    """Line and full name of everything that a file imports; `import_module("x")` and the chain `torch.distributed` count."""
    return tuple(_imports(name))


def _imports(name: str) -> Iterator[tuple[int, str]]:
    for node in nodes(PACKAGE / name):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if isinstance(node.args[0], ast.Constant):
                yield node.lineno, node.args[0].value
        elif isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed":
            yield node.lineno, "torch.distributed"


def tail(node: ast.AST) -> str:
    """`a.b.c` -> c, `c` -> c."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
