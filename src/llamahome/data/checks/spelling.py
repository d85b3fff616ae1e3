"""JSON that a person or Python wrote: commas before a closing bracket, comments, single quotes, None and True; each is put as JSON has it.

The result is taken only when it is valid JSON and nothing had to be guessed: texts stay as they are, and a key that stands twice is left.
"""

import ast
import io
import json
import re
import tokenize
import warnings
from itertools import pairwise

from llamahome.data.files.jsontext import from_json

_STRING = r'("(?:[^"\\]|\\.)*")'
_COMMENT = re.compile(_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_COMMA = re.compile(_STRING + r"|,(?=\s*[}\]])", re.DOTALL)
_LONGEST = 1 << 20
"""Characters (1 MiB); a longer row is left to a person, for Python's parser takes much memory."""


def as_json(text: str) -> str | None:
    """The text as JSON; None when it is JSON already, or cannot be made so without guessing."""
    if len(text) > _LONGEST or not text.lstrip().startswith("{") or _is_json(text):
        return None
    found = text
    for pattern in (_COMMENT, _COMMA):
        found = pattern.sub(lambda match: match[1] or "", found)
    if found != text and _is_json(found):
        return found
    return _from_python(text)


def _is_json(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict)
    except ValueError:
        return False


def _from_python(text: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that Python does not know is a guess
            kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
            if (tokenize.STRING, tokenize.STRING) in pairwise(kinds):
                return None  # Python joins two texts side by side; a comma may be missing
            tree = ast.parse(text.strip(), mode="eval")
            if any(isinstance(node, ast.Dict) and _has_twins(node) for node in ast.walk(tree)):
                return None
            value = ast.literal_eval(tree)
        found = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return found if isinstance(value, dict) and json.loads(found) == value and _is_json(found) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, Warning, tokenize.TokenError):
        return None


def _has_twins(node: ast.Dict) -> bool:
    keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
    return not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys)
