"""Everything that needs a GPU, in one command: `python -m bench.gpu --run --json FILE`.

    versions and device · `pytest -m gpu`: every implementation × case · errors against
    float64, and 20 repeats bitwise · speed of each implementation and of peers

Each part runs in a process of its own under a time limit, and appends a line of JSON to the
file after every figure, so a kernel that hangs loses only the rest of its part. The parts
that measure speed compile their programs at the same time, and then take turns. All parts
take 9 minutes at most. `--lower` lowers every program that `--run` would time, on any
machine; nothing runs.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Collection

import jax

import jattn
from bench.gpu_measure import File, checks, speeds, tests, torch_speeds
from bench.gpu_rows import ROWS, by_name, timed

# Who is timed, in this order.
TIMED = ("gpu", "cudnn", "blockwise", "dense", "jax.nn", "attention_mgpu", "torch")
# Seconds that parts may take: the tests, the checks, to compile all that is timed, and to
# time each of the seven. Together they are 9 minutes at most.
TESTS, CHECKS, COMPILE, TIME = 200, 60, 140, 20


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
        # The tests end before their part, which would leave their processes behind.
        checks(file) if name == "checks" else tests(file, TESTS - 5)


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
