"""A sequence that is too long for one device: `python -m bench.context_longest`.

One causal head of 64 over 2²⁰ tokens by a ring, forward and gradients, over the emulated
devices of one process, or with `--processes 4` over as many real ones, which are connected
as hosts are. Sampled queries are compared with blockwise on one device, and the gradients
of sampled keys and values with the formulas in float64. It prints the seconds and the
memory, and fails where they differ. On two cores it takes about half an hour; see
`--length`.

XLA:CPU (jax 0.10.2 and 0.12.0) keeps 2 kB or more for each product of its library YNNPACK
until the program ends, where several devices share a process: the tasks of a product wait
in the queue of a pool whose threads are busy with the devices. Eight devices had taken all
24 GB of a machine after 29 minutes, so the products are XLA's own here (`FLAGS`).
"""

import argparse
import os
import resource
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.masks import Causal

H, ROWS, SAMPLES = 64, 4096, 16
TOLERANCE = 1e-4  # of the largest number; float32 sums of up to 2²⁰ numbers
# No products of YNNPACK. And XLA:CPU ends a program in which a device waits for another one
# for 40 s; here a turn of the ring takes longer than that.
FLAGS = (
    " --xla_cpu_experimental_ynn_fusion_type="
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=3600"
    " --xla_cpu_collective_call_terminate_timeout_seconds=7200"
)
NAMES = ("output", "logsumexp", "d_query", "d_key", "d_value")


def made(which: int, first: int, last: int):
    """Draws the rows of an input, 0 for queries, 1 for keys and 2 for values."""
    blocks = range(first // ROWS, -(-last // ROWS))
    drawn = [np.random.default_rng((which, i)).standard_normal((ROWS, H)) for i in blocks]
    start = first // ROWS * ROWS
    rows = np.concatenate(drawn)[first - start : last - start]
    return rows.astype(np.float32)[None, :, None]


def results(length: int):
    """Computes the results over all devices, each cut along the sequence."""
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), axis_types=(AxisType.Auto,))
    place, shape = NamedSharding(mesh, P(None, "x")), (1, length, 1, H)
    context = jattn.Context("x", strategy="ring", mesh=mesh)

    def rows_of(which):
        return lambda at: made(which, at[1].start or 0, at[1].stop or length)

    inputs = [jax.make_array_from_callback(shape, place, rows_of(i)) for i in range(3)]

    def both(*inputs):
        attend = lambda *xs: jattn.attention_state(*xs, mask=Causal(), context=context)
        state, pull = jax.vjp(attend, *inputs)
        cotangent = state._replace(logsumexp=jnp.zeros_like(state.logsumexp))
        return *state, *pull(cotangent)

    compiled = jax.jit(both).lower(*inputs).compile()
    start = time.perf_counter()
    found = jax.block_until_ready(compiled(*inputs))
    seconds = time.perf_counter() - start
    gathered = [multihost_utils.process_allgather(x, tiled=True) for x in found]
    return dict(zip(NAMES, gathered, strict=True)), seconds


def of_queries(length: int, rows):
    """Computes what belongs to some queries, blockwise on one device."""
    whole = [made(which, 0, length) for which in range(3)]

    def attend(query):
        options = {"mask": Causal(), "query_position": rows[None]}
        return jattn.attention_state(
            query, *whole[1:], implementation="blockwise", **options
        )

    state, pull = jax.vjp(attend, whole[0][:, rows])
    cotangent = state._replace(logsumexp=jnp.zeros_like(state.logsumexp))
    return dict(zip(NAMES, (*state, *pull(cotangent)), strict=False))


def of_keys(length: int, rows, found):
    """Computes the gradients of some keys and values in float64, from the outputs.

    They are

        weight = exp(q · k / √H − logsumexp)        d_v = Σ weight d_output
        d_k = Σ weight (d_output · v − d_output · output) q / √H
    """
    key, value = (made(which, 0, length)[0, rows, 0] for which in (1, 2))
    d_key, d_value = np.zeros((2, len(rows), H))
    for first in range(0, length, 2**16):
        some = slice(first, first + 2**16)
        query = made(0, first, min(first + 2**16, length))[0, :, 0].astype(np.float64)
        output = found["output"][0, some, 0].astype(np.float64)  # also its cotangent
        logits = query @ key.T / np.sqrt(H) - found["logsumexp"][0, some, 0][:, None]
        sees = (first + np.arange(len(query)))[:, None] >= rows
        weights = np.where(sees, np.exp(np.where(sees, logits, 0)), 0)
        delta = np.sum(output * output, axis=1, keepdims=True)
        d_logits = weights * (output @ value.T - delta)
        d_key += d_logits.T @ query / np.sqrt(H)
        d_value += weights.T @ output
    return {"d_key": d_key[None, :, None], "d_value": d_value[None, :, None]}


def check(length: int, found) -> float:
    """Gives the largest error of the sampled rows, as a share of the largest number."""
    rng, worst = np.random.default_rng(0), 0.0
    rows = np.sort(rng.choice(length, SAMPLES, replace=False)).astype(np.int32)
    rows[-1] = length - 1  # it sees all keys
    for exact in (of_queries(length, rows), of_keys(length, rows, found)):
        for name, want in exact.items():
            got, want = np.asarray(found[name])[:, rows], np.asarray(want)
            error = float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
            print(f"{name:10} {error:.1e} of the largest number", flush=True)
            worst = max(worst, error)
    return worst


def run(length: int, devices: int, processes: int, me: int = 0, port: int = 0) -> int:
    """Runs one process of all; the first one checks and prints."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
    jax.config.update("jax_num_cpu_devices", devices // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, me)
    found, seconds = results(length)
    if me:
        return 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    took = f"{seconds:.0f} s, {memory:.1f} GiB in a process"
    print(f"T={length}, {devices} devices, {processes} processes: {took}", flush=True)
    return int(check(length, found) > TOLERANCE)


def main(arguments=None) -> int:
    """Runs the only process, or starts all of them."""
    parser = argparse.ArgumentParser(
        "python -m bench.context_longest",
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument("--length", type=int, default=2**20)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--me", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.devices % given.processes or given.length % given.devices:
        parser.error("--processes must divide --devices, and --devices --length")
    sizes = given.length, given.devices, given.processes
    if given.processes == 1 or given.me is not None:
        return run(*sizes, given.me or 0, given.port or 0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bench.context_longest", "--port", str(port)]
    for name, value in zip(("length", "devices", "processes"), sizes, strict=True):
        command += [f"--{name}", str(value)]
    running = [
        subprocess.Popen([*command, "--me", str(me)]) for me in range(given.processes)
    ]
    try:
        return max(process.wait() for process in running)
    finally:
        for process in running:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
