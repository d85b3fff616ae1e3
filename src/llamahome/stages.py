"""What an objective puts between the loader and the loop: for grpo the model's own answers to the rows' prompts."""

from llamahome.assembly import Job
from llamahome.config.load import LoadedConfig
from llamahome.data.steps.loader import Loader, Steps
from llamahome.errors import Problem
from llamahome.model.sampling import Sampling
from llamahome.monitoring.throughput import PartClock
from llamahome.training.metric_file import REWARD, load_function
from llamahome.training.rollouts import AnsweredSteps, Drawing, Reward


def check_stage(loaded: LoadedConfig) -> None:
    """Raise ConfigError if the function that rewards answers cannot be used."""
    if loaded.config.training.objective == "grpo" and loaded.config.grpo.reward is not None:
        load_function(loaded.config.grpo.reward, REWARD)


def make_steps(job: Job, loader: Loader, clock: PartClock) -> Steps:
    """The steps that the loop reads: `loader`, or the model's own answers to its rows."""
    config, source = job.config, job.data.prepared.reading.source
    if config.training.objective != "grpo":
        return loader
    grpo = config.grpo
    assert grpo.reward is not None

    def row_of(number: int) -> dict[str, object]:
        row = source.parsed(number)
        return {} if isinstance(row, Problem) else row.value

    drawing = Drawing(
        group_size=grpo.group_size,
        sampling=Sampling(temperature=grpo.temperature, max_new_tokens=grpo.max_new_tokens),
        reward=Reward(load_function(grpo.reward, REWARD), job.data.tokenizer, row_of),
        divide_by_std=grpo.divide_by_std,
        seed=config.training.seed,
    )
    return AnsweredSteps(loader, drawing, job.learner.model, job.learner.placement, clock)
