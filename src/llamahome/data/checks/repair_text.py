"""Repairs of text where nothing has to be guessed: text that was decoded with the wrong encoding, and JSON written by a person or Python.

Wrongly decoded text is found by sequences that no language writes, such as an A with tilde before a copyright sign. It is repaired only if
every character beyond ASCII takes part, the bytes that the characters came from are UTF-8, and the result is text. JSON is repaired (commas
before a closing bracket, comments, single quotes, None and True) only if the result is valid JSON with the same strings.
"""

import ast
import io
import json
import re
import tokenize
import unicodedata
import warnings
from itertools import pairwise

from llamahome.data.files.jsontext import from_json

_LOST = "\ufffd"
_HIGH = {byte: (bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)) for byte in range(0x80, 0xA0)}
"""The character that Windows-1252 has for each byte from 0x80 to 0x9f; five bytes have none and stay control characters."""
_TO_BYTE = {ord(character): byte for byte, character in _HIGH.items()} | {byte: byte for byte in range(0x80, 0x100)}
_ASCII = dict(zip(range(0x80), range(0x80), strict=True))
_BYTES = _TO_BYTE | _ASCII
_CONTINUATION = "[" + re.escape("".join(_HIGH.values())) + "\x80-\xbf]"
"""A second or later byte of a UTF-8 character, decoded as Latin-1 or Windows-1252."""
_WRONGLY_DECODED = re.compile(
    f"[\xc2\xc3]{_CONTINUATION}"  # Latin letters and signs; both letters are rare before a sign
    f"|\xe2(?:\u20ac|\x80){_CONTINUATION}"  # quotes, dashes, the ellipsis
    f"|\xf0(?:\u0178|\x9f){_CONTINUATION}{_CONTINUATION}"  # emoji
    f"|\xef\xbf\xbd|\xef\xbb\xbf"  # the replacement character, the byte order mark
    f"|(?:[\xd0\xd1]{_CONTINUATION}){{3}}|(?:[\xce\xcf]{_CONTINUATION}){{3}}"  # a word in Cyrillic or Greek
)
_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_NOT_TEXT = ("Cc", "Cn", "Co", "Cs")
"""Unicode categories that text does not have: control, unassigned, private use, surrogates."""
_MAX_ROUNDS = 3
"""Text is sometimes decoded wrongly more than once."""


def misread_at(text: str) -> int | None:
    """The first position that shows that the text was decoded with the wrong encoding."""
    if text.isascii():
        return None
    match = _WRONGLY_DECODED.search(text)
    return match.start() if match else None


def lost_at(text: str) -> int | None:
    """The position of the first replacement character: a character was lost there when the text was decoded."""
    at = -1 if text.isascii() else text.find(_LOST)
    return at if at >= 0 else None


def unprintable_at(text: str) -> int | None:
    """The position of the first control character other than tabs, line ends and page ends."""
    match = _UNPRINTABLE.search(text)
    return match.start() if match else None


def redecoded(text: str) -> str | None:
    """The text as it was before it was decoded wrongly; None if that is not certain or nothing is wrong."""
    result = None
    for _ in range(_MAX_ROUNDS):
        if misread_at(text) is None:
            break
        decoded = _decode_again(text)
        if decoded is None:
            break
        text = decoded
        if not any(unicodedata.category(character) in _NOT_TEXT for character in text if not character.isascii()):
            result = text
    return result


def _decode_again(text: str) -> str | None:
    try:
        decoded = bytes(_BYTES[ord(character)] for character in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
    return None if _LOST in decoded else decoded


_JSON_STRING = r'("(?:[^"\\]|\\.)*")'
_COMMENT = re.compile(_JSON_STRING + r"|//[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA = re.compile(_JSON_STRING + r"|,(?=\s*[}\]])", re.DOTALL)
_SEPARATOR = re.compile(r"\s*,?\s*")
_MAX_CHARACTERS = 1 << 20
"""A longer row (1 MiB) is not repaired, because Python's parser takes much memory."""


def as_json(text: str) -> str | None:
    """The text as a JSON object; None if it already is one, or if that takes guessing."""
    if len(text) > _MAX_CHARACTERS or _is_json(text):
        return None
    element = text.strip().strip(",").strip()  # lines of an array have a comma after each element
    if not element.startswith("{"):
        return None
    if element != text.strip() and _is_json(element):
        return element
    text = changed = element
    for pattern in (_COMMENT, _LAST_COMMA):
        changed = pattern.sub(lambda match: match[1] or "", changed)
    if changed != text and _is_json(changed):
        return changed
    return _from_python(text)


def objects_in(text: str) -> list[str]:
    """The JSON of each object of a line that holds several: side by side, separated by commas, or in a list. [] for any other line.

    A list of turns gives [], because it is one chat and not several rows.
    """
    text = text.strip()
    inner = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text
    decoder, objects, at = json.JSONDecoder(), list[str](), 0
    try:
        while at < len(inner):
            begin = at
            value, at = decoder.raw_decode(inner, begin)
            if not isinstance(value, dict) or {"role", "from"} & value.keys():
                return []
            objects.append(inner[begin:at])
            gap = _SEPARATOR.match(inner, at)
            at = gap.end() if gap else at
    except (ValueError, RecursionError):
        return []
    return objects if len(objects) > 1 or inner is not text else []


def _is_json(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict)
    except ValueError:
        return False


def _from_python(text: str) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an escape that Python does not know would be a guess
            kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline)]
            if (tokenize.STRING, tokenize.STRING) in pairwise(kinds):
                return None  # Python joins adjacent strings; a comma may be missing
            tree = ast.parse(text.strip(), mode="eval")
            if any(isinstance(node, ast.Dict) and _has_repeated_keys(node) for node in ast.walk(tree)):
                return None
            value = ast.literal_eval(tree)
        result = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return result if isinstance(value, dict) and json.loads(result) == value and _is_json(result) else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, Warning, tokenize.TokenError):
        return None


def _has_repeated_keys(node: ast.Dict) -> bool:
    keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
    return not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys)
