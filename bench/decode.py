"""One query by a cache, on CPU: `python -m bench.decode [NAME …]`.

Torch attends to the filled slice of heads-first arrays, the form that it is fastest in.
Every ratio is of medians over rounds in which all calls take turns, as in `bench.speed`.
"""

import functools

import jax
import jax.numpy as jnp

import jattn
from bench import measure, report
from bench.decode_model import model
from bench.decode_rows import (
    BEYOND,
    FULL,
    LONG,
    attending,
    compare,
    draw,
    filled,
    torch_sdpa,
)
from jattn import caches
from jattn.masks import Causal


def full() -> None:
    """Times a full cache beside torch."""
    for shape in FULL:
        query, kv = filled(shape)
        runs = {"torch": torch_sdpa(shape, shape[1]), "jattn": attending(query, kv).run}
        compare(str(shape), runs, "torch")


def part() -> None:
    """Compares 128 of 8192 tokens with 8192, by one length, by many, and a mask."""
    far = lambda b, n, t, s: t - s < 4096
    for shape in LONG:
        for label, ragged, mask in (
            ("one length", False, None),
            ("ragged", True, None),
            ("Causal", False, Causal()),
            ("lambda", True, far),
        ):
            query, kv = filled(shape, ragged=ragged)
            program = jax.jit(lambda kv, query, mask=mask: kv.attend(query, mask=mask))
            runs = {
                f"{count} filled": measure.waiting(
                    functools.partial(program, kv.truncate(count), query)
                )
                for count in (8192, 2048, 128)
            }
            runs["torch, 128"] = torch_sdpa(shape, 128)
            compare(f"{shape} {label}", runs, "8192 filled")


def plain() -> None:
    """Compares `jattn.attention` on a buffer with blockwise, by what counts."""

    def attend(query, key, value, last, name):
        options = {"query_position": last, "implementation": name}
        return jattn.attention(query, key, value, mask=Causal(), **options)

    program = jax.jit(attend, static_argnums=4)
    for shape in (*LONG, (1, 8191, 8, 8, 64)):
        for dtype in ("float32", "bfloat16"):
            B, S, N, K, H = shape
            arrays = [draw(B, x, n, H, dtype=dtype) for x, n in ((1, N), (S, K), (S, K))]
            runs = {
                f"{name}, {count}": measure.waiting(
                    functools.partial(program, *arrays, jnp.int32(count - 1), name)
                )
                for name in ("decode", "blockwise")
                for count in (128, 2048, S)
            }
            compare(f"{shape} {dtype}", runs, "blockwise, 128")


def formats() -> None:
    """Times rounded caches and those of 16 bits beside float32."""
    for shape in (LONG[0], FULL[5], BEYOND):
        runs = {}
        for dtype in ("float32", "bfloat16", "int8", "float8_e4m3fn", "int4"):
            runs[dtype] = attending(*filled(shape, dtype)).run
        compare(str(shape), runs, "float32")


def step() -> None:
    """Shows what a donated step needs beside the cache, and if it stays in place."""
    for shape in LONG:
        query, kv = filled(shape)
        token = draw(shape[0], 1, *shape[3:])
        extend = lambda kv, q, k: kv.extend(q, k, k, mask=Causal())
        kv = kv.truncate(shape[1] - 64)
        program = jax.jit(extend, donate_argnums=0).lower(kv, query, token).compile()
        size = sum(x.nbytes for x in jax.tree.leaves(kv))
        share = program.memory_analysis().temp_size_in_bytes / size
        place = kv.store.keys.unsafe_buffer_pointer()
        _, kv = program(kv, query, token)
        stays = kv.store.keys.unsafe_buffer_pointer() == place
        print(f"{shape!s:28} temporaries {100 * share:.1f} % of it; in place: {stays}")


def append() -> None:
    """Shows the time to append in a loop, by the capacity."""
    token = draw(1, 1, 8, 64)
    for dtype in ("float32", "int8"):
        runs = {}
        for capacity in (1024, 65536):
            kv = caches.empty(1, capacity, 8, 64, dtype=dtype)
            loop = lambda kv: jax.lax.fori_loop(
                0, 1000, lambda i, kv: kv.append(token, token), kv
            )
            program = jax.jit(lambda kv, loop=loop: loop(kv), donate_argnums=0)
            runs[f"{capacity} slots"] = _donating(program, kv)
        compare(f"{dtype}, 1000 tokens", runs, "65536 slots")


def _donating(program, kv):
    """Runs a program on a cache that it takes, and keeps what it gives for the next."""
    held = [kv]

    def run():
        held[0] = jax.block_until_ready(program(held[0])).truncate(0)

    return run


SECTIONS = {
    "full": full,
    "filled": part,
    "plain": plain,
    "formats": formats,
    "step": step,
    "append": append,
    "model": model,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures what is named, or everything."""
    report.run_sections("python -m bench.decode", __doc__, SECTIONS, arguments)


if __name__ == "__main__":
    main()
