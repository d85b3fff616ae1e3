"""Which error codes have a help line that contains a command or an option, read from the source text."""

import ast
import re
from collections.abc import Iterator

from tests.support.sources import SOURCES, source

_TYPED = re.compile(r"llamahome |--[a-z][a-z-]+|iconv |jq |mv |python3 |gzip |zstd |git ")
_BUILDERS = {"move", "run_python", "extract_list", "break_at_returns"}
"""Functions of data/files/commands.py that return a command."""
_CODE = re.compile(r"\b[a-z]+\.[a-z]+(?:-[a-z]+)*\b")


def codes_with_commands() -> set[str]:
    """Every code of a Problem or Finding whose help line, or what it is put together from, holds something that is typed."""
    return {code for name in SOURCES for code in _codes(source(name)) if "." in code and not code.endswith(".json")}


def _codes(module: ast.Module) -> Iterator[str]:
    fixed = {target.id: _text(node.value) for node in module.body if isinstance(node, ast.Assign) for target in _names(node)}
    for function in (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)):
        assigned = [(node.value, {target.id for target in _names(node)}) for node in ast.walk(function) if isinstance(node, ast.Assign)]
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            code, hint = given.get("code") or next(iter(call.args), None), given.get("hint")
            if getattr(call.func, "id", "") not in ("Problem", "RowError") or hint is None or code is None:
                continue
            wanted = {node.id for node in ast.walk(hint) if isinstance(node, ast.Name)}
            values = [hint, *(value for value, names in assigned if names & wanted)]
            built = any(
                getattr(node.func, "id", "") in _BUILDERS for value in values for node in ast.walk(value) if isinstance(node, ast.Call)
            )
            texts = [_text(hint), *(fixed.get(name, "") for name in wanted), *(_text(value) for value, names in assigned if names & wanted)]
            if built or _TYPED.search(" ".join(texts)):
                known = [value for value, names in assigned if isinstance(code, ast.Name) and code.id in names]
                yield from ([code.value] if isinstance(code, ast.Constant) else [each for v in known for each in _CODE.findall(_text(v))])


def _names(node: ast.Assign) -> Iterator[ast.Name]:
    return (name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _text(node: ast.AST) -> str:
    return " ".join(each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str))
