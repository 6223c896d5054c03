"""The rows of `bench.cpu`: names of cases, and shapes B, T, N, H, K, S, D."""

import jax

import jattn
from bench import measure

LONG = (  # the geometric mean is of these
    ("plain", (1, 2048, 8, 64)),
    ("causal", (1, 2048, 8, 64)),
    ("plain", (1, 4096, 8, 64)),
    ("causal", (1, 4096, 8, 64)),
    ("plain", (1, 4096, 4, 128)),
    ("causal", (1, 4096, 4, 128)),
)
CAUSAL = (("causal", (1, 1024, 8, 64)), ("causal", (1, 16384, 2, 64)))
MASKED = (
    ("documents", (1, 4096, 8, 64)),
    ("window", (1, 4096, 8, 64)),
    ("relative_bias", (1, 1024, 16, 64)),  # T5's
)
HALF = tuple(
    (name, shape)
    for shape in ((1, 4096, 8, 64), (1, 4096, 4, 128))
    for name in ("plain", "causal")
)
SHORT = (
    ("plain", (4, 512, 8, 64)),
    ("causal", (4, 512, 8, 64)),
    ("plain", (8, 256, 8, 64)),
    ("causal", (8, 256, 8, 64)),
    ("plain", (32, 128, 8, 64)),
    ("plain", (64, 64, 8, 32)),
)
QUERY = (
    ("one_query", (1, 1, 8, 64, 8, 8192)),
    ("one_query", (1, 1, 8, 64, 2, 8192)),
)
SHAPES = (  # beside plain attention at (1, 4096, 8, 64), a flop's time
    ("8 query heads, 2 key heads", (1, 4096, 8, 64, 2)),
    ("values of 64, keys of 128", (1, 4096, 4, 128, 4, 4096, 64)),
    ("2048 queries, 4096 keys", (1, 2048, 8, 64, 8, 4096)),
    ("4097 queries, 3001 keys", (1, 4097, 8, 64, 8, 3001)),
)
BASE = (1, 4096, 8, 64)


def inputs_of(shape):
    return [jax.random.normal(jax.random.key(i), shape) for i in range(3)]


def forward(inputs, **given) -> measure.Pass:
    return measure.compiled(lambda inputs: jattn.attention(*inputs, **given), inputs)


def both(inputs, **given) -> measure.Pass:
    def run(inputs):
        output, pull = jax.vjp(lambda x: jattn.attention(*x, **given), inputs)
        return output, pull(inputs[0])

    return measure.compiled(run, inputs)
