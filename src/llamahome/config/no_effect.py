"""Which settings change nothing beside the others, and why."""

from llamahome.config.describe import settings
from llamahome.config.objectives import FORMAT_OF
from llamahome.config.schema import Config
from llamahome.units import parse_steps


def reasons_for_no_effect(config: Config) -> dict[str, str]:
    """Key -> why its value changes nothing."""
    reasons: dict[str, str] = {}
    if config.training.method == "full":
        reasons |= {key: "training.method is full" for key in settings() if key.startswith("lora.")}
        reasons["model.dtype"] = "full fine-tuning keeps all weights in float32"
    if config.training.method == "lora" and config.lora.use_vera:
        reasons["lora.alpha"] = "with lora.use_vera trained vectors are the scale"
    if config.model.adapter is not None:
        reasons["lora.init"] = "model.adapter has values of its own"
    if config.data.format in FORMAT_OF.values():
        rows = "pairs" if config.data.format == "preference" else "labelled rows"
        reasons["data.train_on"] = f"of {rows} the answers are learned, and nothing else"
    for section in ("distill", "grpo"):
        if config.training.objective != section:
            reasons |= {key: f"training.objective is {config.training.objective}" for key in settings() if key.startswith(f"{section}.")}
    if config.training.objective == "grpo":
        reasons["training.refuse_spikes"] = "losses of grpo are around zero, where a leap is no sign of harm"
    if config.data.on_bad_row == "error":
        reasons["data.max_bad_share"] = "data.on_bad_row is error: the first bad row stops"
    if config.data.format == "text":
        reasons["model.chat_template"] = "data.format is text: there are no turns"
        if config.data.train_on != "all":
            reasons["data.train_on"] = "data.format is text: all tokens are learned"
    if no_evaluation(config):
        reason = "no rows are held out (data.eval_split 0) and data.eval_path is not set"
        reasons |= dict.fromkeys(
            ("evaluation.metric", "evaluation.every", "evaluation.rows", "evaluation.sample_prompts", "checkpoint.keep_best"), reason
        )
    if config.training.max_steps is not None:
        reasons["training.epochs"] = f"training.max_steps ends the run after step {config.training.max_steps}"
    if config.monitoring.profile is not None and config.training.max_steps is not None:
        first, _ = parse_steps(config.monitoring.profile)
        if first > config.training.max_steps:
            reasons["monitoring.profile"] = f"training.max_steps ends the run after step {config.training.max_steps}"
    if config.distributed.most_nodes == 1:
        reasons["distributed.master_port"] = "one machine picks a free port itself"
    return reasons


def no_evaluation(config: Config) -> bool:
    """Whether nothing is measured: no rows are held out, and no file of them is named."""
    return config.data.eval_split == 0 and config.data.eval_path is None
