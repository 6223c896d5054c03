"""What `bench.gpu_day` measures on a GPU: tests, errors, and the speed of each row.

Two times are measured of each call. `ms` is the time in a program that calls it again and
again, as a model does. `call_ms` is that of calls by the host, which takes some time to
start a program.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jattn
from bench.gpu_rows import DOCUMENT, KINDS, ROWS, WINDOW, Row, by_name, inputs, timed

# Dense products of bfloat16 in TFLOP/s, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}


def clock(call: Callable, wait: Callable, count: int) -> float:
    """Measures the median of five times so many calls, in seconds.

    `wait` waits for the result of a call. The first call, which warms up, is not measured.
    """
    wait(call())
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        found.append((time.perf_counter() - start) / count)
    return sorted(found)[2]


def repeated(function, count: int):
    """Gives a function that computes another one so many times, one after another.

    One number of the query becomes the sum of one number of each result. So XLA can
    neither leave out a call, nor compute a part of one once for all of them.
    """

    def turn(_, arrays):
        results = jax.tree.leaves(function(*arrays))
        (query, *others), results = lax.optimization_barrier((arrays, results))
        first = lambda x: x[(0,) * x.ndim].astype(jnp.float32)
        number = sum(map(first, results)).astype(query.dtype)
        return query.at[(0,) * query.ndim].set(number), *others

    return lambda *arrays: lax.fori_loop(0, count, turn, arrays)


class File:
    """A file of JSON lines that is written after every figure."""

    def __init__(self, path: str):
        self.path = path

    def say(self, **what):
        """Writes a line, and prints it."""
        print(json.dumps(what), flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\n")


def speeds(file: File, name: str, turn: Callable):
    """Times each row, after all of them are compiled on all cores and `turn` has come."""
    kind = jax.devices()[0].device_kind
    peak = next((x for part, x in PEAKS.items() if part in kind), None)
    calls = {row: by_name(name, row) for row in ROWS}
    calls = {row: timed(x, row) for row, x in calls.items() if x is not None}
    # JAX's own kernel takes float16 only, which is as fast.
    dtype = "float16" if name == "attention_mgpu" else "bfloat16"

    def compiled(function, row: Row):
        return jax.jit(function).lower(*row.arrays(dtype)).compile()

    # Programs are compiled together, but run one by one.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        once = {row: pool.submit(compiled, x, row) for row, x in calls.items()}
        often = {
            row: pool.submit(compiled, repeated(x, row.repeats), row)
            for row, x in calls.items()
        }
    turn()
    for row in calls:
        facts = {"part": name} | dataclasses.asdict(row)
        try:
            arrays, wait = inputs(row, dtype), jax.block_until_ready
            call = functools.partial(often[row].result(), *arrays)
            seconds = clock(call, wait, 1) / row.repeats
            call = functools.partial(once[row].result(), *arrays)
            by_host = clock(call, wait, row.repeats)
        except Exception as error:  # noqa: BLE001  (the next row is worth its time)
            file.say(**facts, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        speed = row.operations / seconds / 1e12
        facts |= {"ms": 1e3 * seconds, "call_ms": 1e3 * by_host, "tflops": speed}
        file.say(**facts, share_of_peak=None if peak is None else speed / peak)


def checks(file: File):
    """Compares each implementation with dense in float64, and with itself."""
    rows = [Row(what, 2048, gradients=x) for x in (False, True) for what in KINDS]
    for name in ("gpu", "cudnn", "blockwise", "dense"):
        for row in rows:
            facts = {"part": "checks", "name": name} | dataclasses.asdict(row)
            try:
                function = jax.jit(timed(by_name(name, row), row))
                first, *more = (_numbers(function(*inputs(row))) for _ in range(21))
                pairs = [(x, y) for one in more for x, y in zip(first, one, strict=True)]
                same = all(np.array_equal(x, y) for x, y in pairs)
                errors = map(_error, first, exact(row))
            except Exception as error:  # noqa: BLE001  (the next one is worth its time)
                file.say(**facts, failed=str(error)[:300])
                continue
            file.say(**facts, error=max(errors), same=same)


def _numbers(results) -> list:
    return [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(results)]


def _error(got, want) -> float:
    """Gives the largest error as a share of the largest number."""
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


@functools.cache
def exact(row: Row) -> list:
    """Computes the row densely in float64, which the tests compare with the definition."""
    with jax.enable_x64(True):
        function = functools.partial(jattn.attention, implementation="dense", **row.options)
        return _numbers(jax.jit(timed(function, row))(*_numbers(inputs(row))))


def tests(file: File, seconds: float):
    """Runs the tests of every implementation and case on the device, on all cores."""
    command = [sys.executable, "-m", "pytest", "-n", "auto", "-q", "-rf", "--tb=line"]
    # Where pytest-benchmark is installed, it warns of several processes.
    command += ["-p", "no:benchmark", "-m", "gpu", "tests/test_on_gpu.py"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        file.say(part="tests", stopped=f"after {seconds} s", said=str(late.stdout)[-6000:])
        return
    file.say(part="tests", code=found.returncode, said=found.stdout[-6000:])


def torch_speeds(file: File, turn: Callable):
    """Times flex_attention and scaled_dot_product_attention, where torch is installed."""
    if importlib.util.find_spec("torch") is None:
        file.say(part="torch", failed="torch is not installed")
        return
    from bench import gpu_torch

    calls = [(row, *x) for row in ROWS for x in gpu_torch.calls(row, WINDOW, DOCUMENT)]
    turn()
    for row, name, call in calls:
        facts = {"part": name} | dataclasses.asdict(row)
        try:
            seconds, by_host = gpu_torch.times(call, row.repeats)
        except Exception as error:  # noqa: BLE001  (the next row is worth its time)
            file.say(**facts, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        speed = row.operations / seconds / 1e12
        times = {"ms": 1e3 * seconds, "call_ms": 1e3 * by_host, "tflops": speed}
        file.say(**facts, **times)
