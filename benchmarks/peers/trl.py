"""TRL's SFTTrainer with the settings of the task; a callback waits for the turn after each step."""

from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.turn import IGNORED, Turn, read_rows, task


class Watched(SFTTrainer):
    """The trainer, which notes each micro-batch as it reaches the model."""

    turn: Turn
    loss = 0.0
    """Of the step that runs: TRL divides each micro-batch's sum by the targets of the whole step, and rounds what it logs."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *words: Any, **named: Any) -> torch.Tensor:
        """Note the rows without their padding, then train on them."""
        ids, labels = inputs["input_ids"].tolist(), inputs["labels"].tolist()
        if "attention_mask" in inputs:
            sizes = inputs["attention_mask"].sum(1).tolist()
            rows = [(each[:size], label[:size]) for each, label, size in zip(ids, labels, sizes, strict=True)]
        else:  # padding-free: rows end to end, each with positions from 0
            starts = [number for number, position in enumerate(inputs["position_ids"][0].tolist()) if position == 0]
            stretches = zip(starts, [*starts[1:], len(ids[0])], strict=True)
            rows = [(ids[0][begin:end], labels[0][begin:end]) for begin, end in stretches]
        for each, label in rows:
            self.turn.fed.row(each, [value != IGNORED for value in label])
        share = super().training_step(model, inputs, *words, **named)
        self.loss += share.item()
        return share

    def end_step(self) -> None:
        """Wait for the next turn."""
        loss, self.loss = self.loss, 0.0
        self.turn.between(loss)


class InTurn(TrainerCallback):
    """Waits before the first step and after each one."""

    trainer: Watched

    def on_train_begin(self, *words: Any, **named: Any) -> None:
        """Everything is loaded."""
        self.trainer.turn.between()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        """A step has ended: with logging_steps=1 this comes after each one, also when all its logging is done."""
        if logs and "loss" in logs:
            self.trainer.end_step()


def make_trainer(given: dict[str, Any], turn: Turn) -> Watched:
    """The trainer of this task, with everything else as TRL has it."""
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
    if given["method"] == "lora":
        model = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True)
    micro = min(given["batch"], given["micro_batch"] or given["batch"])
    settings = SFTConfig(
        output_dir="trl-output",
        use_cpu=True,
        bf16=given["bf16"],
        gradient_checkpointing=given["checkpointing"],
        padding_free=given["padding_free"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=given["batch"] // micro,
        learning_rate=given["rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        num_train_epochs=1,
        max_length=None,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_list(read_rows(given["rows"]))
    tokenizer, in_turn = AutoTokenizer.from_pretrained(given["model"]), InTurn()
    trainer = Watched(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[in_turn])
    trainer.turn, in_turn.trainer = turn, trainer
    turn.command("save", lambda: _saved(trainer))
    return trainer


def _saved(trainer: Watched) -> dict[str, Any]:
    trainer.save_model("trained")
    return {"saved": "trained"}


def run() -> None:
    """Train in turns."""
    given = task()
    make_trainer(given, Turn()).train()


if __name__ == "__main__":
    run()
