"""What every test may rely on: an environment without settings of the developer, and no network behind the hub library."""

import os
import signal

import pytest

_FOREIGN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")

# At import, not in a fixture: llamahome, torch and the hub library read some of these once, when they are imported.
for _name in [name for name in os.environ if name in _FOREIGN or name.startswith("LLAMAHOME_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two threads, so that sums are divided; one where as many workers as cores test at once.
os.environ.setdefault("OMP_NUM_THREADS", "1" if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) >= (os.cpu_count() or 1) else "2")

# What runs in the background of a shell script ignores SIGINT, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so does what runs under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--cpu-level LEVEL: the instruction set of the compiled passes in this run of the tests, also in the processes that it starts."""
    parser.addoption("--cpu-level", choices=["native", "avx2", "avx512", "none"])


def pytest_configure(config: pytest.Config) -> None:
    if (level := config.getoption("--cpu-level")) is not None:
        os.environ["LLAMAHOME_CPU_LEVEL"] = level


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `device` runs on the processor, and on a GPU where there is one."""
    if "device" in metafunc.fixturenames:
        import torch

        metafunc.parametrize("device", [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])], ids=str)
