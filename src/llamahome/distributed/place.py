"""Which process of how many this one is, as whoever started it says: llamahome itself, torchrun, srun, mpirun, or nobody.

Variables that do not make a whole are left over from something else (make exports WORLD_SIZE, a shell keeps what was exported once) and
are not obeyed. Sources: the environment of torchrun (docs.pytorch.org/docs/stable/elastic/run.html), "OUTPUT ENVIRONMENT VARIABLES"
in srun(1), Open MPI's and MPICH's manuals.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamahome.distributed.failures import LAUNCH_FOLDER
from llamahome.errors import ConfigError, MachineError, Problem

_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_UNSET = "unset RANK WORLD_SIZE, or start it with torchrun or llamahome train-distributed"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    starter: str = ""
    """llamahome, torchrun, srun, mpirun; empty when nobody started it as one of several."""
    address: str | None = None
    """Of process 0; None when the settings must say it."""
    port: int | None = None

    @property
    def joins(self) -> bool:
        """Whether another program has started the processes, so that this one starts none."""
        return self.starter != ""


def find_place(environment: Mapping[str, str]) -> Place:
    """The place that `environment` gives. ConfigError distributed.bad-environment, MachineError distributed.no-meeting-place."""
    if {"RANK", "WORLD_SIZE"} <= set(environment):
        return _of_torchrun(environment)
    if {"SLURM_STEP_ID", *_SLURM[:3]} <= set(environment) and _number(environment, _SLURM[1]) > 1:
        return _of_srun(environment)
    for names in (_OPEN_MPI, _MPICH):
        if set(names) <= set(environment) and _number(environment, names[1]) > 1:
            rank, size, local_rank, local_size = _within(environment, names)
            address = environment.get("MASTER_ADDR") or ("127.0.0.1" if size == local_size else None)
            port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None
            return Place(rank=rank, size=size, local_rank=local_rank, local_size=local_size, starter="mpirun", address=address, port=port)
    return Place()


def leftovers(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like a launcher's and are not obeyed, as NAME=value."""
    lonely = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(environment)
    return sorted(f"{name}={environment[name]}" for name in lonely) if not {"RANK", "WORLD_SIZE"} <= set(environment) else []


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    ours = LAUNCH_FOLDER in environment
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size = _within({**environment, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, names)[:2]
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    rank, size, local_rank, local_size = _within({**local, **environment}, names)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing and size > 1:
        message = f"RANK and WORLD_SIZE say that this is one of {size} processes, but {' and '.join(missing)} is not set"
        raise MachineError(Problem(code="distributed.no-meeting-place", message=message, hint=_UNSET))
    return Place(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        starter="llamahome" if ours else "torchrun",
        address=environment.get("MASTER_ADDR"),
        port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None,
    )


def _of_srun(environment: Mapping[str, str]) -> Place:
    nodes = _number(environment, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in environment else 1
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    here = _tasks_here(environment, size // max(1, nodes))
    rank, size, local_rank, local_size = _within({**environment, _SLURM[3]: str(here)}, _SLURM)
    first = first_host(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")))
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if size == local_size else first)
    port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None
    return Place(rank=rank, size=size, local_rank=local_rank, local_size=local_size, starter="srun", address=address, port=port)


def _tasks_here(environment: Mapping[str, str], otherwise: int) -> int:
    """Of SLURM_STEP_TASKS_PER_NODE, written like 4(x2),3."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else otherwise


def first_host(nodes: str) -> str | None:
    """The first of Slurm's list of nodes: gpu[07-09,12],login -> gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else None


def _within(environment: Mapping[str, str], names: tuple[str, str, str, str]) -> tuple[int, int, int, int]:
    rank, size, local_rank, local_size = (_number(environment, name) for name in names)
    for (below, number), (above, count) in (((names[0], rank), (names[1], size)), ((names[2], local_rank), (names[3], local_size))):
        if number >= count:
            raise _bad(f"{below} is {number}, but {above} is {count} and they count from 0")
    return rank, size, local_rank, local_size


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        number = int(environment[name])
    except ValueError:
        number = -1
    if number < 0:
        raise _bad(f"{name} is {environment[name]!r}, which is no count")
    return number


def _bad(message: str) -> ConfigError:
    return ConfigError(Problem(code="distributed.bad-environment", message=message, where="environment", hint=_UNSET))
