"""A metric or a reward that is a function in a Python file of the user's: loads it, calls it, and checks what it returns."""

import ast
import difflib
import importlib.util
import inspect
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llamahome.errors import ConfigError, Problem

Third = Literal["prompt", "row"]
_ROW_NAMES = ("row", "record", "example")
_GREATEST = 1e30
"""The greatest size of a number: means of a few, and differences in float32, must be finite, too."""


@dataclass(frozen=True)
class Use:
    """What a function is for, in the words and codes of its errors."""

    name: str
    value: str
    """What it returns."""
    option: str
    failed_code: str
    unreadable_code: str

    def failed(self, path: Path, message: str, *, excerpt: str | None = None) -> ConfigError:
        """The function raised, or returned no number."""
        hint = f"return a finite number for every answer, such as 0.0 for one that cannot be judged, in {path}"
        return ConfigError(Problem(code=self.failed_code, message=message, where=str(path), hint=hint, excerpt=excerpt))

    def unreadable(self, path: Path, message: str, *, function: str | None = None, excerpt: str | None = None) -> ConfigError:
        """The file has no such function; `function` is the one that is meant."""
        hint = f"{self.option} {path}:{function}" if function else f"{self.option} FILE.py:FUNCTION, with a function of (answer, reference)"
        return ConfigError(Problem(code=self.unreadable_code, message=message, where=str(path), hint=hint, excerpt=excerpt))


METRIC = Use("metric", "score", "--metric", "evaluation.metric-failed", "evaluation.metric-unreadable")
REWARD = Use("reward", "reward", "--reward", "training.reward-failed", "training.reward-unreadable")


@dataclass(frozen=True)
class TorchSettings:
    """What of torch a file may change for the whole process."""

    gradients: bool
    dtype: torch.dtype
    threads: int

    @classmethod
    def now(cls) -> "TorchSettings":
        """As they are."""
        return cls(torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())

    def apply(self) -> None:
        """Set them."""
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's that scores an answer."""

    path: Path
    name: str
    call: Callable[..., Any]
    third: Third | None
    """What the function takes after answer and reference."""
    use: Use = METRIC
    settings: TorchSettings | None = None
    """With which its file was left."""

    def score(self, prompt: str, answer: str, reference: str, *, row: dict[str, Any] | None = None, where: str | None = None) -> float:
        """What the function returns. Raises ConfigError if it raises, returns no finite number, or needs a row and there is none."""
        if self.third == "row" and row is None:
            raise self._failed(f"{self.name} takes the row of the data, and here is only its prompt", where)
        further = {None: (), "prompt": (prompt,), "row": (row,)}[self.third]
        try:
            with _same_state(self.settings):
                value = self.call(answer, reference, *further)
                value = value.item() if hasattr(value, "item") and not isinstance(value, numbers.Real) else value
        except BaseException as error:  # a function of the user's may raise anything
            if _is_stop(error):
                raise
            message = f"{self.name} raised {_named(error)}"
            raise self._failed(message, where, excerpt=_own_line(error, self.path)) from error
        if not isinstance(value, numbers.Real) or not _is_usable(value):
            number = f"a finite number of at most {_GREATEST:.0e} in size"
            message = f"{self.name} returned {_shown(value)} ({type(value).__name__}), and a {self.use.value} is {number}"
            raise self._failed(message, where)
        return float(value)

    def _failed(self, message: str, where: str | None, *, excerpt: str | None = None) -> ConfigError:
        place = f" on the row {where}" if where else ""
        return self.use.failed(self.path, message + place, excerpt=excerpt)


@contextmanager
def _same_state(inside: TorchSettings | None = None) -> Iterator[None]:
    """Return afterwards to the working directory, which the run's relative paths depend on, and to the settings of torch.

    A file that loads a model of its own often turns gradients off, or changes the default type, for the whole process; its functions
    get that again, `inside`.
    """
    before = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))  # a descriptor, because a folder that was moved or removed has no path
    outside = TorchSettings.now()
    try:
        if inside is not None:
            inside.apply()
        yield
    finally:
        outside.apply()
        os.fchdir(before)
        os.close(before)


def _is_stop(error: BaseException) -> bool:
    """Whether a signal has ended the run while the user's code ran: Ctrl-C, or what the handlers of llamahome raise."""
    return isinstance(error, KeyboardInterrupt) or type(error).__module__.partition(".")[0] == "llamahome"


_NOT_SHOWN = (ValueError, TypeError, AttributeError, RecursionError)
"""What `repr` raises of whole numbers of more than 4,300 digits, and of classes of the user's."""


def _shown(value: Any) -> str:
    """The beginning of a value, as a person would write it."""
    try:
        return repr(value)[:80]
    except _NOT_SHOWN as error:
        return "a whole number of thousands of digits" if isinstance(value, int) else f"what cannot be shown ({type(error).__name__})"


def _is_usable(value: numbers.Real) -> bool:
    try:
        return abs(float(value)) <= _GREATEST  # not NaN either
    except OverflowError:  # a whole number above what a float holds
        return False


def load_function(name: str, use: Use = METRIC) -> UserFunction:
    """The function of `FILE.py:FUNCTION`; what is in the folder of the file can be imported from. Raises ConfigError."""
    written, _, function = name.rpartition(":") if ":" in name and not name.endswith(".py") else (name, "", "")
    path = Path(written).expanduser()
    if not path.is_file():
        raise use.unreadable(path, "there is no such file")
    if not function:
        defined = _defined(path)
        meant = defined[0] if len(defined) == 1 else "FUNCTION"
        raise use.unreadable(path, f"which function? {_listed(defined)}", function=meant)
    module, settings = _run(path, use)
    found = getattr(module, function, None)
    if not callable(found):
        defined = _defined(path)
        close = difflib.get_close_matches(function, defined, n=1)
        raise use.unreadable(path, f"it has no function {function!r}; {_listed(defined)}", function=close[0] if close else None)
    return UserFunction(path, function, found, _third(path, function, found, use), use, settings)


def _run(path: Path, use: Use) -> tuple[Any, TorchSettings]:
    """The module of the file, which is run now, and the settings of torch after that."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"metric_of_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise use.unreadable(path, "it is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        with _same_state():
            spec.loader.exec_module(module)
            settings = TorchSettings.now()
    except BaseException as error:  # a file of the user's may raise anything
        if _is_stop(error):
            raise
        message = f"it cannot be imported: {_named(error)}"
        raise use.unreadable(path, message, excerpt=_own_line(error, path)) from error
    return module, settings


def _third(path: Path, name: str, function: Callable[..., Any], use: Use) -> Third | None:
    """What the function takes as its third value: nothing, the prompt, or the row if it is called so or a dict. Raises ConfigError."""
    takes = "takes (answer, reference), (answer, reference, prompt) or (answer, reference, row)"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins
        return None
    fixed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.kind in fixed]
    third = parameters[2] if len(parameters) > 2 else None
    wanted: Third | None = None
    if third is not None:
        if third.name in _ROW_NAMES or "dict" in str(third.annotation) or "Mapping" in str(third.annotation):
            wanted = "row"
        elif third.default is inspect.Parameter.empty or third.name == "prompt":
            wanted = "prompt"
    try:
        signature.bind(*("", "", "")[: 3 if wanted else 2])
    except TypeError as error:
        raise use.unreadable(path, f"{name}{signature} cannot be a {use.name}: a {use.name} {takes}") from error
    if inspect.iscoroutinefunction(function):
        raise use.unreadable(path, f"{name} is an async function, and a {use.name} is a plain one")
    return wanted


def _defined(path: Path) -> list[str]:
    """The public functions of a file, in order, read without running it."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _listed(defined: list[str]) -> str:
    return f"it has {', '.join(defined[:8])}" if defined else "it has no public function"


def _named(error: BaseException) -> str:
    """The kind of an error and the first line of its text, if it has one."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _own_line(error: BaseException, path: Path) -> str | None:
    """The last line of the user's file that the error passed through."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{error.lineno} {(error.text or '').rstrip()}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return f"{lines[-1].lineno} {lines[-1].line}" if lines else None
