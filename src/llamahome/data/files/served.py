"""What a server sent instead of a file of rows: a web page, XML, or the message of an error in JSON or in plain text.

Downloads save such answers under the name of the file that was asked for. Cost: the first bytes, which are read anyway.
"""

import re
from collections.abc import Mapping
from typing import Any

from llamahome.data.files.jsontext import json_or_none

DOWNLOAD_AGAIN = (
    "download the file itself again: instead of /blob/ an address has /resolve/ on Hugging Face and /raw/ on GitHub, "
    "and a private or gated file needs a login"
)
WRITE_ROWS = "XML is not read: write each row as one JSON object a line"
_HTML = re.compile(r"(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title>", re.IGNORECASE | re.DOTALL)
_XML = re.compile(r"<\?xml\b|<!doctype\b", re.IGNORECASE)
_ELEMENT = re.compile(r"<([A-Za-z][\w:.-]*)[\s/>]")
_FAILED = re.compile(
    r"\b(not found|access denied|forbidden|unauthori[sz]ed|invalid (?:username|credentials|token)|rate limit|too many requests"
    r"|is restricted|must be (?:authenticated|logged in)|bad (?:gateway|request)|(?:service|temporarily) unavailable"
    r"|internal server error|gateway time-?out)\b",
    re.IGNORECASE,
)
_NAMES_ERROR = {"error", "errors", "detail", "error_description", "documentation_url"}
_NAMES_STATUS = {"status", "statuscode", "status_code", "code", "success", "ok"}
_BESIDE = {"message", "details", "type", "title", "path", "timestamp", "request_id", "requestid", "instance", "msg", "reason", "url"}
_LONGEST = 4096
"""Bytes of a message; rows are hardly ever one so short object with such keys alone."""


def served_instead(head: bytes, size: int, named: str | None) -> tuple[str, str] | None:
    """What the content of a file is if a server sent it instead of rows, and what to do; None if it may be rows.

    `head` is its first bytes, `size` how many it has, `named` its kind by its name (None: the content decides).
    """
    text = head.decode("utf-8-sig", "replace").lstrip()
    if _HTML.match(text):
        return _page(text), DOWNLOAD_AGAIN
    as_json = named in (None, "jsonl", "array")
    if _XML.match(text) or (as_json and _ELEMENT.match(text)):
        return (_page(text), DOWNLOAD_AGAIN) if "<html" in text[:2000].lower() else _xml(text)
    if size > _LONGEST or named == "text":
        return None
    message = _message(json_or_none(text.encode())) if as_json else None
    if message is None and text[:1] not in ("{", "[", '"') and text.strip().count("\n") < (3 if as_json else 1) and _FAILED.search(text):
        message = text
    return None if message is None else (f'an error message of a server ("{_short(message)}")', DOWNLOAD_AGAIN)


def _page(text: str) -> str:
    title = _TITLE.search(text)
    return f'a web page ("{_short(title[1])}")' if title and title[1] else "a web page"


def _xml(text: str) -> tuple[str, str]:
    element = _ELEMENT.search(text)
    root = element[1] if element else ""
    return f"XML (<{root}>)" if root else "XML", DOWNLOAD_AGAIN if root.lower().endswith(("error", "fault")) else WRITE_ROWS


def _message(value: Any) -> str | None:
    """The text of an object that holds an error and nothing else."""
    if not isinstance(value, dict):
        return None
    keys = {key.lower() for key in value}
    failed = keys & _NAMES_ERROR or ("message" in keys and keys & _NAMES_STATUS)
    if not failed or keys - _NAMES_ERROR - _NAMES_STATUS - _BESIDE:
        return None
    return _first_text(value)


def _first_text(value: Any) -> str | None:
    """The first text in a value, of an object first that under the keys of an error."""
    if isinstance(value, str):
        return value.strip() or None
    inner: list[Any] = list(value) if isinstance(value, list) else []
    if isinstance(value, Mapping):
        inner = [part for _, part in sorted(value.items(), key=lambda item: item[0].lower() not in {*_NAMES_ERROR, "message"})]
    return next((found for part in inner if (found := _first_text(part))), None)


def _short(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= 80 else plain[:77] + "..."
