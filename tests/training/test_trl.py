"""The loss of the same rows is that of TRL's own trainer. Skipped without TRL, which is no dependency:

pip install --target /tmp/trl --no-deps trl datasets accelerate multiprocess dill xxhash pandas fsspec python-dateutil six pytz tzdata
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.models import objective_of, our_model, save_tiny
from tests.support.pairs import plain_logprob
from tests.support.projects import pairs, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamahome.config.preference import PreferenceConfig
from llamahome.config.schema import DataConfig
from llamahome.data.prepare import read_all
from llamahome.data.steps.layout import Layout
from llamahome.data.steps.loader import sequential_microbatches
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokens import load_tokenizer
from llamahome.training.preferences import LOSSES, Answers, PairObjective

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"loss_type": ["sigmoid"], "beta": 0.1}, {"beta": 0.1}),
    "dpo-normalized": ({"loss_type": ["sigmoid_norm"], "beta": 2.0}, {"beta": 2.0, "length_normalized": True}),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.2}, {"beta": 0.2}),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_trl(tmp_path: Path, case: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    theirs, ours = CASES[case]
    policy, other = (save_tiny(tmp_path / name, "llama", seed=seed) for name, seed in (("policy", 0), ("reference", 1)))
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in pairs(6)
    ]
    load = AutoModelForCausalLM.from_pretrained
    options = {"per_device_train_batch_size": 6, "report_to": "none", "use_cpu": True, "bf16": False, "output_dir": str(tmp_path / "out")}
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = trl.DPOTrainer(
        load(policy, dtype=torch.float32),
        load(other, dtype=torch.float32),
        args=trl.DPOConfig(**options, **theirs, max_length=2048, disable_dropout=True, gradient_checkpointing=False),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    ends = batch["attention_mask"].sum(1) - 1  # TRL also learns the line break of the template after the end-of-turn token
    batch["completion_mask"][torch.arange(len(ends)), ends] = 0
    expected = float(trainer.compute_loss(trainer.model, batch).detach())

    path = write_rows(tmp_path / "pairs.jsonl", rows)
    data = DataConfig(format="preference")
    table = read_all(data, str(path), load_tokenizer(policy), say=lambda line: None, processed=tmp_path / "processed").table
    reference = load(other, dtype=torch.float32).eval()
    with torch.no_grad():
        known = np.array([float(plain_logprob(reference, table.example(number))) for number in range(len(table))], np.float32)
    table = ExampleTable(**table.columns(), paths=table.paths, known=known)
    objective = PairObjective(case.split("-")[0], PreferenceConfig(**ours), objective_of(our_model(policy)))
    batches = sequential_microbatches(table, micro_batch_tokens=200, layout=Layout(whole_rows=True, shares=True))
    assert sum(float(objective.loss_sum(each)[0].detach()) for each in batches) / 6 == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_odds_ratio_and_the_margin_of_simpo_are_those_of_trl() -> None:
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (50, 2), generator=random).float()
    means = -torch.rand(50, 2, generator=random) * 4 - 0.01
    answers = Answers(means * lengths, lengths, torch.zeros(50, 2))
    device = SimpleNamespace(device=torch.device("cpu"))
    better, worse = means.unbind(1)
    ours, _ = LOSSES["orpo"](answers, PreferenceConfig(), 0.7)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.7, accelerator=device), better, worse)
    torch.testing.assert_close(ours, -better - theirs, rtol=1e-5, atol=1e-6)
    ours, _ = LOSSES["simpo"](answers, PreferenceConfig(gamma=0.8, label_smoothing=0.1), 2.5)
    settings = SimpleNamespace(alpha=0.0, accelerator=device, loss_type="simpo", simpo_gamma=0.8, beta=2.5, label_smoothing=0.1)
    theirs, *_ = CPOTrainer.cpo_loss(settings, better, worse)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
