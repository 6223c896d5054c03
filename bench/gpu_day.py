"""Everything that needs a GPU, in one command: `python -m bench.gpu --run --json FILE`.

    versions and device · `pytest -m gpu`: every implementation × case · errors against
    float64, and 20 repeats bitwise · speed of each implementation and of peers

Each part runs in a process of its own under a time limit, and appends a line of JSON to the
file after every figure, so a kernel that hangs loses only the rest of its part. All parts
take 8 minutes at most. `--lower` lowers every program that `--run` would time, on any
machine; nothing runs.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from bench.gpu_rows import DOCUMENT, KINDS, ROWS, WINDOW, Row, by_name, inputs, timed
from jattn import definition

# Seconds that each part may take; together 8 minutes.
PARTS = {
    "tests": 110,
    "checks": 60,
    "gpu": 80,
    "cudnn": 40,
    "blockwise": 60,
    "dense": 30,
    "jax.nn": 30,
    "attention_mgpu": 20,
    "torch": 50,
}
# Dense products of bfloat16 in TFLOP/s, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}


def clock(function, arrays) -> float:
    """Measures the median of five times ten calls, in seconds."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arrays))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            result = function(*arrays)
        jax.block_until_ready(result)
        found.append((time.perf_counter() - start) / 10)
    return sorted(found)[2]


class File:
    """A file of JSON lines that is written after every figure."""

    def __init__(self, path: str):
        self.path = path

    def say(self, **what):
        """Writes a line, and prints it."""
        print(json.dumps(what), flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\n")


def speeds(file: File, name: str):
    """Times each row."""
    kind = jax.devices()[0].device_kind
    peak = next((x for part, x in PEAKS.items() if part in kind), None)
    for row in ROWS:
        function = by_name(name, row)
        facts = {"part": name} | dataclasses.asdict(row)
        if function is None:
            continue
        try:
            seconds = clock(timed(function, row), inputs(row))
        except Exception as error:  # noqa: BLE001  (the next row is worth its time)
            file.say(**facts, failed=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        speed = row.operations / seconds / 1e12
        share = None if peak is None else speed / peak
        file.say(**facts, ms=1e3 * seconds, tflops=speed, share_of_peak=share)


def checks(file: File):
    """Compares each implementation with the definition in float64, and with itself."""
    for name in ("gpu", "cudnn", "blockwise", "dense"):
        for what in KINDS:
            row = Row(what, 1536)
            arrays = inputs(row)
            try:
                function = jax.jit(by_name(name, row))
                got = function(*arrays)
                same = all(bool(jnp.all(function(*arrays) == got)) for _ in range(20))
                error = float(np.max(np.abs(np.asarray(got, np.float64) - exact(row))))
                file.say(part="checks", name=name, what=what, error=error, same=same)
            except Exception as error:  # noqa: BLE001  (the next one is worth its time)
                file.say(part="checks", name=name, what=what, failed=str(error)[:300])


@functools.cache
def exact(row: Row):
    """Computes the definition in float64, on the CPU."""
    cpu = jax.devices("cpu")[0]
    arrays = [np.asarray(x).astype(np.float64) for x in inputs(row)]
    with jax.default_device(cpu), jax.enable_x64(True):
        placed = [jax.device_put(x, cpu) for x in arrays]
        return np.asarray(definition.attention_state(*placed, **row.options).output)


def tests(file: File):
    """Runs the tests of every implementation and case on the device."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-m", "gpu"]
    found = subprocess.run(
        [*command, "tests/test_on_gpu.py"], capture_output=True, text=True
    )
    file.say(part="tests", code=found.returncode, said=found.stdout[-3000:])


def torch_speeds(file: File):
    """Times flex_attention and scaled_dot_product_attention, where torch is installed."""
    if importlib.util.find_spec("torch") is None:
        file.say(part="torch", failed="torch is not installed")
        return
    from bench import gpu_torch

    for row in ROWS:
        for name, seconds in gpu_torch.speeds(row, WINDOW, DOCUMENT):
            speed = row.operations / seconds / 1e12
            facts = {"part": name} | dataclasses.asdict(row)
            file.say(**facts, ms=1e3 * seconds, tflops=speed)


def part(name: str, path: str) -> int:
    """Runs one part in this process."""
    file = File(path)
    own = {"tests": tests, "checks": checks, "torch": torch_speeds}
    own.get(name, lambda file: speeds(file, name))(file)
    return 0


def run(path: str) -> int:
    """Runs all parts, each in a process of its own."""
    file = File(path)
    kept = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    command = [sys.executable, "-m", "bench.gpu_day", "--json", path, "--part"]
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
    file.say(part="where", device=found.stdout.strip(), jattn=jattn.__version__)
    for name, seconds in PARTS.items():
        try:
            subprocess.run([*command, name], env=kept, timeout=seconds, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            file.say(part=name, stopped=f"{type(error).__name__} after {seconds} s at most")
    return 0


def lower() -> int:
    """Lowers every program that `--run` would time; gives the number of failures."""
    failures = 0
    for name in [x for x in PARTS if x not in ("tests", "checks", "torch", "cudnn")]:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.gpu_day", allow_abbrev=False)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--json", required=True)
    chosen = parser.parse_args()
    sys.exit(part(chosen.part, chosen.json))
