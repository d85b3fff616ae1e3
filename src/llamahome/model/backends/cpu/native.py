"""Compile the C++ sources beside this file once on this machine and call their functions on tensors.

All sources make one library. It is kept in the user's cache folder under a name made of the sources, the compiler's words and the
processor's abilities, so another machine that shares the folder makes its own. It is one file, written whole and renamed. Compiling
takes 9 seconds. LLAMAHOME_CPU_LEVEL asks for the instructions of a lesser processor: avx2, avx512 (without bfloat16), or native.
A machine without a C++ compiler gets None and a reason; everything then runs as plain PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

import torch
from torch import Tensor

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.cpp", "attention_backward.cpp", "products.cpp"))
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("numbers.h", "vectors.h", "formats.h", "panels.h", "tiles.h", "attention.h"))
_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
_VARIABLE, _NOTHING = "LLAMAHOME_CPU_LEVEL", "none"
"""What asks for a level, and the word for compiling nothing."""
_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
LEVELS: dict[str, tuple[str, frozenset[str]]] = {
    "native": ("-march=native", frozenset()),
    "avx2": ("-march=x86-64-v3", _AVX2),
    "avx512": ("-march=x86-64-v4", _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
}
"""What the compiler is told for each level, and what the processor must be able to do."""
_PATIENCE_SECONDS = 120
_COMPILE_SECONDS = 8.6
"""Processor time of compiling all sources. measured on a Zen 4: 8.6 s, and 6.7 s without the passes for pairs of bfloat16."""
_SAVED_SECONDS, _SAVED_SECONDS_IN_PAIRS = 2.2e-11, 9.4e-12
"""Processor time that compiled passes save per token and weight, LoRA. measured: in float32 with instructions for AVX2 on a Zen 4, beside
torch at the same level (104 and 152 tokens of the starter per processor second); in bfloat16 where pairs are multiplied (docs/log.md)."""
_LETTERS = {torch.float32: "f", torch.bfloat16: "b"}
_POINTER, _INT, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, Sequence[type]] = {
    "norm_forward": [_POINTER] * 4 + [_COUNT] * 2 + [_REAL, _INT],
    "norm_backward": [_POINTER] * 7 + [_COUNT] * 3 + [_INT],
    "gated_forward": [_POINTER] * 2 + [_COUNT] * 2 + [_INT] * 2,
    "gated_backward": [_POINTER] * 4 + [_COUNT] * 2 + [_INT] * 2,
    "rotate": [_POINTER] * 6 + [_COUNT] * 4 + [_INT] * 2,
    "causal_softmax": [_POINTER] + [_COUNT] * 5 + [_REAL, _INT],
    "softmax_backward": [_POINTER] * 2 + [_COUNT] * 2 + [_REAL, _INT],
    "cross_entropy": [_POINTER] * 3 + [_COUNT] * 2 + [_INT],
    "attention_forward": [_POINTER] * 6 + [_REAL, _INT],
    "attention_backward": [_POINTER] * 10 + [_REAL, _INT],
    "product": [_POINTER, _COUNT, *[_POINTER] * 2, *[_COUNT] * 2, _INT, *[_POINTER] * 2, _COUNT, _INT],
    "adapted_product": [_POINTER, _COUNT, *[_POINTER] * 2, *[_COUNT] * 2, _INT, *[_POINTER] * 2, _COUNT, *[_POINTER] * 3, _COUNT, _INT],
    "outer_product": [_POINTER, *[_COUNT] * 2] * 2 + [_POINTER, _INT, _COUNT, _INT],
}
_TYPES = {
    "norm_forward": ("ff", "bb", "fb"),
    "norm_backward": ("ff", "bb", "fb"),
    "rotate": ("ff", "bb", "bf"),
}
"""Letters of the types that a function is compiled for, where these are not f and b."""
_OPTIONAL = frozenset({"attention_forward", "attention_backward", "product", "adapted_product", "outer_product"})
"""Functions that are compiled only where the processor has instructions for them; `has` tells."""


class Kernels:
    """The compiled functions. Tensors must lie as the function reads them, on the processor, and stay alive during the call."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        """Of the library: made of sources, compiler, processor and level."""
        self._functions = {}
        for name, signature in _SIGNATURES.items():
            for letters in _TYPES.get(name, ("f", "b")):
                if name in _OPTIONAL and not hasattr(library, f"{name}_{letters}"):
                    continue
                function = getattr(library, f"{name}_{letters}")
                function.argtypes, function.restype = list(signature), None
                self._functions[name, letters] = function

    def has(self, name: str, *dtypes: torch.dtype) -> bool:
        """Whether `name` is there for these types on this processor."""
        return (name, "".join(_LETTERS.get(dtype, "?") for dtype in dtypes)) in self._functions

    def __call__(self, name: str, dtypes: tuple[torch.dtype, ...], *arguments: Tensor | float | None) -> None:
        """Call `name` for these types with torch's number of threads."""
        function = self._functions[name, "".join(_LETTERS[dtype] for dtype in dtypes)]
        plain = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        function(*plain, torch.get_num_threads())


def cache_folder() -> Path:
    """Where compiled code is kept: private to the user, for it is executed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamahome" / "kernels"


def _compiler() -> str | None:
    return which(os.environ.get("CXX") or "g++") or which("c++")


def _abilities() -> str:
    """What the processor can do, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def asked_level() -> str:
    """The level that the environment asks for; `native` when it asks for none."""
    return os.environ.get(_VARIABLE) or "native"


def lacking(level: str | None = None) -> str | None:
    """Why the level (by default the one that is asked for) cannot be had here, in one line; None when it can."""
    level, able = level or asked_level(), set(_abilities().split())
    if level == _NOTHING:
        return f"{_VARIABLE} is {level}"
    if level not in LEVELS:
        return f"{_VARIABLE} is {level!r}; it may be {', '.join([*LEVELS, _NOTHING])}"
    if missing := sorted(LEVELS[level][1] - able):
        had = [name for name, (_, needed) in LEVELS.items() if needed <= able]
        return f"{_VARIABLE} is {level}, but this processor has no {', '.join(missing)}; it has {', '.join(had)}"
    return None


def processor() -> str:
    """A name for what this processor can do."""
    return hashlib.sha256(_abilities().encode()).hexdigest()[:16]


def has_compiler() -> bool:
    """Whether this machine could compile the passes; asked before anything is compiled."""
    return _compiler() is not None and lacking() is None


def expects_pairs() -> bool:
    """Whether this machine could compile passes that multiply pairs of bfloat16; asked before anything is compiled."""
    return has_compiler() and asked_level() == "native" and "avx512_bf16" in _abilities().split()


def must_compile() -> bool:
    """Whether `load_kernels` would have to compile here: there is a compiler and its library is not in the cache."""
    compiler = _compiler()
    if compiler is None or lacking():
        return False
    try:
        return not _is_ours(cache_folder() / _file_name(compiler, asked_level()))
    except (OSError, subprocess.SubprocessError):
        return False  # `load_kernels` says what is wrong


def wins_back(tokens: float, *, weights: int, processes: int) -> bool:
    """Whether passes over `tokens` by all processes save the time in which each of them compiles, in a model of so many weights."""
    saved = _SAVED_SECONDS_IN_PAIRS if expects_pairs() else _SAVED_SECONDS
    return tokens * weights * saved > _COMPILE_SECONDS * processes


def _flags(level: str) -> list[str]:
    return [*_FLAGS, LEVELS[level][0]]


@functools.cache
def _file_name(compiler: str, level: str) -> str:
    """Of the library that this compiler makes of the sources for this processor at this level."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True).stdout
    words = (*(path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS)), *_flags(level), version, _abilities())
    return f"{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:24]}.so"


def _is_ours(path: Path) -> bool:
    return path.is_file() and path.stat().st_uid == os.getuid()


def load_kernels(level: str | None = None) -> Kernels | str:
    """The kernels, compiled now if they are not in the cache; or one line that says why there are none. Loaded once per process and level.

    `level` is by default the one that is asked for.
    """
    return _kept_kernels(level or asked_level())


@functools.cache
def _kept_kernels(level: str) -> Kernels | str:
    return make_kernels(level)


def make_kernels(level: str) -> Kernels | str:
    """What `load_kernels` keeps, made anew."""
    compiler, reason = _compiler(), lacking(level)
    if compiler is None or reason:
        return reason or "there is no C++ compiler (g++ or c++)"
    try:
        path = cache_folder() / _file_name(compiler, level)
        if not _is_ours(path):
            _compile(compiler, _flags(level), path)
        return Kernels(ctypes.CDLL(str(path)), path.stem)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return f"{compiler} could not compile them: {said.strip().splitlines()[0][:200] if said.strip() else type(error).__name__}"


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    """All sources at once, then one library of them."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(len(_SOURCES)) as threads:

        def run(name: str, *asked: str) -> str:
            made = str(Path(folder) / name)
            command = [compiler, *flags, *asked, "-o", made]
            subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=True)
            return made

        objects = list(threads.map(lambda source: run(f"{source.stem}.o", "-c", str(source)), _SOURCES))
        Path(run(path.name, *objects)).replace(path)
