"""Compares version numbers with ranges such as `>=2.13,<3`, by the rules of PEP 440 that our ranges use. Standard library only.

The library `packaging` is not used, because doctor also runs where packages are missing.
"""

import re

_VERSION = re.compile(
    r"v?(?:\d+!)?(\d+(?:\.\d+)*)"
    r"[-_.]?((?:a|b|c|rc|alpha|beta|pre|preview)[-_.]?\d*)?"
    r"((?:[-_.]?post\d*)|-\d+)?"
    r"([-_.]?dev\d*)?"
)
_CLAUSE = re.compile(r"(===|==|!=|~=|>=|<=|>|<)\s*([^\s,;]+)")
_RELEASED, _PRE, _DEV = 3, 2, 1


def parse_version(text: str) -> tuple[tuple[int, ...], int]:
    """The numbers of a version without trailing zeros, and whether it is a release (3), a pre-release (2) or a development version (1).

    A local part such as +cu130 is left out. ValueError if it is no version.
    """
    match = _VERSION.match(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is no version")
    numbers = [int(part) for part in match[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), _DEV if match[4] else _PRE if match[2] else _RELEASED


def is_within(version: str, ranges: str) -> bool:
    """Whether `version` is in all `ranges`, such as `>=2.13,<3` or `==8.5.*`; anything is within an empty text."""
    return all(_satisfies(version, operator, bound) for operator, bound in _CLAUSE.findall(ranges))


def _satisfies(version: str, operator: str, bound: str) -> bool:
    if bound.endswith(".*"):
        prefix = [int(part) for part in bound[:-2].split(".")]
        numbers = [*parse_version(version)[0], *[0] * len(prefix)]
        return (numbers[: len(prefix)] == prefix) == (operator != "!=")
    found, wanted = parse_version(version), parse_version(bound)
    if operator == "~=":
        parts = bound.split(".")
        return found >= wanted and _satisfies(version, "==", ".".join(parts[:-1]) + ".*")
    if operator == "<":  # 3.0rc1 is not below 3
        return found < wanted and not (found[1] != _RELEASED and found[0] == wanted[0] and wanted[1] == _RELEASED)
    return {
        "==": found == wanted,
        "===": found == wanted,
        "!=": found != wanted,
        ">=": found >= wanted,
        "<=": found <= wanted,
        ">": found > wanted,
    }[operator]
