"""The encoding of a file that is not UTF-8: named only if it decodes the whole file into plausible text.

Plausible means: no control or unassigned characters, letters of one script in a word, no capital within a word, and mostly letters that are
frequent in the languages of the encoding. If two encodings give different plausible texts none is named, and neither is one for a file of
which a part is UTF-8. Cost: only if a byte was wrong; at most 256 KiB are scored, and the file is decoded once more.
"""

import codecs
import contextlib
import gzip
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

_SCORED = 1 << 18
"""Bytes of lines with other characters than ASCII."""
_BLOCK = 1 << 20
_LEAST, _AHEAD, _OLD = 0.6, 0.15, 0.85
"""Least share of frequent characters, least lead over other encodings, factor for old encodings. Measured on the texts of the test."""

_WEST = "éèàçêîôûâëïüùñóíáúäößåøæãõòìœÿÄÖÜÉÀÈÇÅØÆÑÓÁÍÚŒ¿¡«»“”‘’„–—…€£§°©®·×½²³´\xa0"
_CENTRAL = "ąćęłńśźżĄĆĘŁŃŚŹŻáčďéěíňóřšťúůýžÁČĎÉÍŇÓŘŠŤÚŮÝŽőűŐŰöüäôľĺŕăâîşţÖÜÄÎŞŢ„”“–’«»…\xa0"
_TURKISH = "ışğİçöüâîûŞĞÇÖÜ“”’…\xa0"
_RUSSIAN = "оеаинтсрвлкмдпуяыіё«»—–“”…\xa0№"
_GREEK = "αοιετσνηυρπκμλςόίάέήωύώ«»\xa0"
_HEBREW = "יוהלארמנתשבםעדקח\xa0"
_ARABIC = "اليمونرتبةعدسفهكحقأج،؟\xa0"
_THAI = "านรอกเงมยลวดทสตะปบคหแจพชขใไโ่้ีัิืุูำ์็"
_SIMPLIFIED = (
    "的一是不了在人有我他这中大来上个国和也子时道说出会要为生到可以下过天后学对家自地们事多没小能好开年那你心看起发得还用行里都成之如而"
    "前面样着去么从现所最日动方进电经问题什意思它词语言法请写给文章中因此其与或者等于使用可将被让把数据回答。，、？！：；（）“”《》"
)
_TRADITIONAL = (
    "的一是不了在人有我他這中大來上個國和也子時道說出會要為生到可以下過天後學對家自地們事多沒小能好開年那你心看起發得還用行裡都成之如而"
    "前面樣著去麼從現所最日動方進電經問題什意思它詞語言法請寫給文章因此其與或者等於使將被讓把數據回答。，、？！：；（）「」『』《》"
)
_JAPANESE = "".join(map(chr, range(0x3041, 0x3097))) + "".join(map(chr, range(0x30A1, 0x30FD))) + "。、？！「」（）ー・"
_LATIN = ("LATIN",)


@dataclass(frozen=True)
class _Candidate:
    codec: str
    name: str
    """As iconv spells it."""
    frequent: str | None
    """Characters beyond ASCII that are frequent in its languages; None: the syllables of Korean."""
    least: float = _LEAST
    scripts: tuple[str, ...] = _LATIN
    old: bool = False
    """Rarely met today, so a newer encoding wins if its text is as plausible."""


_CANDIDATES = (
    _Candidate("cp1252", "WINDOWS-1252", _WEST),
    _Candidate("latin-1", "ISO-8859-1", _WEST),
    _Candidate("iso8859-15", "ISO-8859-15", _WEST),
    _Candidate("mac-roman", "MACINTOSH", _WEST, old=True),
    _Candidate("cp850", "CP850", _WEST, old=True),
    _Candidate("cp437", "CP437", _WEST, old=True),
    _Candidate("cp1250", "WINDOWS-1250", _CENTRAL),
    _Candidate("iso8859-2", "ISO-8859-2", _CENTRAL),
    _Candidate("cp852", "CP852", _CENTRAL, old=True),
    _Candidate("cp1254", "WINDOWS-1254", _TURKISH),
    _Candidate("cp1251", "WINDOWS-1251", _RUSSIAN, 0.6, ("CYRILLIC",)),
    _Candidate("koi8-r", "KOI8-R", _RUSSIAN, 0.6, ("CYRILLIC",)),
    _Candidate("koi8-u", "KOI8-U", _RUSSIAN, 0.6, ("CYRILLIC",)),
    _Candidate("cp866", "CP866", _RUSSIAN, 0.6, ("CYRILLIC",)),
    _Candidate("iso8859-5", "ISO-8859-5", _RUSSIAN, 0.6, ("CYRILLIC",)),
    _Candidate("mac-cyrillic", "MAC-CYRILLIC", _RUSSIAN, 0.6, ("CYRILLIC",), old=True),
    _Candidate("cp1253", "WINDOWS-1253", _GREEK, 0.7, ("GREEK",)),
    _Candidate("iso8859-7", "ISO-8859-7", _GREEK, 0.7, ("GREEK",)),
    _Candidate("cp1255", "WINDOWS-1255", _HEBREW, 0.7, ("HEBREW",)),
    _Candidate("cp1256", "WINDOWS-1256", _ARABIC, 0.7, ("ARABIC",)),
    _Candidate("cp874", "CP874", _THAI, 0.7, ("THAI",)),
    _Candidate("gbk", "GBK", _SIMPLIFIED, 0.25, ("CJK",)),
    _Candidate("gb18030", "GB18030", _SIMPLIFIED, 0.25, ("CJK",)),
    _Candidate("big5", "BIG5", _TRADITIONAL, 0.25, ("CJK",)),
    _Candidate("cp932", "CP932", _JAPANESE, 0.35, ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")),
    _Candidate("euc-jp", "EUC-JP", _JAPANESE, 0.35, ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")),
    _Candidate("cp949", "CP949", None, 0.9, ("HANGUL", "CJK")),
)
_WITH_CAPITALS = ("LATIN", "CYRILLIC", "GREEK")
_LETTER_BY_LETTER = ("CYRILLIC", "GREEK", "HEBREW", "ARABIC", "THAI")
_NO_TEXT = ("Cc", "Cn", "Co", "Cs")
_ESCAPES = re.compile(rb"\x1b\$[@B][!-~]+\x1b\([BJ]")
"""Japanese between the escape sequences of ISO-2022-JP; all of it is ASCII, so nothing else would notice it."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_SPACES = frozenset("\t\r\n\f\ufeff")
_CAPITAL_WITHIN = re.compile(r"[a-zß-öø-ÿа-яё][A-ZÀ-ÖØ-ÞА-ЯЁΑ-Ω]")
_WITHIN = re.compile(r"[^\W\d_]([^\x00-\x7f’–—…·])(?=[^\W\d_])")


def help_for(path: str) -> str | None:
    """The command that converts the file to UTF-8; None if its encoding is not certain."""
    encoding = encoding_of(path)
    return None if encoding is None else to_utf8(encoding, path)


def to_utf8(encoding: str, path: str) -> str:
    """The iconv command for a file in this encoding, unpacked first if it is an archive."""
    place, unpack = Path(path), {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower())
    inner = place.with_suffix("") if unpack else place
    target, source = shlex.quote(f"{inner.stem}-utf8{inner.suffix}"), shlex.quote(path)
    if unpack:
        return f"{unpack} -dc {source} | iconv -f {encoding} -t UTF-8 > {target}"
    return f"iconv -f {encoding} -t UTF-8 {source} > {target}"


def encoding_of(path: str) -> str | None:
    """The encoding, as iconv spells it, of a file that is not UTF-8; None if it is not certain."""
    with contextlib.suppress(OSError):
        status = Path(path).stat()
        return _detect(path, status.st_size, status.st_mtime_ns)
    return None


def codec_of(encoding: str) -> str:
    """Python's name of an encoding that encoding_of or wide_encoding named."""
    return next((candidate.codec for candidate in _CANDIDATES if candidate.name == encoding), encoding)


@lru_cache(maxsize=64)
def _detect(path: str, _size: int, _modified_ns: int) -> str | None:
    if path.lower().endswith(".zst"):
        return None  # the standard library does not read it
    with contextlib.suppress(OSError, EOFError):
        best = _likeliest(_undecodable_lines(path))
        if best is not None and _decodes_to_text(path, best.codec):
            return best.name
    return None


def _opened(path: str) -> IO[bytes]:
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]


def _undecodable_lines(path: str) -> bytes:
    """Lines that are not UTF-8; nothing if many of the lines beyond ASCII are, because then the file is in no single encoding."""
    lines, size, as_utf8 = [], 0, 0
    with _opened(path) as file:
        while size < _SCORED and (line := file.readline(_SCORED)):
            if line.isascii():
                continue
            try:
                line.decode("utf-8")
                as_utf8 += 1
            except UnicodeDecodeError:
                lines.append(line)
            size += len(line)
    return b"".join(lines) if as_utf8 * 10 <= len(lines) else b""


def _likeliest(raw: bytes) -> _Candidate | None:
    """The one candidate that makes plausible text of the bytes; None if there is none, or if two make different texts."""
    plausible: list[tuple[float, _Candidate, str]] = []
    for candidate in _CANDIDATES if raw else ():
        try:
            text = raw.decode(candidate.codec)
        except UnicodeDecodeError:
            continue
        share = _share(text, candidate)
        if share is not None and share >= candidate.least:
            plausible.append((share / candidate.least * (_OLD if candidate.old else 1), candidate, text))
    if not plausible:
        return None
    best, _, text = max(plausible, key=lambda scored: scored[0])
    rivals = [score for score, _, other in plausible if other != text and score > best - _AHEAD]
    return None if rivals else next(candidate for _, candidate, other in plausible if other == text)


def _share(text: str, candidate: _Candidate) -> float | None:
    """The share of frequent characters among those beyond ASCII; None if the text is not plausible."""
    others = [character for character in text if character > "\x7f"]
    kinds = {character: unicodedata.category(character) for character in set(others)}
    if not others or any(kind in _NO_TEXT for kind in kinds.values()):
        return None
    letters = [character for character in others if kinds[character][0] == "L"]
    if not letters and candidate.scripts != _LATIN:
        return None
    if sum(unicodedata.name(letter, "").startswith(candidate.scripts) for letter in letters) < 0.9 * len(letters):
        return None
    if candidate.scripts == _LATIN:
        odd = sum(len(run) for run in re.findall(r"[^\x00-\x7f]{3,}", text))
    elif candidate.scripts[0] in _LETTER_BY_LETTER:
        odd = len(re.findall(r"[A-Za-z][^\W\d_A-Za-z]|[^\W\d_A-Za-z][A-Za-z]", text))
        in_words = sum(len(run) for run in re.findall(r"[^\x00-\x7f]+", text) if len(run) > 2)
        if in_words < 0.5 * len(letters):
            odd = len(others)
    else:
        odd = 0
    if odd > (0.25 if candidate.scripts == _LATIN else 0.1) * len(others):
        return None
    if candidate.frequent is None:
        return sum("\uac00" <= letter <= "\ud7a3" for letter in letters) / max(1, len(letters))
    good = sum(character in candidate.frequent for character in others)
    capitals = signs = 0
    if candidate.scripts[0] in _WITH_CAPITALS:
        capitals = sum(not pair[1].isascii() for pair in _CAPITAL_WITHIN.findall(text))
        signs = sum(kinds[sign][0] not in "LM" for sign in _WITHIN.findall(text))
    return (good - 2 * (capitals + signs)) / len(others)


def _decodes_to_text(path: str, codec: str) -> bool:
    """Whether the whole file is text in this encoding, read a block at a time."""
    with _opened(path) as file:
        return decodes(iter(lambda: file.read(_BLOCK), b""), codec, to_text=True)


def _sane(text: str) -> bool:
    """Whether no character is a control, unassigned or private one, except line ends, tabs and page ends."""
    return not any(unicodedata.category(character) in _NO_TEXT for character in set(text) - _SPACES)


def wide_encoding(head: bytes, read: Callable[[], Iterator[bytes]]) -> str | None:
    """UTF-16, UTF-32 (with or without a mark) or ISO-2022-JP, as iconv spells it; None for others. `read` gives the whole file."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if _ESCAPES.search(head) and decodes(read(), "ISO-2022-JP"):
        return "ISO-2022-JP"
    if b"\0" not in head:
        return None
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        if _is_wide(head[: len(head) // 4 * 4], name) and decodes(read(), name):
            return name
    return None


def _is_wide(head: bytes, name: str) -> bool:
    """Whether the bytes are text in this encoding that is partly ASCII, because line ends and brackets are."""
    text = _decoded(head, name)
    if not text or not _sane(text):
        return False
    as_utf8 = _decoded(head, "utf-8") if name.startswith("UTF-16") else None
    is_utf8 = as_utf8 is not None and _sane(as_utf8.replace("\0", ""))  # then it is most likely UTF-8 with a stray NUL
    return sum(map(str.isascii, text)) / len(text) >= (0.8 if is_utf8 else 0.1)


def _decoded(head: bytes, name: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(name)().decode(head)
    except UnicodeDecodeError:
        return None


def decodes(blocks: Iterator[bytes], name: str, *, to_text: bool = False) -> bool:
    """Whether all `blocks`, one after the other, are in the encoding `name`, and without control characters if `to_text`."""
    decoder = codecs.getincrementaldecoder(name)()
    try:
        for block in blocks:
            text = decoder.decode(block)
            if to_text and not _sane(text):
                return False
        text = decoder.decode(b"", final=True)
        return not to_text or _sane(text)
    except UnicodeDecodeError:
        return False
