"""The rank of this process and the world size, from the environment variables of whatever started it: llamahome, torchrun, srun or mpirun.

An incomplete set of variables is left over from something else (make exports WORLD_SIZE, a shell keeps what was once exported) and is
ignored. Sources: torchrun's environment (docs.pytorch.org/docs/stable/elastic/run.html), "OUTPUT ENVIRONMENT VARIABLES" in srun(1), the
manuals of Open MPI and MPICH.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from llamahome.distributed.failures import LAUNCH_FOLDER
from llamahome.errors import ConfigError, MachineError, Problem

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
_MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_HINT = "unset RANK WORLD_SIZE, or start it with torchrun or llamahome train-distributed"


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Which process this is and where process 0 is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    starter: str = ""
    """llamahome, torchrun, srun or mpirun; empty if nothing started this process as one of several."""
    address: str | None = None
    """Address of process 0; None if the settings must name it."""
    port: int | None = None

    @property
    def joins(self) -> bool:
        """Whether another program has started the processes, so that this process starts none."""
        return self.starter != ""


def find_rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Read `environment`. Raises ConfigError distributed.bad-environment, MachineError distributed.no-meeting-place."""
    if {"RANK", "WORLD_SIZE"} <= set(environment):
        return _from_torchrun(environment)
    if {"SLURM_STEP_ID", *_SLURM[:3]} <= set(environment) and _count(environment, _SLURM[1]) > 1:
        return _from_srun(environment)
    for names in (_OPEN_MPI, _MPICH):
        if set(names) <= set(environment) and _count(environment, names[1]) > 1:
            return _rank_info(environment, names, starter="mpirun", address=None)
    return RankInfo()


def leftovers(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like a launcher's but are ignored because the set is incomplete, as NAME=value."""
    incomplete = not {"RANK", "WORLD_SIZE"} <= set(environment)
    return sorted(f"{name}={environment[name]}" for name in _TORCHRUN[:3] if incomplete and name in environment)


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    size = _count(environment, "WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    one_machine = {"LOCAL_RANK": environment["RANK"], "LOCAL_WORLD_SIZE": environment["WORLD_SIZE"]}
    starter = "llamahome" if LAUNCH_FOLDER in environment else "torchrun"
    info = _rank_info({**one_machine, **environment}, _TORCHRUN, starter=starter, address=None)
    if missing and size > 1:
        message = f"RANK and WORLD_SIZE say that this is one of {size} processes, but {' and '.join(missing)} is not set"
        raise MachineError(Problem(code="distributed.no-meeting-place", message=message, hint=_HINT))
    return info


def _from_srun(environment: Mapping[str, str]) -> RankInfo:
    nodes = _count(environment, "SLURM_STEP_NUM_NODES") if "SLURM_STEP_NUM_NODES" in environment else 1
    local_size = _tasks_here(environment, default=_count(environment, "SLURM_STEP_NUM_TASKS") // max(1, nodes))
    first = first_host(environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "")))
    return _rank_info({**environment, _SLURM[3]: str(local_size)}, _SLURM, starter="srun", address=first)


def _rank_info(environment: Mapping[str, str], names: tuple[str, str, str, str], *, starter: str, address: str | None) -> RankInfo:
    """`address` is that of process 0 if MASTER_ADDR is not set and there are several machines."""
    rank, size, local_rank, local_size = (_count(environment, name) for name in names)
    for (name, number), (limit_name, limit) in (((names[0], rank), (names[1], size)), ((names[2], local_rank), (names[3], local_size))):
        if number >= limit:
            raise _bad(f"{name} is {number}, but {limit_name} is {limit} and ranks count from 0")
    return RankInfo(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        starter=starter,
        address=environment.get("MASTER_ADDR") or ("127.0.0.1" if size == local_size else address),
        port=_count(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None,
    )


def _tasks_here(environment: Mapping[str, str], *, default: int) -> int:
    """The number of tasks on this node, from SLURM_STEP_TASKS_PER_NODE, which looks like 4(x2),3."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else default


def first_host(nodes: str) -> str | None:
    """The first host of a Slurm node list: gpu[07-09,12],login -> gpu07."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    return f"{match[1]}{match[2] or ''}{match[3] or ''}" if match else None


def _count(environment: Mapping[str, str], name: str) -> int:
    try:
        count = int(environment[name])
    except ValueError:
        count = -1
    if count < 0:
        raise _bad(f"{name} is {environment[name]!r}, which is not a count")
    return count


def _bad(message: str) -> ConfigError:
    return ConfigError(Problem(code="distributed.bad-environment", message=message, where="environment", hint=_HINT))
