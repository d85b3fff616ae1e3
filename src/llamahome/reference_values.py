"""Gives the examples of a run the log-probabilities of the reference, where its objective compares the model with one."""

from dataclasses import replace

import numpy as np

from llamahome.assembly import Job
from llamahome.config.preference import WITH_REFERENCE
from llamahome.data.store.table import ExampleTable
from llamahome.model.objective import Objective
from llamahome.resolve import selected_rows
from llamahome.rundir import PROCESSED_DATA
from llamahome.training.reference import Reference, weights_fingerprint


def with_reference(job: Job, start: str | None = None) -> Job:
    """The job with the log-probabilities of the reference beside its examples, if its objective has a reference.

    To be called before the weights of a checkpoint are restored. All ranks call it. `start` is Job.reference of the run that is resumed.
    """
    if job.config.training.objective not in WITH_REFERENCE:
        return job
    prepared, config, plan, learner, data = job.data.prepared, job.config, job.plan, job.learner, job.data
    if not isinstance(prepared.examples, ExampleTable):
        raise TypeError("the rows of an objective with a reference are stored, not streamed")
    precision = f"{data.backend.name} {data.backend.precision.name} {config.training.method}"
    resumed = start is not None
    start = start or weights_fingerprint(learner.base_fingerprint, data.adapter, precision)
    reference = Reference(
        Objective(learner.model, data.backend, learner.placement.within),
        learner.placement,
        job.layout,
        int(config.training.micro_batch_tokens),
        data.backend.to_device,
        start,
        is_start=not (resumed and data.adapter is not None),
        folder=PROCESSED_DATA / "reference",
        say=job.session.progress.say,
    )
    rows, slack = prepared.order.epoch_rows, config.training.max_bad_steps * (1 + config.training.max_rollbacks)
    positions = min(rows, plan.positions + slack * int(config.training.batch_size))  # a run that goes back passes over some rows
    order = np.unique(prepared.order.rows_at(np.arange(positions), seed=config.training.seed))
    examples = reference.known(prepared.examples, order, "training")
    evaluation = prepared.evaluation
    if evaluation is not None:
        evaluation = reference.known(evaluation, selected_rows(prepared, config), "held-out")
    known = replace(prepared, examples=examples, evaluation=evaluation)
    return replace(job, data=replace(data, prepared=known), reference=start)
