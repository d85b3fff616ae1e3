"""Rules about speed and the machine: waiting for data, lost speed, a slow rank, memory, swap, the disk, a throttled processor."""

import math

from llamahome.monitoring.episodes import Average, Episode, Facts, Finding, Rule, Values, finite
from llamahome.units import show_bytes, show_count

_NOT_IN_A_STEP = ("time/evaluate", "time/save", "time/profile")


class DataWait:
    """More than a tenth of a step waits for rows."""

    name = "data-wait"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode(patience=10)
        self._data, self._step = Average(20), Average(20)
        self._seen = 0

    def observe(self, step: int, values: Values) -> Finding | None:
        """Begin above 10 % of the last 20 lines, ten times in a row; over below 7 %. The first line holds the start of the reading."""
        data = finite(values, "time/data")
        if data is None:
            return None
        self._seen += 1
        if self._seen == 1:
            return None
        whole = sum(value or 0.0 for name, value in values.items() if name.startswith("time/") and name not in _NOT_IN_A_STEP)
        self._data.add(data)
        self._step.add(whole)
        share = self._data.mean / self._step.mean if self._step.mean > 0 else 0.0
        if not self._episode.begins(self._data.count >= 20 and share > 0.10, over=share < 0.07):
            return None
        text = f"{share:.0%} of a step waits for rows: {self._data.mean:.3g} s of {self._step.mean:.3g} s"
        return text, f"tokenize before training: llamahome data prepare {self._facts.data}"


class Throughput:
    """Tokens per second fell by a third, for 20 lines in a row."""

    name = "throughput"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode(patience=20)
        self._now, self._slow = Average(20), Average(50)
        """Of the logarithm."""
        self._best = -math.inf

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare the last 20 lines with the best 50 before."""
        speed = finite(values, "speed/tokens_per_s")
        if speed is None or speed <= 0:
            return None
        self._now.add(math.log(speed))
        self._slow.add(math.log(speed))
        if self._slow.count < 50:
            return None
        self._best = max(self._best, self._slow.mean)
        fell = self._now.mean - self._best
        if not self._episode.begins(fell < math.log(2 / 3), over=fell > math.log(0.8)):
            return None
        text = f"{show_count(math.exp(self._now.mean))} tokens/s around step {step}; it was {show_count(math.exp(self._best))}"
        return text, "another program may use the machine, or it is throttled: llamahome doctor"


class SlowRank:
    """One process is slower than the others, so all wait for it: the same one, by a third, in most of 30 lines."""

    name = "slow-rank"

    def __init__(self, facts: Facts) -> None:
        self._episode = Episode()
        self._rank = -1
        self._share, self._ratio = Average(30), Average(30)

    def observe(self, step: int, values: Values) -> Finding | None:
        """Compare the slowest process with the median of all; over when another is slowest or the gap closes."""
        slowest, seconds, median = (finite(values, f"ranks/{name}") for name in ("slowest", "slowest_s", "median_s"))
        if slowest is None or seconds is None or not median:
            return None
        if int(slowest) != self._rank and self._share.mean < 0.5:
            self._rank, self._share, self._ratio = int(slowest), Average(30), Average(30)
        same = int(slowest) == self._rank
        self._share.add(float(same and seconds > 4 / 3 * median))
        if same:
            self._ratio.add(seconds / median)
        slow = self._share.count >= 30 and self._share.mean > 0.8
        if not self._episode.begins(slow, over=self._share.mean < 0.4):
            return None
        text = f"process {self._rank} takes {self._ratio.mean:.1f} times as long as the others ({seconds:.3g} s, median {median:.3g} s)"
        return text, "the others wait for it: run llamahome doctor on its machine, and look for other programs there"


class Memory:
    """Memory of the machine, of its container or of the GPU is nearly full."""

    name = "memory"

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._episode = {"system/ram": Episode(2), "system/gpu_memory": Episode(2)}

    def observe(self, step: int, values: Values) -> Finding | None:
        """Begin at 95 % (GPU: 98 %, because the allocator keeps what it has reserved); over 5 points below."""
        for metric, what, begin in (("system/ram", "memory", 0.95), ("system/gpu_memory", "GPU memory", 0.98)):
            share = finite(values, metric)
            if share is not None and self._episode[metric].begins(share >= begin, over=share < begin - 0.05):
                half = max(1, self._facts.micro_batch_tokens // 2)
                help_ = self._facts.resume_with(f"training.micro_batch_tokens={half}")
                return f"{share:.0%} of the {what} is in use", f"smaller passes, the same result: {help_}"
        return None


class Disk:
    """The disk of the run has no room for two more checkpoints, or less than 1 GiB."""

    name = "disk"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode()
        self._least = max(2**30, 2 * facts.checkpoint_bytes)

    def observe(self, step: int, values: Values) -> Finding | None:
        """Over when there is half as much again as the least."""
        free = finite(values, "system/disk_free")
        if free is None or not self._episode.begins(free < self._least, over=free > 1.5 * self._least):
            return None
        need = f"; a checkpoint takes {show_bytes(self._facts.checkpoint_bytes)}" if self._facts.checkpoint_bytes else ""
        return f"{show_bytes(free)} are free on the disk of the run{need}", f"llamahome checkpoint prune {self._facts.run}"


class Swap:
    """Memory of this process was moved to the disk: more than 64 MiB and a hundredth of what is resident."""

    name = "swap"

    def __init__(self, facts: Facts) -> None:
        self._facts, self._episode = facts, Episode(2)

    def observe(self, step: int, values: Values) -> Finding | None:
        """Over when half of the bound is left."""
        swapped, resident = finite(values, "memory/swap"), finite(values, "memory/rss")
        if swapped is None or resident is None:
            return None
        bound = max(64 * 2**20, 0.01 * resident)
        if not self._episode.begins(swapped > bound, over=swapped < bound / 2):
            return None
        half = self._facts.resume_with(f"training.micro_batch_tokens={max(1, self._facts.micro_batch_tokens // 2)}")
        return f"{show_bytes(swapped)} of this process are in swap, which slows every step", f"end other programs, or: {half}"


class Throttled:
    """The processor or the GPU is held back: by heat, by power, or by the quota of a control group."""

    name = "throttled"

    def __init__(self, facts: Facts) -> None:
        self._quota, self._heat, self._gpu = Episode(3), Episode(3), Episode(3)

    def observe(self, step: int, values: Values) -> Finding | None:
        """Begin after three samples in a row; over when there is none any more."""
        stopped, hot, gpu = (finite(values, f"system/{name}") for name in ("cpu_throttled", "cpu_thermal", "gpu_throttled"))
        if stopped is not None and self._quota.begins(stopped > 0.1, over=stopped < 0.02):
            text = f"the processor quota of the container was used up in {stopped:.0%} of its periods"
            return text, "allow more processors, or fewer threads: OMP_NUM_THREADS"
        if hot is not None and self._heat.begins(hot > 0, over=hot == 0):
            return (
                f"the processor slows down because it is hot ({hot:.3g} times a second)",
                "better cooling, or fewer threads: OMP_NUM_THREADS",
            )
        if gpu is not None and self._gpu.begins(gpu > 0, over=gpu == 0):
            heat = finite(values, "system/gpu_temperature")
            at = f" at {heat:.0f} degrees" if heat is not None else ""
            return f"the GPU slows down because of heat or power{at}", "nvidia-smi -q -d PERFORMANCE names the reason"
        return None


def machine_rules(facts: Facts) -> list[Rule]:
    """The rules of this file, for one run."""
    return [DataWait(facts), Throughput(facts), SlowRank(facts), Memory(facts), Disk(facts), Swap(facts), Throttled(facts)]
