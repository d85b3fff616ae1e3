"""litgpt's finetune_lora and finetune_full with micro-batch 1; the data loader waits for its turn at the start of each step.

litgpt averages the mean losses of the micro-batches, so a short row counts as much as a long one: its losses are not comparable with those
of other systems, but its work per token is.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import configs, name_to_config
from litgpt.data import DataModule
from litgpt.finetune import full, lora
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from torch.utils.data import DataLoader

from benchmarks.peers.turn import IGNORED, Turn, read_rows, task

_NAME = "of-the-benchmark"


def convert(source: Path, folder: Path, *, dtype: str) -> None:
    """Convert a Llama folder into `folder` with litgpt's converter."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    hf_config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = {
        "name": _NAME,
        "hf_config": {"org": "benchmark", "name": _NAME},
        "block_size": hf_config["max_position_embeddings"],
        "vocab_size": hf_config["vocab_size"],
        "padded_vocab_size": hf_config["vocab_size"],
        "n_layer": hf_config["num_hidden_layers"],
        "n_head": hf_config["num_attention_heads"],
        "n_embd": hf_config["hidden_size"],
        "n_query_groups": hf_config["num_key_value_heads"],
        "intermediate_size": hf_config["intermediate_size"],
        "norm_eps": hf_config["rms_norm_eps"],
        "rope_base": int((hf_config.get("rope_parameters") or hf_config)["rope_theta"]),
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
    }
    configs.append(config)
    name_to_config[_NAME] = config
    convert_hf_checkpoint(folder, model_name=_NAME, dtype=dtype)


class Rows(DataModule):
    """The rows of the task, one at a time."""

    def __init__(self, given: dict[str, Any], turn: Turn) -> None:
        super().__init__()
        self._rows, self._batch, self._turn = read_rows(given["rows"]), given["batch"], turn
        self._yielded = 0

    def connect(self, *words: Any, **named: Any) -> None:
        """Do nothing: the rows are tokenized already."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Return a loader that waits for its turn before the first row of each step."""
        return DataLoader(self._rows, batch_size=1, collate_fn=self._train)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return one row, because litgpt evaluates before it starts."""
        return DataLoader(self._rows[:1], batch_size=1, collate_fn=self._tensors)  # type: ignore[arg-type]

    def _train(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        if self._yielded % self._batch == 0:
            self._turn.between()
        self._yielded += 1
        for row in rows:
            self._turn.fed.row(row["input_ids"], [label != IGNORED for label in row["labels"]])
        return self._tensors(rows)

    @staticmethod
    def _tensors(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        tensors = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        return {**tensors, "token_counts": {"raw": lengths, "raw_plus_prompt_template": lengths}}


def run() -> None:
    """Train, one turn after the other."""
    given = task()
    turn = Turn()
    folder = Path("model")
    convert(Path(given["model"]), folder, dtype="bfloat16" if given["bf16"] else "float32")
    layers = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")}
    adapters = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, **layers}
    train = TrainArgs(
        save_interval=None,
        log_interval=given["batch"],
        global_batch_size=given["batch"],
        micro_batch_size=1,
        lr_warmup_steps=1,
        epochs=1,
    )
    (lora if given["method"] == "lora" else full).setup(
        checkpoint_dir=folder,
        out_dir=Path("litgpt-output"),
        precision="bf16-true" if given["bf16"] else "32-true",
        data=Rows(given, turn),
        train=train,
        eval=EvalArgs(interval=1 << 40, max_iters=1, max_new_tokens=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": given["rate"], "weight_decay": 0.0, "fused": True}},
        **(adapters if given["method"] == "lora" else {}),
    )


if __name__ == "__main__":
    run()
