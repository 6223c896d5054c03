"""A quick comparison with `jax.nn`, to notice a problem; `bench` measures precisely."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jattn
from jattn.masks import Causal

_SECONDS = 1.0  # for both functions together, so that the command stays quick
_FEWEST, _MOST = 5, 25  # rounds: enough for a median, even on a slow machine


class Timing(NamedTuple):
    """The median seconds of both functions, which were called in turns."""

    what: str
    ours: float
    theirs: float
    rounds: int


def compare() -> Timing:
    """Times causal attention, forward, in jattn and in `jax.nn`."""
    on_cpu = jax.default_backend() == "cpu"
    shape = (1, 1024 if on_cpu else 4096, 8, 64)
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, shape, dtype) for key in keys]
    ours = jax.jit(lambda q, k, v: jattn.attention(q, k, v, mask=Causal()))
    theirs = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    seconds = _interleave([lambda f=f: f(*arrays) for f in (ours, theirs)])
    what = f"causal, BTNH = {'×'.join(map(str, shape))}, {jnp.dtype(dtype).name}"
    return Timing(what, *map(statistics.median, seconds), rounds=len(seconds[0]))


def _interleave(calls: list[Callable]) -> list[list[float]]:
    """Measures the seconds of calls in turns, so that a busy moment slows all alike."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:  # the first call compiles, and is not measured
        jax.block_until_ready(call())
    stop = time.perf_counter() + _SECONDS
    while (done := len(seconds[0])) < _MOST:
        if done >= _FEWEST and time.perf_counter() > stop:
            break
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    return seconds
