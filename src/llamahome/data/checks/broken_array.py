"""Takes the objects out of a JSON array that is not closed, or that has commas or comments where JSON allows none, one to a line.

Only what is between the objects is repaired. Each object keeps its text, but for line ends, and its line number where the lines allow it.
Cost: two passes over the text.
"""

import re

_BETWEEN = re.compile(r"(?:[\s,\ufeff]|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_STRING_OR_LINE_END = re.compile(r'"(?:[^"\\]|\\.)*"|\s*\n\s*', re.DOTALL)


def lines_of_array(text: str) -> str | None:
    """JSON lines of the objects; None if nothing is wrong between them, or if anything but objects is in the array.

    An object that is cut off by the end of the text is the last line, as it is.
    """
    begin = text.find("[") + 1
    if not begin or text[: begin - 1].strip("\ufeff \t\r\n"):
        return None
    lines: list[str] = []
    at, line, right = begin, 1, True
    while True:
        gap = _BETWEEN.match(text, at)
        between, at = (gap[0], gap.end()) if gap else ("", at)
        closed = text[at : at + 1] == "]"
        right = right and between.replace("\ufeff", "").strip() == ("," if lines and not closed else "")
        if closed or at == len(text):
            right = right and closed and not text[at + 1 :].strip()
            break
        if text[at] != "{":
            return None
        end = _end_of(text, at)
        line += text.count("\n", at - len(between), at)
        lines += [""] * (line - len(lines) - 1)
        lines.append(_STRING_OR_LINE_END.sub(_on_one_line, text[at:end]))
        line += text.count("\n", at, end)
        at = end
    return None if right or not any(lines) else "".join(f"{each}\n" for each in lines)


def _end_of(text: str, begin: int) -> int:
    """The offset after the object that begins here; that of the end of the text if it does not end."""
    depth = 0
    for mark in _MARK.finditer(text, begin):
        if len(mark[0]) == 1:
            depth += 1 if mark[0] in "{[" else -1
        if not depth:
            return mark.end()
    return len(text)


def _on_one_line(match: re.Match[str]) -> str:
    return match[0].replace("\r", "\\r").replace("\n", "\\n") if match[0].startswith('"') else " "
