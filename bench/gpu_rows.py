"""What a GPU is to time: the calls, and who computes them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

import jattn
from jattn import modifiers
from jattn.call.pose import pose
from jattn.implementations import run as operation
from jattn.implementations.gpu.kernel import GPU
from jattn.masks import Causal, Segments, Window

DOCUMENT, WINDOW = 1024, 1024  # tokens
N = 16
BENT = modifiers.SoftCap(20.0) >> modifiers.ALiBi()


@dataclasses.dataclass(frozen=True)
class Row:
    """One call to time."""

    what: str
    T: int
    H: int = 128
    gradients: bool = False
    queries: int | None = None  # fewer than T in decoding

    @property
    def options(self) -> dict:
        """Gives mask and modifier."""
        causal = Causal(self.T - (self.queries or self.T))
        ids = jnp.arange(self.T, dtype=jnp.int32) // DOCUMENT
        return {
            "causal": {"mask": causal},
            "documents": {"mask": causal & Segments(ids)},
            "softcap+alibi": {"mask": causal, "modifier": BENT},
            "window": {"mask": Window(WINDOW - 1, 0)},
            "decode": {"mask": causal},
        }[self.what]

    @property
    def operations(self) -> float:
        """Counts additions and multiplications of the pairs that count."""
        T = self.T
        pairs = {"documents": DOCUMENT / 2 * T, "window": WINDOW * (T - WINDOW / 2)}
        seen = pairs.get(self.what, (self.queries or T / 2) * T)
        return 4 * seen * N * self.H * (3.5 if self.gradients else 1)

    @property
    def repeats(self) -> int:
        """Gives the number of calls that a GPU of 200 TFLOP/s computes in 20 ms."""
        return max(3, min(50, int(0.02 * 200e12 / self.operations)))

    def arrays(self, dtype="bfloat16"):
        """Describes query, key and value."""
        shapes = (1, self.queries or self.T, N, self.H), *[(1, self.T, N, self.H)] * 2
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


KINDS = ("causal", "documents", "softcap+alibi", "window")
ROWS = [  # the most telling ones first, because a part may run out of time
    *(Row(what, 4096) for what in KINDS),
    *(Row(what, 4096, gradients=True) for what in KINDS),
    *(Row(what, 16384) for what in KINDS),
    *(Row(what, 4096, H=64) for what in KINDS[:1]),
    Row("causal", 1024),
    Row("decode", 16384, queries=1),
    Row("causal", 16384, gradients=True),
    Row("documents", 65536),
    Row("causal", 65536),
    Row("causal", 4096, H=64, gradients=True),
]


def by_name(name: str, row: Row):
    """Gives a function of query, key and value; None if it cannot compute the row."""
    if name == "jax.nn":
        if row.what not in ("causal", "window") or row.T > 16384:
            return None
        window = {"local_window_size": (WINDOW - 1, 0)} if row.what == "window" else {}
        return functools.partial(jax.nn.dot_product_attention, is_causal=True, **window)
    if name == "attention_mgpu":
        return mgpu_forward if row.what == "causal" and not row.gradients else None
    if name == "dense" and row.T > 4096:  # its logits are larger than the memory
        return None
    if name == "gpu" and jax.default_backend() != "gpu":  # to be lowered only
        return functools.partial(by_kernels, **row.options)
    return functools.partial(jattn.attention, implementation=name, **row.options)


def mgpu_forward(query, key, value):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(64, 128, 2, causal=True)
    narrow = (x.astype(jnp.float16) for x in (query, key, value))
    return attention_mgpu._attention_forward(*narrow, config)


def by_kernels(query, key, value, capability=None, **options):
    problem, operands = pose("bench", query, key, value, **options)
    kernel = GPU(capability=capability)
    sums = operation.attend(problem, operands, (kernel,))
    return sums.output.astype(problem.dtype)


def with_gradients(function):
    """Gives a function of query, key and value that computes their gradients too."""

    def both(query, key, value):
        output, pull = jax.vjp(function, query, key, value)
        return output, pull(output)

    return both


def timed(function, row: Row):
    """Gives the function to time: with the gradients, if the row has them."""
    return with_gradients(function) if row.gradients else function


def inputs(row: Row, dtype="bfloat16"):
    """Draws query, key and value."""
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, x.shape, jnp.float32).astype(dtype)
        for key, x in zip(keys, row.arrays(), strict=True)
    ]
