"""One query by a cache, on CPU: `python -m bench.decode [NAME …]`.

Torch attends to the filled slice of heads-first arrays, the form that it is fastest in.
Every ratio is of medians over rounds in which all calls take turns, as in `bench.speed`.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from bench import candidates, measure, report
from jattn import caches
from jattn.masks import Causal

FULL = (  # B, S, N, K, H
    (1, 8192, 8, 8, 64),
    (1, 8192, 8, 2, 64),
    (1, 1024, 8, 2, 64),
    (8, 1024, 8, 2, 64),
    (32, 1024, 8, 2, 64),
    (1, 8192, 8, 8, 128),
    (8, 1024, 8, 8, 64),
)
LONG = ((1, 8192, 8, 8, 64), (1, 8192, 8, 2, 64))
SECONDS = 6.0  # of each table row
LAYERS, WIDTH, HIDDEN, WORDS = 30, 576, 1536, 49152  # a model of 135 million parameters


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def filled(shape, dtype="float32", ragged=False):
    """Makes a query and a full cache."""
    B, S, N, K, H = shape
    kind = dtype if dtype in ("float32", "bfloat16") else "float32"
    key, value = draw(B, S, K, H, dtype=kind), draw(B, S, K, H, dtype=kind)
    kv = caches.empty(B, S, K, H, dtype=dtype, ragged=ragged).append(key, value)
    return draw(B, 1, N, H, dtype=kind), kv


def attending(query, kv, mask=None):
    """Gives a compiled call, and what it needs beside its arguments."""
    return measure.compiled(lambda kv, query: kv.attend(query, mask=mask), kv, query)


def torch_sdpa(shape, count):
    """Torch's attention by the first `count` keys; None where torch is not installed."""
    if candidates.missing(["torch"]):
        return None
    import torch

    torch.set_num_threads(candidates.num_cores())
    B, S, N, K, H = shape
    tensor = lambda *x: torch.from_numpy(np.array(draw(*x)))
    query, key, value = tensor(B, N, 1, H), tensor(B, K, S, H), tensor(B, K, S, H)
    key, value = key[:, :, :count], value[:, :, :count]
    attend = torch.nn.functional.scaled_dot_product_attention

    def run():
        with torch.inference_mode():
            return attend(query, key, value, enable_gqa=N != K)

    return run


def compare(label: str, runs, base: str) -> None:
    """Prints the median of each run, and by how much `base` takes longer.

    The second ratio is of the fastest times, which neighbours on the machine disturb less.
    """
    times = measure.interleave({k: f for k, f in runs.items() if f}, SECONDS)
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    least = {name: min(taken) for name, taken in times.items()}
    text = [f"{name} {1e3 * x:.3f} ms" for name, x in middle.items()]
    text += [
        f"{base} / {name} {middle[base] / x:.2f} ({least[base] / least[name]:.2f})"
        for name, x in middle.items()
        if base in middle and name != base
    ]
    print(f"{label:28} {'; '.join(text)}", flush=True)


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
    for shape in (LONG[0], FULL[5]):
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


def model() -> None:
    """Times a token of a model of 135 million parameters, 64 tokens filled."""
    heads, kv_heads = 9, 3
    size = WIDTH // heads
    shapes = {
        "q": (WIDTH, WIDTH),
        "k": (WIDTH, kv_heads * size),
        "v": (WIDTH, kv_heads * size),
        "o": (WIDTH, WIDTH),
        "up": (WIDTH, 2 * HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    weights = [
        {name: 0.02 * draw(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)
    ]
    words = 0.02 * draw(WORDS, WIDTH)

    def forward(attend, weights, words, stack):
        x, after = words[:1], []
        for w, kv in zip(weights, stack, strict=True):
            part = lambda name, w=w, x=x: (x @ w[name]).reshape(1, 1, -1, size)
            output, kv = attend(kv, part("q"), part("k"), part("v"))
            x = x + output.reshape(1, WIDTH) @ w["o"]
            gate, up = jnp.split(x @ w["up"], 2, axis=-1)
            x = x + (jax.nn.silu(gate) * up) @ w["down"]
            after.append(kv)
        return jnp.argmax(x @ words.T), after

    def by_jattn(kv, *token):
        output, kv = kv.extend(*token, mask=Causal())
        return output, kv.truncate(64)  # so that the next call is the same again

    def by_jax_nn(kv, query, key, value):
        keys = jax.lax.dynamic_update_slice_in_dim(kv[0], key, kv[2], 1)
        values = jax.lax.dynamic_update_slice_in_dim(kv[1], value, kv[2], 1)
        count = {"key_value_seq_lengths": kv[2][None] + 1}
        output = jax.nn.dot_product_attention(query, keys, values, **count)
        return output, (keys, values, kv[2])

    runs = {}
    for capacity in (256, 2048):
        kv = caches.empty(1, capacity, kv_heads, size)
        kv = kv.append(*2 * [draw(1, 64, kv_heads, size)])
        plain = *2 * [draw(1, capacity, kv_heads, size)], jnp.int32(64)
        for name, attend, one in (("jattn", by_jattn, kv), ("jax.nn", by_jax_nn, plain)):
            stack = [jax.tree.map(jnp.copy, one) for _ in range(LAYERS)]
            program = jax.jit(functools.partial(forward, attend), donate_argnums=2)
            runs[f"{name}, capacity {capacity}"] = _decoding(program, weights, words, stack)
    compare("135 M parameters", runs, "jax.nn, capacity 2048")


def _decoding(program, weights, words, stack):
    """Runs a program on caches that it takes, and keeps what it gives for the next."""
    held = [stack]

    def run():
        word, held[0] = program(weights, words, held[0])
        jax.block_until_ready(word)

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
