"""Shows the answer to a question as it is generated; two answers in columns where the terminal is wide enough, else one below the other."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llamahome.cli.dialogue import Dialogue, Exchange

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROW = 72
"""Columns of a terminal below which two answers stand one below the other."""
_EVERY = 0.1
"""Seconds between two drawings of the columns."""


def visible(text: str) -> str:
    """`text` with symbols for control characters, by which a model could give orders to the terminal."""
    return "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else "\ufffd" if 127 <= ord(char) < 160 else char for char in text
    )


def show_answers(
    dialogue: Dialogue, question: str, *, note: Callable[[str], None], cancelled: Callable[[], bool] = lambda: False
) -> Exchange:
    """Ask, and show the answers on stdout and what there is to know about them as notes."""
    wide = sys.stdout.isatty() and shutil.get_terminal_size().columns >= _NARROW
    if dialogue.beside is None:
        exchange = dialogue.ask(question, write=_write, cancelled=cancelled)
        print(flush=True)
    elif wide:
        exchange = _in_columns(dialogue, question, cancelled)
    else:
        exchange = _below(dialogue, question, cancelled)
    for line in _remarks(dialogue, exchange):
        note(line)
    return exchange


def _write(text: str) -> None:
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _below(dialogue: Dialogue, question: str, cancelled: Callable[[], bool]) -> Exchange:
    begun = False

    def write_first(text: str) -> None:
        nonlocal begun
        if not begun:
            print(f"\n--- {dialogue.name} ---")
            begun = True
        _write(text)

    print(f"--- {dialogue.beside_name} ---", flush=True)
    exchange = dialogue.ask(question, write=write_first, write_beside=_write, cancelled=cancelled)
    print(flush=True)
    return exchange


def _in_columns(dialogue: Dialogue, question: str, cancelled: Callable[[], bool]) -> Exchange:
    """The columns are drawn again while the answers grow, at most as high as the terminal, and whole at the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    texts, drawn = ["", ""], 0.0

    def writer(column: int) -> Callable[[str], None]:
        def write(text: str) -> None:
            nonlocal drawn
            texts[column] += visible(text)
            if time.monotonic() - drawn > _EVERY:
                drawn = time.monotonic()
                live.update(_table(dialogue, texts, console), refresh=True)

        return write

    with Live(_table(dialogue, texts, console), console=console, auto_refresh=False, transient=True) as live:
        exchange = dialogue.ask(question, write=writer(1), write_beside=writer(0), cancelled=cancelled)
    console.print(_table(dialogue, texts, console))
    return exchange


def _table(dialogue: Dialogue, texts: list[str], console: "Console") -> "Table":
    from rich.table import Table
    from rich.text import Text

    width = (console.width - 3) // 2
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, collapse_padding=True, header_style="dim")
    for name in (dialogue.beside_name, dialogue.name):
        table.add_column(Text(name, overflow="ellipsis", no_wrap=True), width=width - 1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table


def _remarks(dialogue: Dialogue, exchange: Exchange) -> list[str]:
    """Why an answer ends before its end, and whether the conversation is longer than the model was trained on."""
    lines = []
    for model, name, answer in (
        (dialogue.model, dialogue.name, exchange.answer),
        (dialogue.beside, dialogue.beside_name, exchange.beside),
    ):
        if model is None or answer is None:
            continue
        of = f" of {name}" if dialogue.beside is not None else ""
        total, positions, trained = answer.prompt_tokens + answer.completion_tokens, model.limits.positions, model.limits.trained_length
        if answer.finish == "length" and positions is not None and total >= positions:
            lines.append(f"the answer{of} ends here because this model has {positions:,} positions")
        elif answer.finish == "length":
            lines.append(f"the answer{of} ends here because of --max-new-tokens {dialogue.sampling.max_new_tokens}")
        elif not answer.text and answer.finish == "stop":
            lines.append(f"the answer{of} is empty")
        if trained is not None and total > trained and not dialogue.told_of_length:
            dialogue.told_of_length = True
            lines.append(
                f"the conversation{of} has {total:,} tokens, and this model was trained on at most {trained:,}: answers may get worse"
            )
    return lines
