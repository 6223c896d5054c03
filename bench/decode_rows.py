"""The rows of `bench.decode`, and how their runs are compared."""

import statistics

import jax.numpy as jnp
import numpy as np

from bench import candidates, measure
from jattn import caches

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
BEYOND = (1, 65536, 8, 8, 64)  # 268 MB in float32, which no cache of a processor holds
SECONDS = 6.0  # of each table row


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
