"""Checks settings files, variables, and what an outer launcher has left in the environment."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.doctor.checks import Check, Request, failed, one_line, passed, warned
from llamahome.errors import LlamaHomeError, Problem

if TYPE_CHECKING:
    from llamahome.config.load import LoadedConfig

_PREFIX = "LLAMAHOME_"
_OWN_VARIABLES = {
    "LLAMAHOME_CPU_LEVEL",
    "LLAMAHOME_BEGUN",
    "LLAMAHOME_COMPLETE",
    "LLAMAHOME_LAUNCH",
    "LLAMAHOME_LAUNCHER_PID",
    "LLAMAHOME_ROUND",
}
"""Variables of llamahome that are no settings."""
_MOST_SHOWN = 3
_COMMAND = re.compile(r"(?:llamahome|export|unset|git|iconv|gzip|zstd|unzip|tar|jq|mv|rm|make|python3|nvidia-smi) ")
_SENTENCE = re.compile(r",? (?:or|then|if|which|in|instead|when) |, ")
"""Where the command of a hint ends and a sentence goes on."""
_FOR_PEOPLE = ("config.no-such-file",)
"""Codes whose hint begins like a command and is none."""


def load_settings(request: Request, more: Sequence[str] = ()) -> "LoadedConfig":
    """The settings of a command with these words, with further assignments on top. Raises ConfigError, ImportError."""
    from llamahome.config.load import load_config

    files = [Path(each) for each in request.files]
    assignments = [*request.assignments, *more]
    return load_config(files, flags=request.flags, assignments=assignments, environment=request.environment)


def setting_checks(request: Request) -> Iterator[Check]:
    """Whether the files, the variables, and then all settings together are right."""
    from llamahome.config.check import check_config
    from llamahome.config.layers import environment_entries, file_entries, standard_files

    problems: list[Problem] = []
    files = [*standard_files(Path()), *(Path(each) for each in request.files)]
    for path in files:
        file_entries(path, problems)
    shown = ", ".join(str(path) for path in files) or "none, the defaults are used"
    wrong_files = bool(problems)
    yield of_problems("settings-files", problems) if problems else passed("settings-files", shown)
    problems = []
    environment_entries(request.environment, problems)
    wrong_variables = bool(problems)
    yield variable_check(request.environment, problems)
    if wrong_files or wrong_variables:
        return
    try:
        loaded = load_settings(request)
    except LlamaHomeError as error:
        yield of_problems("settings", error.problems)
        return
    problems = check_config(loaded.config, loaded.origins)
    if problems:
        yield of_problems("settings", problems)
    else:
        chosen = sum(origin != "default" for origin in loaded.origins.values())
        yield passed("settings", f"{chosen} of {len(loaded.origins)} are not at their default")


def of_problems(name: str, problems: Sequence[Problem]) -> Check:
    """One failed check for all problems of a stage, with the command of the first that has one; other hints stand in the detail."""
    texts = [_text_of(each) for each in problems[:_MOST_SHOWN]]
    more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return failed(name, one_line("; ".join(texts)) + more, next((command for each in problems if (command := command_of(each))), None))


def _text_of(problem: Problem) -> str:
    where = f"{problem.where}: " if problem.where else ""
    hint = f" ({problem.hint})" if problem.hint and command_of(problem) is None else ""
    return f"{where}{problem.message}{hint}"


def command_of(problem: Problem) -> str | None:
    """The hint of a problem as a line that a shell takes; None if it is a sentence, or for a person to do."""
    hint = problem.hint or ""
    if hint.startswith("--"):
        return f"llamahome doctor {_SENTENCE.split(hint)[0]}"
    return _SENTENCE.split(hint)[0] if _COMMAND.match(hint) and problem.code not in _FOR_PEOPLE else None


def variable_check(environment: Mapping[str, str], problems: Sequence[Problem]) -> Check:
    """`problems` are those of variables that look like settings; others that nothing reads are named, too."""
    if problems:
        return of_problems("variables", problems)
    from llamahome.config.describe import settings

    known = {setting.variable for setting in settings().values()} | _OWN_VARIABLES
    unknown = sorted(name for name in environment if name.startswith(_PREFIX) and name not in known)
    if unknown:
        return warned("variables", f"{', '.join(unknown)}: nothing reads it", f"unset {shlex.join(unknown)}")
    used = sorted(name for name in environment if name.startswith(_PREFIX))
    return passed("variables", ", ".join(used) or f"no {_PREFIX} variable is set")


def launcher_check(environment: Mapping[str, str]) -> Check:
    """Whether variables of a launcher make a run wait for processes that nobody has started."""
    from llamahome.distributed.rank_info import find_rank_info, leftovers

    try:
        info = find_rank_info(environment)
    except LlamaHomeError as error:
        return of_problems("launcher", error.problems)
    names = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in environment]
    unset = f"unset {' '.join(names)}"
    if info.joins and info.size > 1 and info.starter == "torchrun":
        text = f"RANK={info.rank} and WORLD_SIZE={info.size} are set: a run waits for {info.size} processes at {info.address}:{info.port}"
        if "TORCHELASTIC_RUN_ID" in environment:
            return passed("launcher", f"{text}; torchrun has started them")
        return failed("launcher", f"{text}, and no launcher has started them", unset)
    if info.joins and info.size > 1:
        return passed("launcher", f"process {info.rank} of {info.size}, started by {info.starter}")
    if info.joins:
        return warned("launcher", "RANK and WORLD_SIZE are set: a run is the only process and starts no others", unset)
    ignored = leftovers(environment)
    if ignored:
        return warned("launcher", f"{', '.join(ignored)} is left over from another program and is ignored", unset)
    return passed("launcher", "no launcher's variables are set")
