"""Turns `--set key=a,b` into the trials of a sweep: every combination of the listed values, each with every seed.

A comma outside brackets and quotes separates two values: `lora.target_modules=[q_proj,v_proj],[q_proj]` lists two lists.
"""

import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from llamahome.config.check import check_config, config_warnings
from llamahome.config.describe import settings
from llamahome.config.load import LoadedConfig
from llamahome.config.objectives import LEARNS
from llamahome.errors import ConfigError, Problem, UsageError
from llamahome.monitoring.display import metric_name

MOST_TRIALS = 1000
_SEED = "training.seed"
_OPEN, _CLOSE = "[{", "]}"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    """From 1, in the order of the command line; the last listed key changes fastest, then the seed."""
    values: dict[str, str]
    """The listed keys and the YAML text of their values here."""
    seed: int
    assignments: tuple[str, ...]
    """Everything after --set, also what is the same in all trials."""
    final: str = "last"
    """Whether a trial is compared by its `last` evaluation, or by its `best` because `output.final` keeps that model."""
    figure: str = "loss"
    """What trials are ranked by, without eval/: the held-out `loss`, the figure of evaluation.metric, or an accuracy where constants of the
    loss are listed."""
    chosen_by: str = "loss"
    """The figure that chooses the `best` evaluation of a trial."""

    @property
    def name(self) -> str:
        """`007`, the name of its files."""
        return f"{self.number:03d}"

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What trials that differ only in their seed have in common."""
        return tuple(self.values.items())


@dataclass(frozen=True)
class Grid:
    """The trials, and the settings of each in the same order."""

    trials: list[Trial]
    loaded: list[LoadedConfig]


def split_values(text: str) -> list[str]:
    """The values in `text`; a comma within brackets, braces or quotes belongs to its value."""
    values, depth, quote, begin = [], 0, "", 0
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and (depth or not text[begin:at].strip()):
            quote = letter
        elif letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter == "," and depth <= 0:
            values.append(text[begin:at].strip())
            begin = at + 1
    return [*values, text[begin:].strip()]


def make_grid(
    assignments: Sequence[str], seeds: int, load: Callable[[Sequence[str]], LoadedConfig], flags: Mapping[str, str] = MappingProxyType({})
) -> Grid:
    """Every trial with its settings. `load` reads the settings with a list of --set assignments on top; `flags` are the others by key.

    Raises ConfigError or UsageError with every mistake: unknown keys, impossible values, and combinations that contradict themselves.
    """
    listed = [(key.strip(), split_values(values)) for key, _, values in (each.partition("=") for each in assignments)]
    problems = [*_repeated(assignments, listed, seeds), *_typed_twice(listed, flags)]
    first = load([])
    for assignment, (key, values) in zip(assignments, listed, strict=True):
        typed = [f"{key}={value}" for value in values] if "=" in assignment else [assignment]
        problems += [problem for each in typed for problem in _problems_of(load, each)]
    if problems:
        raise ConfigError(list({(each.code, each.message): each for each in problems}.values()))
    count = seeds
    for key, values in listed:
        count *= len(values)
        others = seeds > 1 or any(len(each) > 1 for name, each in listed if name != key)
        problems += _equal_values(key, values, load, others=others)
    if count > MOST_TRIALS:
        message = f"{count:,} runs; a sweep has at most {MOST_TRIALS:,}"
        raise UsageError(Problem(code="sweep.too-many", message=message, where="--set"))
    if count == 1 and not problems:
        message = "there is nothing to compare: every setting has one value, and there is one seed"
        raise UsageError(Problem(code="sweep.one-run", message=message, hint="--set 'training.learning_rate=1e-5,1e-4'"))
    if problems:
        raise ConfigError(problems)
    return _combine(listed, seeds, first.config.training.seed, load)


def warnings_of(grid: Grid) -> list[str]:
    """What `train` will say of the settings of the runs, such as one without effect, with the number of runs of which it says so."""
    runs = Counter(problem.message for loaded in grid.loaded for problem in config_warnings(loaded.config, loaded.origins))
    of_all = len(grid.loaded)
    return [message if count == of_all else f"{message} (in {count} of {of_all} runs)" for message, count in runs.items()]


def _combine(listed: Sequence[tuple[str, list[str]]], seeds: int, first_seed: int, load: Callable[[Sequence[str]], LoadedConfig]) -> Grid:
    trials: list[Trial] = []
    loaded: list[LoadedConfig] = []
    problems: dict[tuple[str, str], tuple[Problem, dict[str, None]]] = {}
    varied = [key for key, values in listed if len(values) > 1]
    for combination in itertools.product(*(values for _, values in listed)):
        values = dict(zip((key for key, _ in listed), combination, strict=True))
        plain = [f"{key}={value}" for key, value in values.items()]
        for number in range(seeds):
            here = plain
            seed = load(plain).config.training.seed if _SEED in values else first_seed
            if seeds > 1:
                seed += number
                here = [*(each for each in plain if not each.startswith(f"{_SEED}=")), f"{_SEED}={seed}"]
            config = load(here)
            shown = ", ".join(f"{key}={values[key]}" for key in varied)
            for problem in check_config(config.config, config.origins):
                problems.setdefault((problem.code, problem.message), (problem, {}))[1][shown] = None
            trials.append(Trial(len(trials) + 1, {key: values[key] for key in varied}, seed, tuple(here), _final(config)))
            loaded.append(config)
    if problems:
        raise ConfigError([each for problem, where in problems.values() for each in _placed(problem, list(where), len(trials) // seeds)])
    return Grid(ranked_by(trials, loaded), loaded)


def ranked_by(trials: Sequence[Trial], loaded: Sequence[LoadedConfig]) -> list[Trial]:
    """The trials with their figure. Raises ConfigError if the held-out rows of two of them are measured by figures that do not compare.

    A loss does not compare with one of other constants, under `preference`; the share of answers that are judged rightly does. It does
    not where the objective or the division by lengths differs, because they judge the same answers by other rewards.
    """
    learns = {LEARNS[each.config.training.objective] for each in loaded}
    varied = list(trials[0].values)
    metrics = {each.config.evaluation.metric for each in loaded}
    rewarded = next((each.config for each in loaded if each.config.training.objective == "grpo"), None)
    if rewarded is not None and metrics == {"loss"}:
        message = "learning from rewards changes the loss of the held-out answers by accident, so it cannot rank these runs"
        hint = f"--set evaluation.metric={rewarded.grpo.reward or 'FILE.py:FUNCTION'}"
        raise ConfigError(Problem(code="sweep.losses-differ", message=message, where="evaluation.metric", hint=hint))
    if len(metrics) == 1 and metrics != {"loss"}:  # what the user calls better, whatever the loss is
        figure = metric_name(metrics.pop())
        return [replace(trial, figure=figure, chosen_by=figure) for trial in trials]
    if len(metrics) > 1:  # the step that another metric chose is not known from the losses
        trials = [replace(trial, final="last") for trial in trials]
    constants = [key for key in varied if key.startswith("preference.")]
    if learns == {"answers"} or not (constants or "training.objective" in varied):
        return list(trials)
    for key in ("training.objective", "preference.length_normalized"):
        if key in varied:
            message = f"{key} says how a held-out answer is judged, so neither losses nor accuracies of these runs can be compared"
            hint = "train each with its own --output, and compare answers: llamahome train-eval RUN DATA --metric NAME"
            raise ConfigError(Problem(code="sweep.losses-differ", message=message, where=key, hint=hint))
    return [replace(trial, figure="answer_accuracy" if learns == {"labelled"} else "pair_accuracy") for trial in trials]


def _placed(problem: Problem, combinations: Sequence[str], count: int) -> list[Problem]:
    """The problem of some combinations with their values; without, if all of the `count` have it."""
    return (
        [problem] if len(combinations) == count else [replace(problem, message=f"with {each}: {problem.message}") for each in combinations]
    )


def _final(loaded: LoadedConfig) -> str:
    """Which evaluation is that of the final model."""
    return loaded.config.output.final


def _problems_of(load: Callable[[Sequence[str]], LoadedConfig], assignment: str) -> list[Problem]:
    try:
        load([assignment])
    except ConfigError as error:
        return list(error.problems)
    return []


def _repeated(assignments: Sequence[str], listed: Sequence[tuple[str, list[str]]], seeds: int) -> list[Problem]:
    keys = [key for key, _ in listed]
    problems = []
    for key in dict.fromkeys(keys):
        if keys.count(key) > 1:
            values = ",".join(each.partition("=")[2] for each in assignments if each.partition("=")[0].strip() == key)
            message = f"{key} is set {keys.count(key)} times"
            problems.append(Problem(code="sweep.key-twice", message=message, where="--set", hint=_assignment(key, values)))
    if seeds > 1 and any(key == _SEED and len(values) > 1 for key, values in listed):
        message = f"both --seeds and {_SEED} list seeds"
        problems.append(Problem(code="sweep.key-twice", message=message, where="--seeds", hint=f"leave out --seeds {seeds}"))
    for key in ("output.dir", "output.name"):
        if key in keys:
            message = "every run of a sweep has its own name and its own folder below that of the sweep"
            problems.append(Problem(code="sweep.key-twice", message=message, where=f"--set {key}", hint=f"leave out --set {key}"))
    return problems


def _typed_twice(listed: Sequence[tuple[str, list[str]]], flags: Mapping[str, str]) -> list[Problem]:
    """A flag and a list for one key: one of them would be ignored."""
    return [
        Problem(
            code="sweep.key-twice", message=f"both {flags[key]} and --set {key} are given", where=flags[key], hint=f"leave out {flags[key]}"
        )
        for key, _ in listed
        if key in flags
    ]


def _equal_values(key: str, values: Sequence[str], load: Callable[[Sequence[str]], LoadedConfig], *, others: bool) -> list[Problem]:
    """Values that are written differently and mean the same would be the same run twice. `others`: whether anything else is listed."""
    seen: dict[str, str] = {}
    problems = []
    for value in values:
        meant = repr(settings()[key].of(load([f"{key}={value}"]).config))
        if meant in seen:
            message = f"{key} lists one value twice: {seen[meant]} and {value}"
            problems.append(Problem(code="sweep.value-twice", message=message, where="--set"))
        seen.setdefault(meant, value)
    hint = _assignment(key, ",".join(seen.values()))
    if len(seen) == 1 and not others:
        hint += " --seeds 2   compares two seeds; or list another value"
    return [replace(problem, hint=hint) for problem in {problem.message: problem for problem in problems}.values()]


def _assignment(key: str, values: str) -> str:
    """The option as one types it, always in quotes."""
    text = f"{key}={values}"
    return f"--set {shlex.quote(text)}" if "'" in text else f"--set '{text}'"
