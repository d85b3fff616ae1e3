"""The command line as a whole: which groups of commands there are, how errors are shown, and the exit status.

Importing this module must stay cheap: `llamahome --help` answers within 0.3 s, so no torch, no transformers, no pydantic at the top.
"""

import sys

import typer

from llamahome import __version__
from llamahome.errors import LlamaHomeError

app = typer.Typer(
    name="llamahome",
    help="Fine-tune a language model on your data.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
