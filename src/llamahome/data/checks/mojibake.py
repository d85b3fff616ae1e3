"""Text that was read in the wrong encoding: UTF-8 taken for Latin-1 or Windows-1252, and characters that were lost or are none.

Such text is told by sequences that no language writes, like an A with tilde before a copyright sign. It is repaired only where that is
certain: every character beyond ASCII takes part, the bytes they came from are UTF-8, and what comes out is text.
"""

import re
import unicodedata

_LOST = "\ufffd"
_HIGH = {byte: (bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)) for byte in range(0x80, 0xA0)}
"""What a byte from 0x80 to 0x9f is read as in Windows-1252; five of them have no meaning there and stay control characters."""
_TO_BYTE = {ord(character): byte for byte, character in _HIGH.items()} | {byte: byte for byte in range(0x80, 0x100)}
_ASCII = dict(zip(range(0x80), range(0x80), strict=True))
_BYTES = _TO_BYTE | _ASCII
_NEXT = "[" + re.escape("".join(_HIGH.values())) + "\x80-\xbf]"
"""A second or later byte of a character in UTF-8, misread either way."""
_SURE = re.compile(
    f"[\xc2\xc3]{_NEXT}"  # Latin letters and signs; both letters are rare before a sign
    f"|\xe2(?:\u20ac|\x80){_NEXT}"  # quotes, dashes, the ellipsis
    f"|\xf0(?:\u0178|\x9f){_NEXT}{_NEXT}"  # emoji
    f"|\xef\xbf\xbd|\xef\xbb\xbf"  # the replacement character, the byte order mark
    f"|(?:[\xd0\xd1]{_NEXT}){{3}}|(?:[\xce\xcf]{_NEXT}){{3}}"  # a word in Cyrillic or Greek
)
_UNPRINTABLE = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
_NO_TEXT = ("Cc", "Cn", "Co", "Cs")
"""Unicode categories of what no one types: control, unassigned, private, half characters."""
_ROUNDS = 3
"""Text is sometimes misread more than once."""


def misread_at(text: str) -> int | None:
    """Where the text shows that it was read in the wrong encoding."""
    if text.isascii():
        return None
    found = _SURE.search(text)
    return found.start() if found else None


def lost_at(text: str) -> int | None:
    """Where a character was lost when the text was decoded: the first replacement character."""
    at = -1 if text.isascii() else text.find(_LOST)
    return at if at >= 0 else None


def unprintable_at(text: str) -> int | None:
    """Where a control character stands that no text has; tabs, line ends and page ends are text."""
    found = _UNPRINTABLE.search(text)
    return found.start() if found else None


def repaired(text: str) -> str | None:
    """What the misread text was, None when that is not certain or nothing was misread."""
    found = None
    for _ in range(_ROUNDS):
        if misread_at(text) is None:
            break
        better = _once(text)
        if better is None:
            break
        text = better
        if not any(unicodedata.category(character) in _NO_TEXT for character in text if not character.isascii()):
            found = text
    return found


def _once(text: str) -> str | None:
    try:
        better = bytes(_BYTES[ord(character)] for character in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
    return None if _LOST in better else better
