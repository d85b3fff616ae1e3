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
from llamahome.training.labelled import LabelledObjective
from llamahome.training.preferences import LOSSES, Answers, PairObjective

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"loss_type": ["sigmoid"], "beta": 0.1}, {"beta": 0.1}),
    "dpo-normalized": ({"loss_type": ["sigmoid_norm"], "beta": 2.0}, {"beta": 2.0, "length_normalized": True}),
    "ipo": ({"loss_type": ["ipo"], "beta": 0.2}, {"beta": 0.2}),
}


def one_batch(trainer: Any) -> dict[str, Any]:
    """The rows of a TRL trainer as one batch, without the line break after the end-of-turn token, which TRL learns, too."""
    (batch,) = trainer.get_train_dataloader()
    for mask, tokens in [(name, name.replace("completion", "attention")) for name in batch if name.endswith("completion_mask")]:
        ends = batch[tokens].sum(1) - 1
        batch[mask][torch.arange(len(ends)), ends] = 0
    return batch


def our_table(tmp_path: Path, rows: list[dict[str, Any]], policy: Path, reference: Any, form: str) -> ExampleTable:
    """The same rows as llamahome reads them, with the log-probabilities of `reference`."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = DataConfig(format=form)
    table = read_all(data, str(path), load_tokenizer(policy), say=lambda line: None, processed=tmp_path / "processed").table
    with torch.no_grad():
        known = np.array([float(plain_logprob(reference, table.example(number))) for number in range(len(table))], np.float32)
    return ExampleTable(**table.columns(), paths=table.paths, known=known)


def trainer_parts(tmp_path: Path) -> tuple[Path, Any, Any, dict[str, Any], Any]:
    """The folder of a policy, the policy and another model, both in float32, the options of every trainer, and the tokenizer."""
    folders = [save_tiny(tmp_path / name, "llama", seed=seed) for name, seed in (("policy", 0), ("reference", 1))]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    options = {"per_device_train_batch_size": 6, "report_to": "none", "use_cpu": True, "bf16": False, "output_dir": str(tmp_path / "out")}
    options |= {"max_length": 2048, "disable_dropout": True, "gradient_checkpointing": False}
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return folders[0], policy, reference, options, tokenizer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_trl(tmp_path: Path, case: str) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    theirs, ours = CASES[case]
    folder, policy, reference, options, tokenizer = trainer_parts(tmp_path)
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in pairs(6)
    ]
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = trl.DPOTrainer(policy, reference, args=trl.DPOConfig(**options, **theirs), **given)
    expected = float(trainer.compute_loss(trainer.model, one_batch(trainer)).detach())

    table = our_table(tmp_path, rows, folder, reference.eval(), "preference")
    objective = PairObjective(case.split("-")[0], PreferenceConfig(**ours), objective_of(our_model(folder)))
    batches = sequential_microbatches(table, micro_batch_tokens=200, layout=Layout(whole_rows=True, shares=True))
    assert sum(float(objective.loss_sum(each)[0].detach()) for each in batches) / 6 == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_labelled_answers_is_that_of_trl_at_its_reference_point(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    folder, policy, reference, options, tokenizer = trainer_parts(tmp_path)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["chosen"]}],
            "label": number % 3 != 1,
        }
        for number, row in enumerate(pairs(6))
    ]
    given = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer}
    args = trl.KTOConfig(**options, beta=0.3, train_sampling_strategy="sequential", **weights)
    trainer = trl.KTOTrainer(policy, reference, args=args, **given)
    expected = float(trainer.compute_loss(trainer.model, one_batch(trainer)).detach())
    (point,) = trainer._metrics["eval"]["kl"]  # the model is in its evaluation mode

    table = our_table(tmp_path, rows, folder, reference.eval(), "labelled")
    objective = LabelledObjective(PreferenceConfig(beta=0.3, **weights), objective_of(our_model(folder)))
    objective.point.restore(point)
    batches = sequential_microbatches(table, micro_batch_tokens=200)
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
