"""When bad rows stop a run, and what to do then: all of them counted at once, or as they come in a stream."""

import numpy as np

from llamahome.config.schema import DataConfig
from llamahome.data.store.counts import SHOWN, Counts
from llamahome.errors import DataError, Problem
from llamahome.units import many


def judge_all(data: DataConfig, path: str, counts: Counts) -> None:
    """Raise DataError when the bad rows are more than the settings allow; `counts` is of all rows of `path`."""
    rows = counts.rows
    if counts.overlong and data.on_overlong == "error":
        hint = "--set data.on_overlong=truncate cuts their end off, drop leaves them out"
    elif not counts.bad or (data.on_bad_row == "skip" and counts.bad <= allowed_bad(data, rows)):
        return
    else:
        hint = _skip_hint(counts, data.max_bad_share)
    more = f", the first {SHOWN} are listed" if counts.bad > SHOWN else ""
    allowed = f"; data.max_bad_share allows {data.max_bad_share:g}" if data.on_bad_row == "skip" else ""
    message = f"{counts.bad:,} of {many(rows, 'row')} cannot be used{more}{allowed}"
    raise DataError([*counts.problems[:SHOWN], Problem(code="data.bad-rows", message=message, where=path, hint=hint)])


def allowed_bad(data: DataConfig, rows: int) -> float:
    """How many of `rows` may be bad when bad rows are skipped; a little more, so that 0.1 of 10 is 1."""
    return data.max_bad_share * rows + 1e-9


def require_targets(data: DataConfig, path: str, counts: Counts) -> None:
    """Raise DataError when no row gives an example."""
    if counts.kept:
        return
    if counts.truncated + counts.dropped:
        message = f"nothing is left to learn: data.max_length {data.max_length:,} cuts every answer off"
        hint = f"--set data.max_length={counts.longest_needed} keeps all of the longest row"
    else:
        message, hint = "nothing is left to learn: no row has more than one token", "give longer texts"
    raise DataError(Problem(code="data.no-targets", message=message, where=path, hint=hint))


def _skip_hint(counts: Counts, allowed: float) -> str:
    if counts.bad == counts.rows:
        hints = {problem.hint for problem in counts.problems}
        return (hints.pop() if len(hints) == 1 else None) or "mend the rows; not one of them can be used"
    share = np.ceil(counts.bad / counts.rows * 1e4) / 1e4
    wider = f" --set data.max_bad_share={min(share, 0.9999):g}" if counts.bad > allowed * counts.rows else ""
    return f"mend them, or leave them out with --set data.on_bad_row=skip{wider}"
