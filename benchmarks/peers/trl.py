"""TRL's SFTTrainer with the settings of the task; a callback waits for the next turn after each step."""

from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.peers.turn import IGNORED, Turn, read_rows, task


class RecordingTrainer(SFTTrainer):
    """Records the rows of each micro-batch before the model gets them."""

    turn: Turn
    loss = 0.0
    """Loss of the current step, summed here because TRL rounds the loss that it logs."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *words: Any, **named: Any) -> torch.Tensor:
        """Record the rows without padding, then train on them."""
        ids, labels = inputs["input_ids"].tolist(), inputs["labels"].tolist()
        if "attention_mask" in inputs:
            sizes = inputs["attention_mask"].sum(1).tolist()
            rows = [(each[:size], label[:size]) for each, label, size in zip(ids, labels, sizes, strict=True)]
        else:  # padding-free: concatenated rows, with positions from 0 in each
            starts = [number for number, position in enumerate(inputs["position_ids"][0].tolist()) if position == 0]
            ranges = zip(starts, [*starts[1:], len(ids[0])], strict=True)
            rows = [(ids[0][begin:end], labels[0][begin:end]) for begin, end in ranges]
        for each, label in rows:
            self.turn.fed.row(each, [value != IGNORED for value in label])
        share = super().training_step(model, inputs, *words, **named)
        self.loss += share.item()
        return share

    def end_step(self) -> None:
        """Report the loss and wait for the next turn."""
        loss, self.loss = self.loss, 0.0
        self.turn.between(loss)


class InTurn(TrainerCallback):
    """Waits for the next turn before the first step and after each step."""

    trainer: RecordingTrainer

    def on_train_begin(self, *words: Any, **named: Any) -> None:
        """Report that everything is loaded."""
        self.trainer.turn.between()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any) -> None:
        """End the step: with logging_steps=1 this is called after each step."""
        if logs and "loss" in logs:
            self.trainer.end_step()


def make_trainer(given: dict[str, Any], turn: Turn) -> RecordingTrainer:
    """Create the trainer of this task; other settings are TRL's defaults."""
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
    trainer = RecordingTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[in_turn])
    trainer.turn, in_turn.trainer = turn, trainer
    turn.command("save", lambda: _save(trainer))
    return trainer


def _save(trainer: RecordingTrainer) -> dict[str, Any]:
    trainer.save_model("trained")
    return {"saved": "trained"}


def run() -> None:
    """Train, one turn after the other."""
    given = task()
    make_trainer(given, Turn()).train()


if __name__ == "__main__":
    run()
