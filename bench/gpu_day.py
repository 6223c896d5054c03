"""Everything that needs a GPU, in one command: `python -m bench.gpu --run --json FILE`.

    versions and device · `pytest -m gpu`: every implementation × case · errors against
    float64, and 20 repeats bitwise · speed of each implementation and of peers

Each part runs in a process of its own under a time limit, and appends a line of JSON to the
file after every figure, so a kernel that hangs loses only the rest of its part. The parts
that measure speed compile their programs at the same time, and then take turns. All parts
take 8 minutes at most. `--lower` lowers every program that `--run` would time, on any
machine; nothing runs.

Two times are measured of each call. `ms` is the time in a program that calls it again and
again, as a model does. `call_ms` is that of calls by the host, which takes some time to
start a program.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jattn
from bench.gpu_rows import DOCUMENT, KINDS, ROWS, WINDOW, Row, by_name, inputs, timed

# Who is timed, in this order.
TIMED = ("gpu", "cudnn", "blockwise", "dense", "jax.nn", "attention_mgpu", "torch")
# Seconds that parts may take: the tests, the checks, to compile all that is timed, and to
# time each of the seven. Together they are 8 minutes at most.
TESTS, CHECKS, COMPILE, TIME = 150, 60, 130, 20
# Dense products of bfloat16 in TFLOP/s, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}


def clock(function, arrays, count: int) -> float:
    """Measures a compiled function: the median of five times so many calls, in seconds."""
    jax.block_until_ready(function(*arrays))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            result = function(*arrays)
        jax.block_until_ready(result)
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
    once = {row: jax.jit(x) for row, x in calls.items()}
    often = {row: jax.jit(repeated(x, row.repeats)) for row, x in calls.items()}

    # JAX's own kernel takes float16 only, which is as fast.
    dtype = "float16" if name == "attention_mgpu" else "bfloat16"

    def compile_for(function, row: Row):
        return function.lower(*row.arrays(dtype)).compile()

    # Programs are compiled together, but run one by one.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        first = {row: pool.submit(compile_for, x, row) for row, x in once.items()}
        second = {row: pool.submit(compile_for, x, row) for row, x in often.items()}
    turn()
    for row in calls:
        facts = {"part": name} | dataclasses.asdict(row)
        try:
            arrays = inputs(row, dtype)
            seconds = clock(second[row].result(), arrays, 1) / row.repeats
            by_host = clock(first[row].result(), arrays, row.repeats)
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


def tests(file: File):
    """Runs the tests of every implementation and case on the device, on all cores."""
    command = [sys.executable, "-m", "pytest", "-n", "auto", "-q", "-rf", "--tb=line"]
    # Where pytest-benchmark is installed, it warns of several processes.
    command += ["-p", "no:benchmark", "-m", "gpu", "tests/test_on_gpu.py"]
    seconds = TESTS - 5  # it ends before its part, which would leave its processes behind
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
        seconds, by_host = gpu_torch.clock(call, row.repeats)
        speed = row.operations / seconds / 1e12
        times = {"ms": 1e3 * seconds, "call_ms": 1e3 * by_host, "tflops": speed}
        file.say(**{"part": name} | dataclasses.asdict(row) | times)


class Part:
    """A part that runs in a process of its own."""

    def __init__(self, name: str, path: str):
        context = multiprocessing.get_context("spawn")
        self.name, self.file = name, File(path)
        self.ready, self.go = context.Event(), context.Event()
        arguments = name, path, self.ready, self.go
        self.process = context.Process(target=_run_part, args=arguments, daemon=False)
        self.process.start()

    def wait(self, seconds: float):
        """Waits until the part is ready to measure, or has ended."""
        deadline = time.perf_counter() + seconds
        while self.process.is_alive() and time.perf_counter() < deadline:
            if self.ready.wait(0.1):
                return

    def finish(self, seconds: float):
        """Lets the part measure, and ends it after so many seconds."""
        if self.process.is_alive() and not self.ready.is_set():
            self.file.say(part=self.name, stopped="was not compiled in time")
            seconds = 0
        self.go.set()
        self.process.join(seconds)
        if self.process.is_alive():
            self.file.say(part=self.name, stopped=f"after {seconds} s")
            self.process.kill()
        elif self.process.exitcode:
            self.file.say(part=self.name, stopped=f"exit code {self.process.exitcode}")


def _run_part(name: str, path: str, ready, go):
    def turn():
        ready.set()
        go.wait()

    file = File(path)
    if name in TIMED:
        torch_speeds(file, turn) if name == "torch" else speeds(file, name, turn)
    else:
        turn()
        {"tests": tests, "checks": checks}[name](file)


def run(path: str, only: Collection[str] = ("tests", "checks", *TIMED)) -> int:
    """Runs the parts, each in a process of its own."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share it
    about = "import jax; x = jax.devices()[0]; print(jax.__version__, x.platform, x)"
    try:
        found = subprocess.run(
            [sys.executable, "-c", about], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        found = None
    if found is None or " gpu " not in found.stdout:
        print("bench.gpu --run needs a GPU that JAX sees; --lower needs none")
        return 1
    kind = found.stdout.strip()
    File(path).say(part="where", device=kind, jattn=jattn.__version__)
    for name, seconds in (("tests", TESTS), ("checks", CHECKS)):
        if name in only:
            part = Part(name, path)
            part.wait(seconds)
            part.finish(seconds)
    parts = [Part(name, path) for name in TIMED if name in only]
    deadline = time.perf_counter() + COMPILE
    for part in parts:
        part.wait(deadline - time.perf_counter())
    for part in parts:
        part.finish(TIME)
    return 0


def lower() -> int:
    """Lowers every program that `--run` would time; gives the number of failures."""
    failures = 0
    for name in [x for x in TIMED if x not in ("torch", "cudnn")]:
        for row in ROWS:
            function = by_name(name, row)
            if function is None:
                continue
            try:
                traced = jax.jit(timed(function, row)).trace(*row.arrays())
                traced.lower(lowering_platforms=("cuda",))
                said = "lowered"
            except Exception as error:  # noqa: BLE001  (it is counted and shown)
                failures, said = failures + 1, f"{type(error).__name__}: {error}"[:200]
            direction = "fwd+bwd" if row.gradients else "forward"
            print(f"{name:15} {row.what:14} T={row.T:<6} {direction}  {said}", flush=True)
    print("lowered for CUDA; nothing ran")
    return failures
