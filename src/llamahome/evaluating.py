"""Which of the held-out rows a run evaluates and how often, so that all its evaluations together take about a tenth of the time it trains.

The rule itself is `plan_evaluations` in training/schedule.py; here it gets its figures, and what it finds is written into the settings, so
that a resumed run evaluates the same rows. The rows with the smallest hashes of content are taken: fewer rows are a part of more, and
the order of the file and the length of the run have no say in it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llamahome.assembly import Plan
from llamahome.config.load import LoadedConfig, is_chosen, with_values
from llamahome.config.schema import interval
from llamahome.data.prepare import Prepared
from llamahome.data.store.table import ExampleTable
from llamahome.model.backends.backend import Backend
from llamahome.training.schedule import plan_evaluations

ANSWER_TOKENS = 64
"""The longest answer to a sample prompt."""
_A_TENTH = 0.12
"""Still called a tenth when it is told."""
_TRAINED = {"lora": 2.0, "full": 3.0}
"""Forward passes that a trained token costs: a forward pass, the gradient of the input and, where all weights are trained, theirs."""


def resolve_evaluation(
    loaded: LoadedConfig, prepared: Prepared, plan: Plan, backend: Backend, *, say: Callable[[str], None]
) -> LoadedConfig:
    """Replace evaluation.rows auto and evaluation.every auto by numbers; `say` is told when not all held-out rows are evaluated."""
    config = loaded.config
    rows, every, method = config.evaluation.rows, config.evaluation.every, config.training.method
    if rows == "auto" and plan.rows_ahead < plan.positions and not is_chosen(loaded.origins["evaluation.rows"]):
        rows = "all"  # goes on with a run of an earlier version, which evaluated all
    tokens = row_tokens(prepared)
    found = plan_evaluations(
        tokens,
        work=_TRAINED[method] * plan.positions * prepared.report.tokens_per_row,
        answers=ANSWER_TOKENS * backend.pass_tokens_per_answer_token if config.evaluation.sample_prompts else 0.0,
        horizon=plan.horizon,
        steps_per_epoch=plan.steps_per_epoch,
        rows=len(tokens) if rows == "all" else rows,
        every=None if every == "auto" else interval(every),
    )
    if every == "auto":
        loaded = with_values(loaded, {"evaluation.every": str(found.every)}, origin="auto: at most a tenth of the work")
    if config.evaluation.rows == "auto" and len(tokens):
        whole = found.rows == len(tokens)
        cost = "so that evaluating takes about a tenth of the time of training"
        if found.share > _A_TENTH:
            cost = f"no fewer, although evaluating takes {found.share:.0%} of the time of training"
        origin = "auto: all" if whole else f"auto: of {len(tokens):,}, {cost}"
        loaded = with_values(loaded, {"evaluation.rows": "all" if whole else found.rows}, origin=origin)
        if not whole:
            chosen = f"evaluation: {found.rows:,} of {len(tokens):,} held-out rows, chosen by content"
            say(f"{chosen}, {cost}; --set evaluation.rows=all evaluates all")
    return loaded


def row_tokens(prepared: Prepared) -> NDArray[np.int64]:
    """Tokens of each held-out row that has an example, in the order in which rows are taken."""
    table = prepared.evaluation
    if table is None:
        return np.empty(0, np.int64)
    found: NDArray[np.int64] = np.diff(table.offsets[table.firsts])[_order(prepared, table)]
    return found


def evaluated(prepared: Prepared, loaded: LoadedConfig) -> ExampleTable | None:
    """The examples that evaluation.rows names, in the order of the file; None when nothing is held out."""
    table, rows = prepared.evaluation, loaded.config.evaluation.rows
    if table is None or not isinstance(rows, int):
        return table
    order = _order(prepared, table)
    return table if rows >= len(order) else table.examples_of(np.sort(order[:rows]))


def _order(prepared: Prepared, table: ExampleTable) -> NDArray[np.int64]:
    """The rows that have an example, those with the smallest hashes first."""
    rows = np.flatnonzero(np.diff(table.firsts))
    return rows[np.argsort(prepared.evaluation_hashes[rows], kind="stable")]
