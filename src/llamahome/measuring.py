"""Measures a model and its base on the same rows: loss, generated answers, and which model is the base.

The base of an adapter is the same model with its adapter switched off, so no second copy is in memory; another base is loaded after the
model has been freed. Both get the same tokens if they have the same vocabulary; otherwise each reads the rows with its own tokenizer, and
losses, which are per token, are not compared.
"""

import gc
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamahome import assembly
from llamahome.config.load import LoadedConfig, read_saved_config
from llamahome.conversation import model_folder, open_to_measure, read_fitted, typed_base
from llamahome.data.prepare import StoredExamples
from llamahome.data.store.table import ExampleTable
from llamahome.distributed.standing import LOAD
from llamahome.errors import ConfigError, MachineError
from llamahome.model.adapter import can_switch_off, without_adapter
from llamahome.model.adapter_folder import find_base, is_adapter
from llamahome.model.backends.choose import choose_backend
from llamahome.model.load import CausalLM, find_model
from llamahome.model.objective import Objective
from llamahome.rundir import run_of
from llamahome.session import Session
from llamahome.training.answering import generate_answers
from llamahome.training.answers import Questions, RowLoss, evaluation_of, last_span, read_questions, row_losses
from llamahome.training.evaluate import Evaluation
from llamahome.units import many

NO_BASE = "none"
"""What --base says if nothing is to be compared."""


@dataclass(frozen=True)
class Asked:
    """What train-eval measures beside the loss."""

    metrics: tuple[str, ...] = ()
    """Names of metrics, as open_metric takes them."""
    base: str | None = None
    """A model to compare with; `none` for no comparison; None for the base of an adapter or a run."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval, as tasks.py takes them."""
    answers: Path | None = None
    """The file of answers; None: in the folder of the run, if the model is of one."""
    max_new_tokens: int = 256
    rows: int | None = None
    """Only so many rows, chosen by content and always the same."""

    @property
    def generates(self) -> bool:
        """Whether answers are generated."""
        return bool(self.metrics or self.answers)


NOTHING_MORE = Asked()


@dataclass(frozen=True)
class RowsRead:
    """The rows in the tokens of one model."""

    fitted: LoadedConfig
    stored: StoredExamples
    table: ExampleTable
    numbers: NDArray[np.int64]
    """The row of the source that each row of `table` is."""
    questions: Questions

    def clusters(self) -> dict[int, Hashable]:
        """By row: its prompt, or all of it if it has none or all rows have the same."""
        prompts: dict[int, Hashable] = {}
        whole: dict[int, Hashable] = {}
        for example, row in enumerate(self.table.row_of.tolist()):
            if row not in prompts:
                found = self.table.example(example)
                start = last_span(found.targets.tolist())[0]
                whole[row] = found.tokens.tobytes()
                prompts[row] = found.tokens[:start].tobytes() if start > 1 else whole[row]
        kept = prompts if len(set(prompts.values())) > 1 else whole
        return {int(self.numbers[row]): name for row, name in kept.items()}


@dataclass
class Measured:
    """What one model came to."""

    folder: Path
    rows: RowsRead
    losses: dict[int, RowLoss]
    """By the number of the row in the source."""
    answers: dict[int, str] = field(default_factory=dict)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    """By metric, then by row."""
    cut: int = 0
    """Answers that ended at the most new tokens."""

    @property
    def evaluation(self) -> Evaluation:
        """Over all targets."""
        return evaluation_of(self.losses)

    def means(self) -> dict[str, float]:
        """The mean of each metric over the rows that have an answer."""
        return {name: sum(scores.values()) / max(1, len(scores)) for name, scores in self.scores.items()}

    def figures(self) -> dict[str, Any]:
        """Loss, perplexity, token accuracy and metrics; a perplexity beyond floats is None."""
        found = self.evaluation
        perplexity = found.perplexity if math.isfinite(found.perplexity) else None
        return {"loss": found.loss, "perplexity": perplexity, "token_accuracy": found.accuracy, "metrics": self.means()}


def find_compared(folder: Path, loaded: LoadedConfig, asked: Asked, session: Session) -> Path | None:
    """The folder of the model to compare with: --base, else the base of an adapter or of the run that holds the model; None: nothing."""
    say = session.progress.say
    if asked.base == NO_BASE:
        return None
    if asked.base is not None:
        return model_folder(asked.base, loaded, say=say)
    if is_adapter(folder):
        return find_base(folder, typed=typed_base(loaded), say=say)
    if (run := run_of(folder)) is None or not (run / "config.yaml").is_file():
        return None
    try:
        saved = read_saved_config(run / "config.yaml").config.model
        return find_model(saved.name, revision=saved.revision, say=say)
    except (ConfigError, MachineError) as error:
        say(f"nothing to compare with: {error.problems[0].message}; --base MODEL names the base")
        return None


def read_rows_for(folder: Path, loaded: LoadedConfig, data_path: str | Sequence[str], asked: Asked, session: Session) -> RowsRead:
    """The rows in the tokens of the model in `folder`, and the questions if answers are generated."""
    progress = session.progress
    fitted, stored = read_fitted(loaded, data_path, folder, say=progress.say, warn=progress.warn)
    table, numbers = stored.table, np.arange(stored.table.num_rows)
    if asked.rows is not None:
        filled = np.flatnonzero(np.diff(table.firsts))
        chosen = filled[np.argsort(stored.reading.source.hashes()[filled], kind="stable")][: asked.rows]
        numbers = np.sort(chosen)
        progress.say(f"{many(len(numbers), 'row')} of {len(filled):,}, chosen by content")
        table = table.examples_of(numbers)
    questions = read_questions(stored.reading, numbers.tolist()) if asked.generates else Questions((), 0, 0)
    for line in questions.lines():
        progress.say(line)
    return RowsRead(fitted, stored, table, numbers, questions)


def measure_both(
    folder: Path,
    compared: Path | None,
    rows: RowsRead,
    *,
    loaded: LoadedConfig,
    data_path: str | Sequence[str],
    asked: Asked,
    session: Session,
) -> tuple[Measured, Measured | None]:
    """The model, and the model that it is compared with."""
    say, phase = session.progress.say, session.progress.phase
    with session.phase("model", LOAD):
        model = _open(folder, rows.fitted, session)
    with phase("evaluation" if compared is None else "evaluation, also of the base"):
        measured = _measure(model, folder, rows, asked, session)
        if compared is None:
            return measured, None
        own_base = find_base(folder, typed=typed_base(loaded), say=lambda _: None) if is_adapter(folder) else None
        if own_base is not None and own_base.resolve() == compared.resolve() and can_switch_off(folder):
            with without_adapter(model):
                return measured, _measure(model, compared, rows, asked, session)
        del model
        gc.collect()
        try:
            own = read_rows_for(compared, loaded, data_path, asked, session)
        except ConfigError as error:
            if asked.base is not None:
                raise
            say(f"nothing to compare with: {compared.name} cannot take these rows: {error.problems[0].message}")
            return measured, None
        same = own.stored.reading.tokenizer.vocabulary == rows.stored.reading.tokenizer.vocabulary
        if not same:
            say(f"{compared.name} has another vocabulary: its loss is per token of its own, so losses are not compared")
        base = _open(compared, rows.fitted if same else own.fitted, session)
        return measured, _measure(base, compared, rows if same else own, asked, session)


def _open(folder: Path, fitted: LoadedConfig, session: Session) -> CausalLM:
    backend = choose_backend(fitted.config, session.world.device)
    return open_to_measure(folder, fitted, backend, session.world.device, say=session.progress.say)


def _measure(model: CausalLM, folder: Path, rows: RowsRead, asked: Asked, session: Session) -> Measured:
    """Losses and answers of `model` as it is now; every rank answers its share of the questions."""
    world, say = session.world, session.progress.say
    backend = choose_backend(rows.fitted.config, world.device)
    batches = assembly.held_out(rows.table, rows.fitted.config, world, backend).lay_out()
    losses = row_losses(Objective(model, backend), batches, rows.table, world=world)
    measured = Measured(folder, rows, {int(rows.numbers[row]): loss for row, loss in losses.items()})
    questions, tokenizer = rows.questions.asked, rows.stored.reading.tokenizer
    if not questions:
        return measured
    mine = [question.tokens for question in questions[world.rank :: world.size]]
    generated = generate_answers(model, mine, end_ids=tokenizer.all_ends, max_new_tokens=asked.max_new_tokens, say=say)
    shares = world.gather(generated)
    for number, question in enumerate(questions):
        ids = shares[number % world.size][number // world.size]
        measured.cut += len(ids) >= asked.max_new_tokens
        measured.answers[question.row] = tokenizer.decode(ids).strip()
    return measured
