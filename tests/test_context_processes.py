"""Real processes: a ring among the devices of several, as on several hosts."""

import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys
count, me, port = map(int, sys.argv[1:])
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 8 // count)
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"localhost:{port}", count, me)
import jattn
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
inputs = [rng.standard_normal((1, 64, heads, 8)) for heads in (4, 2, 2)]
ids = jnp.asarray(np.sort(rng.integers(0, 4, 64)), jnp.int32)
mask = lambda b, n, t, s: (t >= s) & (ids[t] == ids[s])

def loss(context):
    return lambda *x: jnp.sum(jnp.sin(jattn.attention(*x, mask=mask, context=context)))

def gradients(context=None):
    return jax.jit(jax.value_and_grad(loss(context), (0, 1, 2)))

place = NamedSharding(mesh, P(None, "x"))
cut = [jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for x in inputs]
value, found = gradients(jattn.Context("x", strategy="ring", mesh=mesh))(*cut)
want_value, want = gradients()(*map(jnp.asarray, inputs))
np.testing.assert_allclose(float(value), float(want_value), rtol=1e-13)
for got, exact in zip(found, want, strict=True):
    for shard in got.addressable_shards:
        exact_part = np.asarray(exact)[shard.index]
        np.testing.assert_allclose(np.asarray(shard.data), exact_part, atol=1e-13)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_ring_among_processes(count):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SCRIPT, str(count)]
    running = [
        subprocess.Popen([*command, str(me), str(port)], stderr=subprocess.PIPE, text=True)
        for me in range(count)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, errors


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_longest_sequence_of_the_bench(processes):
    command = [sys.executable, "-m", "bench.context_longest", "--length", "8192"]
    command += ["--devices", "4", "--processes", str(processes)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("of the largest number") == 5
