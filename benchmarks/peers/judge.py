"""Prints the held-out loss of a trained folder, by transformers and PEFT in float32, row by row: {"loss": nats per target}."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.peers.turn import IGNORED, read_rows, task


@torch.no_grad()
def run() -> None:
    """Evaluate and print."""
    given = task()
    adapter = (Path(given["trained"]) / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(given["model"] if adapter else given["trained"], dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, given["trained"])
    model.eval()
    total, targets = 0.0, 0
    for row in read_rows(given["rows"]):
        labels = torch.tensor(row["labels"][1:])
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        total += cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        targets += int((labels != IGNORED).sum())
    print(json.dumps({"loss": total / targets}))


if __name__ == "__main__":
    run()
