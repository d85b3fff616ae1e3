"""The conversation at the terminal or through a pipe: reads lines, obeys /commands, and lets Ctrl-C stop an answer."""

import difflib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from llamahome.cli.columns import show_answers
from llamahome.cli.dialogue import Dialogue, readable
from llamahome.cli.options import note
from llamahome.errors import LlamaHomeError

_COMMANDS = {
    "/undo": "forget the last question and its answer",
    "/save FILE": "write the conversation as a row of training data, FILE.jsonl",
    "/system TEXT": "set the system message; without TEXT, remove it",
    "/clear": "begin a new conversation with the same system message",
    "/help": "show this list",
    "/exit": "leave, as Ctrl-D and an empty line do",
}
_NAMES = tuple(text.split()[0] for text in _COMMANDS)
_COMMAND = re.compile(r"(/[A-Za-z?!]+)(?:\s+(.*))?", re.DOTALL)
"""A line that is a command; `/etc/hosts` is a question, and so is a line with two slashes at its beginning."""


def converse(dialogue: Dialogue) -> None:
    """Answer line after line until the end of the input, an empty line or /exit."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and remembers them
        note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    while (line := _ask(terminal)) is not None:
        command = _COMMAND.fullmatch(line)
        if command:
            if not _obey(dialogue, command[1], (command[2] or "").strip()):
                return
        else:
            _answer(dialogue, line[1:] if line.startswith("//") else line, terminal=terminal)


def _ask(terminal: bool) -> str | None:
    """The next line; None at the end of the conversation."""
    while True:
        try:
            if terminal and not sys.stdout.isatty():  # input() would write its prompt between the answers
                print("you> ", end="", file=sys.stderr, flush=True)
            line = input("you> " if terminal and sys.stdout.isatty() else "")
            return readable(line).strip() or None
        except EOFError:
            if terminal:
                print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("\nCtrl-D or /exit leaves")


def _answer(dialogue: Dialogue, question: str, *, terminal: bool) -> None:
    with _interrupts(terminal) as interrupted:
        try:
            exchange = show_answers(dialogue, question, note=note, cancelled=interrupted)
        except LlamaHomeError as error:
            _show(error)
            return
    if exchange.answer.finish == "cancelled":
        kept = bool(exchange.answer.text)
        note("stopped; /undo forgets this question" if kept else "stopped; this question is forgotten")


@contextmanager
def _interrupts(terminal: bool) -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed in this block; a second one leaves. Without a terminal the first one leaves."""
    pressed = False

    def press(_: int, __: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous: Any = signal.signal(signal.SIGINT, press) if terminal else None
    try:
        yield lambda: pressed
    finally:
        if terminal:
            signal.signal(signal.SIGINT, previous)


def _obey(dialogue: Dialogue, name: str, rest: str) -> bool:
    """Do what a command says; returns whether the conversation goes on."""
    if name == "/exit":
        return False
    if name == "/help":
        for text, what in _COMMANDS.items():
            note(f"{text:14} {what}")
    elif name == "/clear":
        dialogue.clear()
        note(f"a new conversation{', with the same system message' if dialogue.system else ''}")
    elif name == "/undo":
        note(f"forgotten: {_short(dialogue.exchanges.pop().question)}" if dialogue.exchanges else "there is no question to forget")
    elif name == "/system":
        _set_system(dialogue, rest)
    elif name == "/save":
        _save(dialogue, rest)
    else:
        near = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.6)
        instead = f"{near[0]} is the nearest" if near else f"the commands are {', '.join(_NAMES)}"
        note(f"there is no command {name}: {instead}; a question that begins with / is written with //")
    return True


def _set_system(dialogue: Dialogue, text: str) -> None:
    try:
        dialogue.set_system(text)
    except LlamaHomeError as error:
        _show(error)
        note("the conversation goes on without this system message")
        return
    note("the system message is set" if text else "there is no system message now")


def _save(dialogue: Dialogue, typed: str) -> None:
    try:
        words = shlex.split(typed)
    except ValueError:
        words = [typed]
    if len(words) != 1:
        note("/save FILE.jsonl")
        return
    path = Path(words[0]).expanduser()
    try:
        dialogue.save(path)
    except LlamaHomeError as error:
        _show(error)
        return
    cut = sum(exchange.answer.finish != "stop" for exchange in dialogue.exchanges)
    of = f", the answers of {dialogue.name}" if dialogue.beside is not None else ""
    shortened = f"; {cut} of {len(dialogue.exchanges)} answers end before their end" if cut else ""
    note(f"saved in {path}: one row of {len(dialogue.turns())} messages{of}{shortened}")


def _show(error: LlamaHomeError) -> None:
    note("\n".join(problem.render() for problem in error.problems))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
