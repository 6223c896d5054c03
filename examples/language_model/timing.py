"""How long a training step takes, by the way in which the model attends."""

import functools
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from examples.language_model import attending
from examples.language_model.model import LanguageModel
from examples.language_model.packing import Batch
from examples.language_model.training import make_step

WAYS = {
    "blocks between documents skipped": attending.within_documents,
    "only later blocks skipped": attending.without_document_skipping,
    "jax.nn with the mask as an array": attending.by_jax_nn,
}


def step_times(
    model: LanguageModel, optimizer: nnx.Optimizer, batches: Sequence[Batch]
) -> dict[str, float]:
    """Times a step: the mean over these batches, all ways in turn on each.

    What slows the machine for a while so slows all of them, and each goes first at times.
    It is a mean, because batches differ in how much there is to skip. The model given
    stays as it is.
    """
    model, optimizer = nnx.clone(model), nnx.clone(optimizer)
    steps = {name: make_step(way) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn, batch in enumerate(batches):
        for name in np.roll(list(steps), turn):
            run = functools.partial(steps[name], model, optimizer, batch)
            jax.block_until_ready(run())  # untimed: compiles, and brings back the caches
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.fmean(taken) for name, taken in times.items()}


def share_within_documents(batches: Sequence[Batch]) -> float:
    """Says which share of the pairs of a token and one before it are in one document."""
    position = np.concatenate([batch.position for batch in batches])
    return float(
        (position + 1).sum() / (len(position) * np.arange(1, position.shape[1] + 1).sum())
    )
