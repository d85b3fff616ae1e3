"""Compiles the C++ sources of this folder once on this machine and calls their functions on tensors.

All sources make one library in the user's cache folder. Its name is a hash of the sources, the compiler and the processor's flags, so other
machines that share the folder compile their own. It is written to a temporary file and renamed. Compiling takes 9 seconds.
LLAMAHOME_CPU_LEVEL selects the instruction set: avx2, avx512 (without bfloat16), native (the default), or none, which compiles nothing.
Without a C++ compiler there are no kernels but a reason, and everything runs in plain PyTorch.
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

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.cpp", "attention_backward.cpp", "products.cpp", "quantized.cpp")
)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("simd.h", "formats.h", "panels.h", "tiles.h", "attention.h"))
_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
_VARIABLE, _NONE = "LLAMAHOME_CPU_LEVEL", "none"
"""The variable that selects a level, and its value for compiling nothing."""
_AVX2 = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
LEVELS: dict[str, tuple[str, frozenset[str]]] = {
    "native": ("-march=native", frozenset()),
    "avx2": ("-march=x86-64-v3", _AVX2),
    "avx512": ("-march=x86-64-v4", _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
}
"""The compiler flag of each level, and the processor flags that it requires."""
_TIMEOUT_SECONDS = 120
_COMPILE_SECONDS = 8.6
"""Processor time of compiling all sources. measured on a Zen 4: 8.6 s, and 6.7 s without the kernels for bfloat16 pairs."""
_SAVED_SECONDS, _SAVED_SECONDS_BF16 = 2.2e-11, 9.4e-12
"""Processor time that the kernels save per token and weight with LoRA. measured: in float32 with AVX2 instructions on a Zen 4, compared
with torch at the same level (104 and 152 tokens of the starter per processor second); in bfloat16 with AVX512_BF16 (docs/log.md)."""
_SUFFIXES = {torch.float32: "f", torch.bfloat16: "b"}
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
    "widen_codes": [_POINTER] * 4 + [_COUNT] * 2 + [_INT],
    "widen_bytes": [_POINTER] * 3 + [_COUNT] * 2 + [_INT],
    "outer_product": [_POINTER, *[_COUNT] * 2] * 2 + [_POINTER, _INT, _COUNT, _INT],
}
_TYPES = {
    "norm_forward": ("ff", "bb", "fb"),
    "norm_backward": ("ff", "bb", "fb"),
    "rotate": ("ff", "bb", "bf"),
}
"""Suffixes of functions with two dtypes; all others have f and b."""
_OPTIONAL = frozenset({"attention_forward", "attention_backward", "product", "adapted_product", "outer_product"})
"""Functions that are compiled only if the processor has instructions for the dtype; see `Kernels.has`."""


class Kernels:
    """The compiled functions. Tensors must be on the processor, in the memory layout that the function expects."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        """Hash of the sources, compiler, processor and level."""
        self._functions = {}
        for function_name, signature in _SIGNATURES.items():
            for suffix in _TYPES.get(function_name, ("f", "b")):
                symbol = f"{function_name}_{suffix}"
                if function_name in _OPTIONAL and not hasattr(library, symbol):
                    continue
                function = getattr(library, symbol)
                function.argtypes, function.restype = list(signature), None
                self._functions[function_name, suffix] = function

    def has(self, name: str, *dtypes: torch.dtype) -> bool:
        """Whether `name` is compiled for these dtypes."""
        return (name, "".join(_SUFFIXES.get(dtype, "?") for dtype in dtypes)) in self._functions

    def __call__(self, name: str, dtypes: tuple[torch.dtype, ...], *arguments: Tensor | float | None) -> None:
        """Call `name` for these dtypes, with torch's number of threads as the last argument."""
        function = self._functions[name, "".join(_SUFFIXES[dtype] for dtype in dtypes)]
        plain = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        function(*plain, torch.get_num_threads())


def cache_folder() -> Path:
    """The folder of compiled libraries; private to the user, because its content is executed."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamahome" / "kernels"


def _compiler() -> str | None:
    return which(os.environ.get("CXX") or "g++") or which("c++")


def _processor_flags() -> str:
    """The processor's flags, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def requested_level() -> str:
    """The level of LLAMAHOME_CPU_LEVEL; `native` by default."""
    return os.environ.get(_VARIABLE) or "native"


def unsupported_reason(level: str | None = None) -> str | None:
    """The reason why this machine does not support `level` (by default the requested one), in one line; None if it does."""
    level, flags = level or requested_level(), set(_processor_flags().split())
    if level == _NONE:
        return f"{_VARIABLE} is {level}"
    if level not in LEVELS:
        return f"{_VARIABLE} is {level!r}; it may be {', '.join([*LEVELS, _NONE])}"
    if missing := sorted(LEVELS[level][1] - flags):
        supported = [name for name, (_, required) in LEVELS.items() if required <= flags]
        return f"{_VARIABLE} is {level}, but this processor has no {', '.join(missing)}; it has {', '.join(supported)}"
    return None


def processor_id() -> str:
    """A hash of the processor's flags."""
    return hashlib.sha256(_processor_flags().encode()).hexdigest()[:16]


def has_compiler() -> bool:
    """Whether this machine can compile the kernels at the requested level; compiles nothing."""
    return _compiler() is not None and unsupported_reason() is None


def expects_bf16_pairs() -> bool:
    """Whether compiled kernels would multiply pairs of bfloat16 on this machine; compiles nothing."""
    return has_compiler() and requested_level() == "native" and "avx512_bf16" in _processor_flags().split()


def must_compile() -> bool:
    """Whether `load_kernels` would compile: there is a compiler, and the library is not in the cache."""
    compiler = _compiler()
    if compiler is None or unsupported_reason():
        return False
    try:
        return not _is_own_file(cache_folder() / _file_name(compiler, requested_level()))
    except (OSError, subprocess.SubprocessError):
        return False  # `load_kernels` reports the error


def compile_pays_off(tokens: float, *, weights: int, processes: int) -> bool:
    """Whether training on `tokens` with all processes together saves the time in which each process compiles."""
    saved = _SAVED_SECONDS_BF16 if expects_bf16_pairs() else _SAVED_SECONDS
    return tokens * weights * saved > _COMPILE_SECONDS * processes


def _flags(level: str) -> list[str]:
    return [*_FLAGS, LEVELS[level][0]]


@functools.cache
def _file_name(compiler: str, level: str) -> str:
    """Name of the library: a hash of everything that decides its content."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True).stdout
    parts = (*(path.read_text(encoding="utf-8") for path in (*_SOURCES, *_HEADERS)), *_flags(level), version, _processor_flags())
    return f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"


def _is_own_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_uid == os.getuid()


def load_kernels(level: str | None = None) -> Kernels | str:
    """The kernels of a level (by default the requested one), compiled if they are not in the cache; or the reason why there are none.

    Loaded once per process and level.
    """
    return _cached_kernels(level or requested_level())


@functools.cache
def _cached_kernels(level: str) -> Kernels | str:
    return make_kernels(level)


def make_kernels(level: str) -> Kernels | str:
    """`load_kernels` without the cache of this process."""
    compiler, reason = _compiler(), unsupported_reason(level)
    if compiler is None or reason:
        return reason or "there is no C++ compiler (g++ or c++)"
    try:
        path = cache_folder() / _file_name(compiler, level)
        if not _is_own_file(path):
            _compile(compiler, _flags(level), path)
        return Kernels(ctypes.CDLL(str(path)), path.stem)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        message = (getattr(error, "stderr", None) or str(error)).strip()
        return f"{compiler} could not compile them: {message.splitlines()[0][:200] if message else type(error).__name__}"


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    """Compile all sources in parallel and link them to the library `path`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(len(_SOURCES)) as threads:

        def run(name: str, *arguments: str) -> str:
            output = str(Path(folder) / name)
            command = [compiler, *flags, *arguments, "-o", output]
            subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
            return output

        objects = list(threads.map(lambda source: run(f"{source.stem}.o", "-c", str(source)), _SOURCES))
        Path(run(path.name, *objects)).replace(path)
