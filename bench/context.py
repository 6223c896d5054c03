"""Across devices: what strategies move and hold as compiled, and who has how much to do.

    python -m bench.context                 # some minutes: programs are compiled, not run
    python -m bench.context work            # the table of masks and orders alone
    python -m bench.context memory --length 65536 --devices 2 8 32

Devices are emulated on one CPU, so there are no times but those of compiling: bytes,
collectives and counts of pairs are what they would be on accelerators.
"""

import argparse
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn import Context, balanced, masks

N, K, H = 4, 2, 64
KINDS = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def mesh_of(devices: int):
    """Makes a mesh of the first devices."""
    kinds = (AxisType.Auto,)
    return jax.make_mesh(
        (devices,), ("x",), axis_types=kinds, devices=jax.devices()[:devices]
    )


def shapes(length: int, mesh=None):
    """Describes query, key and value of one example, cut along the mesh if there is one."""
    place = None if mesh is None else NamedSharding(mesh, P(None, "x"))
    make = lambda heads: jax.ShapeDtypeStruct(
        (1, length, heads, H), jnp.float32, sharding=place
    )
    return make(N), make(K), make(K)


def gradients(context):
    """Gives the gradients of a causal call in query, key and value."""

    def loss(*inputs):
        output = jattn.attention(*inputs, mask=masks.Causal(), context=context)
        return jnp.sum(output**2)

    return jax.grad(loss, (0, 1, 2))


def compiled_row(name: str, function, inputs) -> None:
    """Prints temporaries, collectives of floating numbers, and the time of compiling."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*inputs).compile()
    seconds = time.perf_counter() - start
    text = program.as_text()
    found = {
        kind: len(re.findall(rf" = \(?f32\S*.* {kind}(?:-start)?\(", text))
        for kind in KINDS
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in found.items() if count)
    size = program.memory_analysis().temp_size_in_bytes / 1e6
    print(f"{name:24} {size:8.0f} MB  {seconds:6.1f} s   {counts or 'no collectives'}")


def memory(length: int, counts: list[int]) -> None:
    """Temporaries of causal gradients on each device, by strategy and devices."""
    print(f"causal gradients, T={length} N={N} K={K} H={H}, float32")
    print(f"{'':24} {'temporaries':>11}  {'compile':>8}   collectives")
    compiled_row("one device", gradients(None), shapes(length))
    for devices in counts:
        mesh = mesh_of(devices)
        for strategy in ("ring", "gather", "exchange"):
            if strategy == "exchange" and N % devices:
                continue
            context = Context("x", strategy=strategy, mesh=mesh)
            name = f"{strategy}, {devices} devices"
            compiled_row(name, gradients(context), shapes(length, mesh))
    mesh = mesh_of(counts[0])
    compiled_row(f"no context, {counts[0]} devices", gradients(None), shapes(length, mesh))


def documents(length: int, count: int = 24):
    """Makes the mask of causal documents of random lengths."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
    ids = np.searchsorted(cuts, np.arange(length), side="right")
    ids = jnp.asarray(ids, jnp.int32)
    return lambda b, n, t, s: (t >= s) & (ids[t] == ids[s])


def work(length: int, devices: int = 8) -> None:
    """Prints turns, and the most pairs of a device over the mean, by mask and order."""
    cases = {
        "causal": masks.Causal(),
        "causal window T/16": masks.Causal() & masks.Window(length // 16 - 1, 0),
        "24 random documents": documents(length),
        "prefix T/4 or causal": masks.Prefix(length // 4) | masks.Causal(),
    }
    context = Context("x", strategy="ring", mesh=mesh_of(devices))
    print(f"T={length}, {devices} devices: turns of the ring, most over mean of work")
    print(f"{'':24} {'as they come':>14} {'zigzag':>14} {'by the mask':>14}")
    for name, mask in cases.items():
        cells = []
        orders = None, balanced(length, devices), balanced(length, devices, mask)
        for order in orders:
            where = {"query_position": order, "key_position": order}
            told = jattn.explain(
                *shapes(length), mask=mask, context=context, **where
            ).devices
            cells.append(f"{told.turns} of {devices}  {told.work:.2f}")
        print(f"{name:24} " + " ".join(f"{cell:>14}" for cell in cells))


def rounding() -> None:
    """Prints the error of bfloat16 inputs against float32, by strategy."""
    inputs = [
        jax.random.normal(jax.random.key(i), (1, 1024, 2, 32), jnp.bfloat16)
        for i in range(3)
    ]
    exact = jattn.attention(*(x.astype(jnp.float32) for x in inputs))
    print("bfloat16, T=1024: root of the mean square of the error")
    for strategy in (None, "ring", "gather", "merge"):
        context = strategy and Context("x", strategy=strategy, mesh=mesh_of(8))
        output = jattn.attention(*inputs, context=context).astype(jnp.float32)
        error = float(jnp.sqrt(jnp.mean((output - exact) ** 2)))
        print(f"{strategy or 'one device':24} {error:.2e}")


def main() -> None:
    """Runs the tables that are named, or all."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.context", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("tables", nargs="*", help="memory, work, rounding; all by default")
    parser.add_argument("--length", type=int, default=65536, help="T and S of `memory`")
    parser.add_argument("--devices", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    known = {
        "memory": lambda: memory(options.length, options.devices),
        "work": lambda: work(16384),
        "rounding": rounding,
    }
    for name in options.tables:
        if name not in known:
            parser.error(f"tables must be of {', '.join(known)}, got {name!r}")
    jax.config.update("jax_num_cpu_devices", max(8, *options.devices))
    for name in options.tables or known:
        known[name]()
        print()


if __name__ == "__main__":
    main()
