"""What every test may rely on: an environment without settings of the developer, and no network behind the hub library."""

import itertools
import os
import signal
from collections import Counter

import pytest

_FOREIGN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")

# At import, not in a fixture: llamahome, torch and the hub library read some of these once, when they are imported.
for _name in [name for name in os.environ if name in _FOREIGN or name.startswith("LLAMAHOME_")]:
    del os.environ[_name]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Threads that wait by spinning take the core from those that they wait for, in another worker: a test of one step took 11 s, not 0.5.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands of llamahome have it

# What runs in the background of a shell script ignores SIGINT, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # so does what runs under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--cpu-level LEVEL: the instruction set of the compiled passes in this run of the tests, also in the processes that it starts.

    --medium: the tests marked `medium` as well. They also run when tests are named: by a path, with -k, with -m medium, with --lf.
    """
    parser.addoption("--cpu-level", choices=["native", "avx2", "avx512", "none"])
    parser.addoption("--medium", action="store_true", help="run the tests that are marked medium as well")


def pytest_configure(config: pytest.Config) -> None:
    if (level := config.getoption("--cpu-level")) is not None:
        os.environ["LLAMAHOME_CPU_LEVEL"] = level
    # Two threads, so that sums are divided; one where as many workers as cores test at once. Workers inherit it; torch reads it on import.
    os.environ.setdefault("OMP_NUM_THREADS", "1" if len(config.getoption("tx", [])) >= (os.cpu_count() or 1) else "2")
    named = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword or config.getoption("lf", False)
    config.option.medium = bool(config.option.medium or named or "medium" in config.option.markexpr)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the medium tests; what is slow as well is chosen by `-m slow` alone."""
    if not config.option.medium:
        left_out = [item for item in items if item.get_closest_marker("medium") and not item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In CI: what the fast tests took together, and the slowest of them, so that a reader sees which to make faster or to mark medium."""
    if "CI" not in os.environ:
        return
    seconds: Counter[str] = Counter()
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport) and not {"medium", "slow"} & report.keywords.keys():
            seconds[report.nodeid] += report.duration
    terminalreporter.write_sep("=", f"{len(seconds)} fast tests took {seconds.total():.0f} s together; the slowest of them")
    for name, duration in seconds.most_common(25):
        terminalreporter.write_line(f"{duration:7.2f} s  {name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `device` runs on the processor, and on a GPU where there is one."""
    if "device" in metafunc.fixturenames:
        import torch

        metafunc.parametrize("device", [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])], ids=str)
