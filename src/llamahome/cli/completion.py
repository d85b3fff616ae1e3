"""--install-completion and --show-completion: click's completion scripts for bash, zsh and fish."""

import os
import sys
from pathlib import Path

import click

from llamahome.errors import Problem, UsageError

_VARIABLE = "_LLAMAHOME_COMPLETE"
_SHELLS = {
    "bash": (".bash_completions/llamahome.sh", ".bashrc", "source ~/.bash_completions/llamahome.sh"),
    "zsh": (".zfunc/_llamahome", ".zshrc", "fpath+=~/.zfunc; autoload -Uz compinit; compinit"),
    "fish": (".config/fish/completions/llamahome.fish", None, ""),
}
"""Shell -> (the script, the start-up file that must load it, the line that loads it), below the home folder. fish loads it by itself."""


def complete(app: click.Group) -> None:
    """Answer a request of an installed completion script and exit; without one, do nothing."""
    if instruction := os.environ.get(_VARIABLE):
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(app, {}, "llamahome", _VARIABLE, instruction))


def _show(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if requested and not ctx.resilient_parsing:
        print(_script(ctx, _shell()))
        ctx.exit()


def _install(ctx: click.Context, _: click.Parameter, requested: bool) -> None:
    if not requested or ctx.resilient_parsing:
        return
    shell = _shell()
    script, start_up, line = _SHELLS[shell]
    path = Path.home() / script
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_script(ctx, shell) + "\n", encoding="utf-8")
    if start_up is not None:
        rc = Path.home() / start_up
        text = rc.read_text(encoding="utf-8") if rc.is_file() else ""
        if line not in text.splitlines():
            rc.write_text(f"{text.rstrip()}\n\n{line}\n".lstrip(), encoding="utf-8")
    print(f"{shell} completion installed in {path}; it works in a new terminal")
    ctx.exit()


def _shell() -> str:
    """The user's shell, from $SHELL; raises UsageError for one that click has no script for."""
    name = Path(os.environ.get("SHELL", "")).name
    if name not in _SHELLS:
        message = f"no completion for the shell {name!r}; there are {', '.join(_SHELLS)}"
        raise UsageError(Problem(code="usage.bad-choice", message=message, where="$SHELL", hint="SHELL=bash llamahome --show-completion"))
    return name


def _script(ctx: click.Context, shell: str) -> str:
    from click.shell_completion import get_completion_class

    completion = get_completion_class(shell)
    assert completion is not None
    return completion(ctx.command, {}, "llamahome", _VARIABLE).source().strip()


install_option = click.option(
    "--install-completion",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_install,
    help="Install completion for the current shell.",
)
show_option = click.option(
    "--show-completion",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show,
    help="Show completion for the current shell, to copy it or customize the installation.",
)
