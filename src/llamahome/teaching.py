"""Asks a teacher for its likeliest tokens at every target of some rows: what `llamahome data teach` does.

The tokens are the student's, as training will read them, so teacher and student must have one tokenizer. Memory: the teacher, one pass, and
one part of the result. A teaching that was stopped goes on after its last whole part.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llamahome import assembly
from llamahome.assembly import RunData
from llamahome.config.load import LoadedConfig, with_values
from llamahome.config.objectives import LEARNS
from llamahome.conversation import model_folder, open_to_measure
from llamahome.data.steps.layout import make_microbatch
from llamahome.data.store import taught
from llamahome.data.store.table import ExampleTable
from llamahome.data.text.tokenizer_files import tokenizer_source
from llamahome.data.text.tokens import ChatTokenizer, open_tokenizer
from llamahome.distributed.standing import LOAD, READ
from llamahome.errors import ConfigError, DataError, Problem
from llamahome.model.backends.backend import Backend
from llamahome.model.backends.choose import choose_backend
from llamahome.model.backends.token_losses import TopTokens, top_tokens
from llamahome.model.fingerprints import fingerprint
from llamahome.model.generate import positions_of
from llamahome.model.load import CausalLM, head_of
from llamahome.model.objective import hidden_states
from llamahome.rundir import refuse_unwritable
from llamahome.session import Session, open_session
from llamahome.units import many, show_bytes

_BYTES = 8
"""Of a token that is kept: its id and its log-probability."""


@dataclass(frozen=True)
class Lesson:
    """What a teaching came to."""

    folder: Path
    about: taught.About
    found: int
    """Parts that an earlier try had written."""


@dataclass(frozen=True)
class AskedTeacher:
    """What is asked of whom, and where it goes."""

    teacher: str
    output: Path
    top_k: int


def teach(data_path: Sequence[str], loaded: LoadedConfig, asked: AskedTeacher) -> Lesson:
    """Write what the teacher says at every target of every row of `data_path`.

    Raises ConfigError for pairs or labelled answers and for a teacher with another tokenizer or too few positions,
    DataError if the folder holds something else.
    """
    objective = loaded.config.training.objective
    if LEARNS[objective] != "answers":
        message = f"training.objective is {objective}, and a teacher is asked about one good answer to each prompt"
        hint = "--set training.objective=sft, with data.columns naming the good answer of a pair"
        raise ConfigError(Problem(code="config.teach-needs-answers", message=message, where="training.objective", hint=hint))
    values = {"data.eval_split": 0, "data.eval_path": None, "data.streaming": False}
    all_rows = with_values(loaded, values, origin="data teach")
    with open_session(all_rows, saves=False) as session:
        return _write_lesson(data_path, all_rows, asked, session)


def _write_lesson(data_path: Sequence[str], loaded: LoadedConfig, asked: AskedTeacher, session: Session) -> Lesson:
    say, teacher, output, top_k = session.progress.say, asked.teacher, asked.output, asked.top_k
    with session.phase("data", READ):
        data = assembly.read_data(session, loaded, data_path)
        folder = _folder_of(teacher, loaded, say=say)
        _refuse_other_tokenizer(data.tokenizer, open_tokenizer(tokenizer_source(folder, loaded.config.model)), teacher, loaded)
    table = data.prepared.examples
    assert isinstance(table, ExampleTable)
    about = _about(data, table, folder, teacher=teacher, top_k=top_k)
    waiting = _prepare_folder(output, about)
    found = about.parts - len(waiting)
    if found:
        say(f"{output}: {found} of {many(about.parts, 'part')} are there already")
    if waiting:
        with session.phase("teacher", LOAD):
            backend = choose_backend(data.fitted.config, session.world.device)
            model = open_to_measure(folder, data.fitted, backend, session.world.device, say=say)
            _refuse_short(model, int(table.lengths.max(initial=0)), teacher)
        with session.progress.phase("log-probabilities"):
            asking = _Teacher(model.eval(), backend, max(data.tokenizer.vocabulary.values()) + 1, top_k)
            _write_parts(asking, table, waiting, output, about, say=say)
    taught.finish(output, about)
    return Lesson(output, about, found)


def _folder_of(teacher: str, loaded: LoadedConfig, *, say: Callable[[str], None]) -> Path:
    try:
        return model_folder(teacher, loaded, say=say)
    except ConfigError as error:
        raise ConfigError([replace(each, where="--teacher") if each.where == "MODEL" else each for each in error.problems]) from error


def _about(data: RunData, table: ExampleTable, folder: Path, *, teacher: str, top_k: int) -> taught.About:
    rows, tokenizer, own = data.prepared.fingerprint, data.tokenizer.fingerprint, fingerprint(folder)
    stamp = hashlib.sha256(json.dumps([own, tokenizer, rows, top_k]).encode()).hexdigest()
    return taught.About(
        stamp=stamp,
        teacher=teacher,
        teacher_fingerprint=own,
        tokenizer=tokenizer,
        top_k=top_k,
        data=data.paths,
        data_fingerprint=rows,
        examples=len(table),
        targets=int(table.targets.sum()),
        parts=len(taught.parts_of(table)),
    )


def _prepare_folder(output: Path, about: taught.About) -> list[int]:
    """Make the folder; returns the numbers of the parts that are not there. Raises DataError if it holds something else."""
    before = taught.read_about(output)
    if (before is not None and before.stamp != about.stamp) or taught.holds_others(output):
        what = f"log-probabilities of {before.teacher} for other rows, settings or top-k" if before is not None else "something else"
        hint = f"--output {output}-2"
        raise DataError(Problem(code="data.teacher-folder-used", message=f"the folder holds {what}", where=str(output), hint=hint))
    refuse_unwritable(output, what="the teacher's log-probabilities")
    output.mkdir(parents=True, exist_ok=True)
    return [number for number in range(about.parts) if not taught.is_whole(output, number, stamp=about.stamp)]


@dataclass(frozen=True)
class _Teacher:
    """The model that is asked, and for how much."""

    model: CausalLM
    backend: Backend
    known: int
    """Tokens that the tokenizer has."""
    top_k: int

    @torch.no_grad()
    def ask(self, table: ExampleTable, numbers: Sequence[int]) -> TopTokens:
        """About some examples in one pass: on the processor, in the order of the targets."""
        backend, model = self.backend, self.model
        batch = backend.to_device(make_microbatch([table.example(number) for number in numbers], keys=numbers, index=0))
        laid = backend.make_pass(batch, model)
        hidden = hidden_states(model, laid, backend).index_select(0, laid.rows_N)
        found = top_tokens(hidden, head_of(model), self.top_k, dtype=backend.precision.compute, known=self.known)
        return TopTokens(found.ids_NK.cpu(), found.logs_NK.cpu(), found.rest_N.cpu())


def _write_parts(
    teacher: _Teacher,
    table: ExampleTable,
    waiting: Sequence[int],
    output: Path,
    about: taught.About,
    *,
    say: Callable[[str], None],
) -> None:
    parts, size = taught.parts_of(table), about.targets * about.top_k * _BYTES
    say(f"{many(about.targets, 'target')} with {many(about.top_k, 'token')} each: {show_bytes(size)}")
    for done, number in enumerate(waiting):
        examples = [table.example(example) for example in parts[number]]
        found = [teacher.ask(table, numbers) for numbers in _passes(table, parts[number], teacher.backend)]
        ids, logs, rest = (torch.cat([getattr(each, name) for each in found]) for name in ("ids_NK", "logs_NK", "rest_N"))
        values = taught.TaughtValues(ids.int().numpy(), logs.numpy(), rest.numpy())
        taught.write_part(output, number, examples, values, stamp=about.stamp)
        if len(waiting) > 1:
            say(f"part {done + 1} of {len(waiting)}")


def _passes(table: ExampleTable, part: range, backend: Backend) -> Iterator[list[int]]:
    """The examples of a part in their order, in passes of at most the back end's tokens or one longer example."""
    together: list[int] = []
    tokens = 0
    for number in part:
        length = int(table.lengths[number])
        if together and tokens + length > backend.micro_batch_tokens:
            yield together
            together, tokens = [], 0
        together.append(number)
        tokens += length
    if together:
        yield together


def _refuse_other_tokenizer(student: ChatTokenizer, teacher: ChatTokenizer, name: str, loaded: LoadedConfig) -> None:
    """ConfigError, because log-probabilities of other tokens say nothing about the student's."""
    if student.vocabulary == teacher.vocabulary:
        return
    shared = len(student.vocabulary.items() & teacher.vocabulary.items())
    message = f"{name} has another tokenizer than the student: {shared:,} of its {len(teacher.vocabulary):,} tokens have the same id there"
    hint = "a teacher of the student's family, or train on its answers as plain rows: --set training.objective=sft"
    if loaded.config.model.new_tokens and teacher.vocabulary.items() <= student.vocabulary.items():
        hint = "a teacher that was trained with the same model.new_tokens, or --set model.new_tokens=[]"
    raise ConfigError(Problem(code="model.other-tokenizer", message=message, where="--teacher", hint=hint))


def _refuse_short(model: CausalLM, longest: int, name: str) -> None:
    positions = positions_of(model)
    if positions is not None and longest > positions:
        message = f"{name} has {positions:,} positions, and the longest example has {longest:,} tokens"
        hint = f"--set data.max_length={positions}"
        raise ConfigError(Problem(code="model.teacher-too-short", message=message, where="--teacher", hint=hint))
