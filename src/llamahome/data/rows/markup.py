"""Whether a text is HTML, whose tags would be learned as they stand; fenced code is not looked at, and neither are other tags.

Files that begin like a web page are refused before (files/served.py); this is about parts of pages: saved articles, exports, Markdown.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamahome.data.files.commands import run_python, sibling
from llamahome.data.files.kinds import ending, is_text
from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem
from llamahome.units import many

_FEWEST = 3
"""Tags; a text with fewer may speak of them."""
_SHARE = 0.1
"""Of the characters that tags take. Markdown with a picture or a line break here and there stays below it."""
_FENCED = re.compile(r"^(```|~~~).*?(^\1|\Z)", re.DOTALL | re.MULTILINE)
_NAMES = (
    "html|head|body|title|meta|link|script|style|div|span|p|br|hr|a|b|i|u|em|strong|small|h[1-6]|ul|ol|li|dl|dt|dd|table|thead|tbody|tr|td|th"
    "|img|figure|figcaption|section|article|header|footer|main|nav|aside|blockquote|pre|code|form|input|button|label|select|option|font|center"
)
_TAG = re.compile(rf"</?(?:{_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_WITHOUT_TAGS = (
    "import html,re,sys; t=open(sys.argv[1],encoding='utf-8-sig').read(); "
    "print(html.unescape(re.sub('(?is)<(script|style)[ >].*?</[a-z]+>|</?[a-z][^<>]*>','',t)),end='')"
)


def is_markup(text: str) -> bool:
    """Whether a tenth of the text is tags of HTML, or it begins and ends with one; at least three of them."""
    if "</" not in text:
        return False
    bare = _FENCED.sub("", text).strip()
    tags = [(match.start(), match.end()) for match in _TAG.finditer(bare)]
    if len(tags) < _FEWEST:
        return False
    return (tags[0][0] == 0 and tags[-1][1] == len(bare)) or sum(end - begin for begin, end in tags) >= _SHARE * len(bare)


def markup_problem(text: str, path: str, where: str) -> Problem | None:
    """The warning for a row of plain text that is HTML, with a command that takes the tags out if the file is the text."""
    if not is_markup(text):
        return None
    command = run_python(_WITHOUT_TAGS, path, output=sibling(path, "-text.txt"))
    plain_file = is_text(path) and Path(path).suffix.lower() == ending(path)  # not packed
    otherwise = "take the tags out, unless HTML is what the model shall write"
    hint = f"{command}   writes it without tags, to train on instead" if plain_file else otherwise
    message = "the text looks like HTML, and its tags are learned as text"
    return Problem(code="data.markup", message=message, where=where, hint=hint)


def markup_note(rows: Sequence[Row | Problem], columns: Mapping[str, str]) -> str | None:
    """What is said before training if some of these rows of plain text are HTML."""
    texts = [each.text or "" for row in rows if isinstance(row, Row) and isinstance(each := understand(row, "text", columns), Conversation)]
    count = sum(map(is_markup, texts))
    if not count:
        return None
    return f"{count} of {many(len(texts), 'row')} from everywhere look like HTML ({count / len(texts):.0%}); their tags are learned as text"
