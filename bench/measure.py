"""Times, compile times, memory and errors: how each number of the report is taken."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from jattn.arrays.shapes import Sizes
from jattn.testing import Case, random_inputs

MIN_ROUNDS, MAX_ROUNDS = 5, 200
SETTLE = 0.1  # seconds
SAMPLED_ROWS = 64
MARGIN = 30  # times jattn's error, and more is another function


class Work(NamedTuple):
    """What every candidate of a row is to compute."""

    case: Case
    sizes: Sizes
    dtype: str
    inputs: dict[str, Any]
    cotangent: jax.Array  # BTND

    @property
    def options(self) -> dict[str, Any]:
        """Gives the keyword arguments of `jattn.attention`."""
        return self.case.options(self.inputs)


class Pass(NamedTuple):
    """Something to time: `run` does it and waits for it."""

    run: Callable[[], Any]
    compile_seconds: float | None = None  # None where nothing is compiled ahead
    temporaries: int | None = None  # bytes besides arguments and results


def pose(case: Case, sizes: Sizes, dtype: str) -> Work:
    """Makes the inputs of a row, and a cotangent of the output."""
    inputs = random_inputs(case, dtype, sizes=sizes)
    shape = *sizes.batch, sizes.T, sizes.N, sizes.D
    cotangent = np.random.default_rng(1).standard_normal(shape)
    return Work(case, sizes, dtype, inputs, jnp.asarray(cotangent, dtype))


def compiled(function: Callable, *arguments) -> Pass:
    """Compiles a function under the clock, once, and gives it as a pass."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()  # not every platform tells
    return Pass(
        run=waiting(lambda: program(*arguments)),
        compile_seconds=seconds,
        temporaries=None if memory is None else memory.temp_size_in_bytes,
    )


def waiting(function: Callable) -> Callable:
    """Makes a function that waits until what it gives is there."""
    return lambda: jax.block_until_ready(function())


def interleave(
    runs: dict[str, Callable], seconds: float, rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Times each run once in every round, for about so many seconds and so many rounds.

    What slows the machine for a while slows all of them, so the times of one round can be
    compared. Each takes its turn at going first. Before a timed call come untimed ones,
    until what the candidate before left behind is gone: threads that wait by spinning, a
    large buffer that is still being given back, caches full of other things.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever is running
    try:
        end = time.perf_counter() + seconds
        for round_ in range(MAX_ROUNDS):
            if round_ >= rounds and time.perf_counter() > end:
                break
            first = round_ % max(len(names), 1)
            for name in names[first:] + names[:first]:
                settled = time.perf_counter() + SETTLE
                runs[name]()
                while time.perf_counter() < settled:
                    runs[name]()
                start = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Says how many times as long as `base` it takes: the median over rounds."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def spread(times: Sequence[float]) -> float:
    """Divides half of the range of the middle half of the times by their median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def sampled_rows(sizes: Sizes) -> np.ndarray:
    """Picks queries to check: some, evenly, with the first and the last."""
    count = min(sizes.T, SAMPLED_ROWS)
    return np.unique(np.linspace(0, sizes.T - 1, count).round().astype(int))


def exact_output(work: Work) -> np.ndarray:
    """Computes the output in float64 at the sampled rows, BRND, without T × S logits."""
    with jax.enable_x64(True):
        wide = jax.tree.map(_widen, work.inputs)
        options = work.case.options(wide)
        rows = jnp.asarray(sampled_rows(work.sizes))
        weights = jattn.attention_weights(wide["query"], wide["key"], rows=rows, **options)
        value = np.repeat(np.asarray(wide["value"]), work.sizes.G, axis=2)
        return np.einsum("bnrs,bsnd->brnd", np.asarray(weights), value)


def error(output: np.ndarray, exact: np.ndarray, sizes: Sizes) -> float:
    """Finds the largest difference at the sampled rows; `output` is BTND."""
    return float(np.max(np.abs(output[:, sampled_rows(sizes)] - exact), initial=0))


def _widen(x):
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(np.asarray(x, np.float64) if floating else x)
