"""The text of an answer as its tokens come in: whole characters only, and nothing of a stop string.

A stop string may span tokens, so text that may be the beginning of one is held back until it is known. Only the last few tokens are
decoded again, so a long answer costs time in proportion to its length.
"""

from collections.abc import Callable, Sequence


class AnswerText:
    """Tokens in, text out. `decode` turns ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._start = self._done = 0
        self._held = ""
        self.text = ""
        """All that was given out."""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that is certain after these tokens."""
        self._ids += ids
        return self._release(self._decoded(last=False), last=False)

    def end(self) -> str:
        """The rest, after the last token."""
        return self._release(self._decoded(last=True), last=True)

    def _decoded(self, *, last: bool) -> str:
        before, after = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start :])
        if after.endswith("\ufffd") and not last:  # half a character, whose rest comes with the next token
            return ""
        self._start, self._done = self._done, len(self._ids)
        return after[len(before) :]

    def _release(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._held + new
        found = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, certain, self._held = True, pending[: min(found)], ""
        else:
            kept = 0 if last else max((_overlap(pending, stop) for stop in self._stops), default=0)
            certain, self._held = pending[: len(pending) - kept], pending[len(pending) - kept :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-length:])), 0)
