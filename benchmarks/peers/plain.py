"""A good plain PyTorch loop: weights in the fast dtype, one document at a time, logits of targets only.

No padding, no autocast, no gradient checkpointing, fused AdamW, PEFT's LoRA in the same dtype. It is the fastest simple alternative.
"""

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.peers.turn import IGNORED, Turn, read_rows, task


def run() -> None:
    """Train, one turn after the other."""
    given = task()
    turn = Turn()
    model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.bfloat16 if given["bf16"] else torch.float32)
    if given["method"] == "lora":
        model = PeftModel.from_pretrained(model, given["adapter"], is_trainable=True, autocast_adapter_dtype=False).base_model.model
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given["rate"], weight_decay=0.0, fused=True)
    rows = read_rows(given["rows"])
    loss = None
    for begin in range(0, len(rows), given["batch"]):
        turn.between(loss)
        step = rows[begin : begin + given["batch"]]
        targets = sum(label != IGNORED for row in step for label in row["labels"])
        loss = 0.0
        for row in step:
            turn.fed.row(row["input_ids"], [label != IGNORED for label in row["labels"]])
            labels = torch.tensor(row["labels"][1:])
            is_target = (labels != IGNORED).nonzero()[:, 0]
            hidden = model.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).last_hidden_state[0, is_target]
            share = cross_entropy(model.lm_head(hidden).float(), labels[is_target], reduction="sum") / targets
            share.backward()
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    turn.between(loss)


if __name__ == "__main__":
    run()
