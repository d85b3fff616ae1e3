"""Micro-batches with what a teacher said at their targets, added on the loader's thread before they go to the device."""

from dataclasses import replace

import numpy as np
import torch

from llamahome.data.records import Example, Microbatch
from llamahome.data.steps.loader import Deliver
from llamahome.data.store.taught import Taught

IDS, LOGS, REST = "teacher_ids", "teacher_logs", "teacher_rest"
"""Names in Microbatch.extra: int64 [N, K], float32 [N, K] and float32 [N]."""


def with_teacher(taught: Taught, deliver: Deliver) -> Deliver:
    """`deliver` for micro-batches that carry the teacher's values. It raises DataError for an example that the teacher has not read."""

    def beside(batch: Microbatch) -> Microbatch:
        tokens, places = batch.tokens_T.numpy(), batch.rows_N.numpy() + 1
        targets = np.zeros(len(tokens), np.bool_)
        targets[places] = True
        ends = np.cumsum(batch.lengths)
        found = [
            taught.values(Example("", 0, 0, tokens[end - length : end].astype(np.int32), targets[end - length : end]))
            for end, length in zip(ends.tolist(), batch.lengths, strict=True)
            if not batch.idle
        ]
        width = taught.about.top_k if not found else found[0].ids.shape[1]
        extra = {
            IDS: np.concatenate([np.empty((0, width), np.int64), *(values.ids for values in found)]),
            LOGS: np.concatenate([np.empty((0, width), np.float32), *(values.logs for values in found)]),
            REST: np.concatenate([np.empty(0, np.float32), *(values.rest for values in found)]),
        }
        return deliver(replace(batch, extra={**batch.extra, **{name: torch.from_numpy(array) for name, array in extra.items()}}))

    return beside
