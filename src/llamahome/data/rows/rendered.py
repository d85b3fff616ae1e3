"""Whether a text is a chat that some chat template rendered already, recognised by the mark of a turn at its beginning.

As a plain text all of it is learned, the questions too; as a question or an answer it would be rendered a second time.
"""

import re
from collections.abc import Mapping, Sequence

from llamahome.data.records import Conversation, Row
from llamahome.data.rows.formats import understand
from llamahome.errors import Problem
from llamahome.units import many

_SPEAKER = "(?:system|developer|user|human|assistant|model|tool|ipython)"
_RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<\|startoftext\|>|\[gMASK\]<sop>|<｜begin▁of▁sentence｜>)?\s*"
    rf"(?:(<\|im_start\|>){_SPEAKER}\b|(\[INST\])|(<start_of_turn>){_SPEAKER}\b|(<\|start_header_id\|>){_SPEAKER}\b"
    rf"|(<\|{_SPEAKER}\|>)|(<\|start\|>){_SPEAKER}\b|(<｜(?:User|Assistant)｜>)|(<\|START_OF_TURN_TOKEN\|>)|(<\|turn>){_SPEAKER}\b)"
)
"""A token that begins a text, if there is one, then the mark of a turn: ChatML, Llama, Gemma, Phi, gpt-oss, DeepSeek, Command R."""
_HINT = "write its turns into a list `messages`, without the marks of a template: then only the answers are learned"


def turn_mark(text: str) -> str | None:
    """The mark of the turn with which a rendered chat begins; None for any other text."""
    match = _RENDERED.match(text)
    return None if match is None else next(mark for mark in match.groups() if mark is not None)


def rendered_problem(text: str, where: str) -> Problem | None:
    """The warning for a row of plain text that is a rendered chat."""
    mark = turn_mark(text)
    if mark is None:
        return None
    message = f"the text is a chat that was rendered already ({mark}), so its questions are learned like its answers"
    return Problem(code="data.rendered-chat", message=message, where=where, hint=_HINT)


def rendered_note(rows: Sequence[Row | Problem], columns: Mapping[str, str]) -> str | None:
    """What is said before training if some of these rows of plain text are rendered chats."""
    read = [each.text or "" for row in rows if isinstance(row, Row) and isinstance(each := understand(row, "text", columns), Conversation)]
    marks = [mark for text in read if (mark := turn_mark(text)) is not None]
    if not marks:
        return None
    count = f"{len(marks)} of {many(len(read), 'row')} from everywhere are chats that were rendered already ({marks[0]})"
    return f"{count}, so questions are learned like answers; rows with a list `messages` learn the answers alone"
