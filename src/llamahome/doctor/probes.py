"""The table of doctor's checks: in which order, in which group, within which time. Modules are imported when their check begins."""

import os
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamahome.doctor.checks import Check, Request, failed, warned

if TYPE_CHECKING:
    from llamahome.config.schema import Config

Say = Callable[[str], None]
"""Takes what a check is doing, which is shown if it does not end."""


@dataclass(frozen=True)
class Probe:
    """One entry of the table."""

    name: str
    """Of the check if it does not end."""
    group: str
    look: Callable[[Request, Say], Iterable[Check]]
    seconds: float
    """After which the process of the check is ended."""
    slow: bool = False
    """Whether --quick leaves it out."""
    needs_packages: bool = False
    """Whether it is left out if torch or another package cannot be imported."""


def _python(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import installation

    found = installation.read_installation()
    yield installation.python_check(found)
    yield from installation.package_checks(found)


def _imports(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import installation

    yield installation.import_check(installation.read_installation(), say=say)


def _drivers(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import drivers, installation

    say("while asking the driver")
    driver = drivers.read_driver(request.machine)
    say("while torch asks the driver")
    try:
        build = drivers.read_torch()
    except (ImportError, OSError, RuntimeError, AttributeError):
        build = None
    yield drivers.driver_check(driver, build, installation.read_installation().pip)
    yield from drivers.gpu_checks(build) if build is not None else ()


def _machine(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import machine

    found = machine.read_machine(request.machine)
    yield machine.processor_check(found)
    yield from machine.memory_checks(found)
    yield from machine.limit_checks(found)
    yield machine.locale_check(found)
    yield machine.clock_check(found)


def _folders(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import locks, machine, storage
    from llamahome.rundir import PROCESSED_DATA

    cache = _cache()
    yield machine.home_check(dict(os.environ))
    folders = {"output": _output(request), "processed": PROCESSED_DATA, "cache": cache, "temporary": Path(_temporary())}
    if (request.machine / "dev/shm").is_dir():
        folders["shared-memory"] = request.machine / "dev/shm"
    for name, path in folders.items():
        say(f"while writing to {path}")
        yield from storage.storage_checks({name: path})
    yield locks.lock_check(locks.find_locks([PROCESSED_DATA, cache], request.machine))


def _cache() -> Path:
    """As data/files/index.py and the compiled passes name it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME") or "~").expanduser() / ".cache") / "llamahome"


def _temporary() -> str:
    """The folder that TMPDIR names, even if it cannot be written, in which case Python takes another."""
    return next((os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), "") or tempfile.gettempdir()


def _output(request: Request) -> Path:
    """Where the runs of these settings go; the usual place if the settings cannot be read."""
    from llamahome.rundir import RUNS

    try:
        config = _loaded(request)
    except ImportError:
        return RUNS
    return Path(config.output.dir or RUNS) if config is not None else RUNS


def _rates_of_storage(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import storage

    yield storage.copy_check(storage.measure_copies())
    for name, path in {"disk-rate-output": _output(request), "disk-rate-cache": _cache()}.items():
        say(f"while writing to {path}")
        try:
            yield storage.disk_check(name, storage.measure_disk(path))
        except OSError as error:
            yield warned(name, f"{path}: not measured: {error.strerror or error}")


def _settings(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import settings

    yield from settings.setting_checks(request)


def _launcher(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import settings

    yield settings.launcher_check(request.environment)


def _compute(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import compute

    yield compute.level_check()
    say("while asking the back end")
    config = _loaded(request)
    yield compute.backend_check(config) if config is not None else warned("back-end", _NO_SETTINGS)


_NO_SETTINGS = "not checked, because the settings cannot be read: llamahome doctor --only settings says why"


def _loaded(request: Request) -> "Config | None":
    """The settings; None if they cannot be read."""
    from llamahome.doctor.settings import load_settings
    from llamahome.errors import LlamaHomeError

    try:
        return load_settings(request).config
    except LlamaHomeError:
        return None


def _rates(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import compute

    yield from (compute.rate_check(rates) for rates in compute.measure_rates())


def _passes(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import compute

    say("while compiling")
    yield from compute.pass_checks(compute.try_passes())


def _base(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import model_files

    config = _loaded(request)
    yield model_files.base_check(config) if config is not None else warned("base-model", _NO_SETTINGS)


def _pair(request: Request, say: Say) -> Iterable[Check]:
    import torch

    from llamahome.doctor import pair

    yield pair.pair_check(pair.exchange(Path(request.scratch), seconds=40))
    if torch.cuda.device_count() > 1:
        say("while two GPUs exchange a tensor")
        yield pair.pair_check(pair.exchange(Path(request.scratch), seconds=60, backend="nccl"))


def _nodes(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.config.schema import interval
    from llamahome.doctor import nodes

    config = _loaded(request)
    if config is None:
        yield failed("nodes", _NO_SETTINGS, "llamahome doctor --only settings")
        return
    each = config.distributed
    if each.node_rank >= each.most_nodes or each.most_nodes < 2:
        text = f"this is machine {each.node_rank} of {each.most_nodes}: machines count from 0, and two or more meet"
        yield failed("nodes", text)
        return
    place = nodes.Place(
        each.master_addr, each.master_port, each.node_rank, each.least_nodes, each.most_nodes, interval(each.join_timeout).value
    )
    say(f"while the machines meet at {place.shown}")
    yield from nodes.node_checks(place, nodes.hold_meeting(place))


def _hub(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import hub

    yield hub.hub_check()


def _steps(request: Request, say: Say) -> Iterable[Check]:
    from llamahome.doctor import steps

    say("while doing two steps")
    yield from steps.step_checks(request)


def wanted(request: Request, *, nodes: bool, only: Collection[str] = ()) -> list[Probe]:
    """The checks of this request; with `nodes` the machines meet, too. `only` are names and groups. KeyError with one that is unknown."""
    unknown = [name for name in only if name not in {probe.group for probe in PROBES} | {probe.name for probe in PROBES}]
    if unknown:
        raise KeyError(unknown[0])
    asked = {"nodes": nodes, "hub": request.hub}
    chosen = [probe for probe in PROBES if not only or probe.group in only or probe.name in only]
    return [probe for probe in chosen if asked.get(probe.name, True) and (request.slow or not probe.slow)]


PROBES = (
    Probe("python", "installation", _python, 20),
    Probe("imports", "installation", _imports, 120),
    Probe("gpu-driver", "installation", _drivers, 40),
    Probe("machine", "machine", _machine, 10),
    Probe("folders", "disk", _folders, 30),
    Probe("disk-rate", "disk", _rates_of_storage, 20, slow=True),
    Probe("launcher", "settings", _launcher, 10),
    Probe("settings", "settings", _settings, 20, needs_packages=True),
    Probe("base-model", "model", _base, 60, needs_packages=True),
    Probe("processor-level", "compute", _compute, 40, needs_packages=True),
    Probe("compiled-passes", "compute", _passes, 90, slow=True, needs_packages=True),
    Probe("matrix-rate", "compute", _rates, 40, slow=True, needs_packages=True),
    Probe("two-processes", "processes", _pair, 120, slow=True, needs_packages=True),
    Probe("hub", "network", _hub, 20),
    Probe("nodes", "network", _nodes, 900, needs_packages=True),
    Probe("two-steps", "training", _steps, 150, slow=True, needs_packages=True),
)
