"""Attention on NVIDIA GPUs by cuDNN, where it is the same function.

`jax.nn.dot_product_attention(implementation="cudnn")` runs; nothing else of cuDNN is
used. `refusal` says what it is not taken for. What is left:

    float16 and bfloat16, H = D a multiple of 8 up to 128, grouped heads; T and S even and
    at least 64; no mask, or for T = S `Causal()` or `Window(left, 0)`, alone or joined

Where a mask may hide a NaN or Inf, cuDNN does not keep it from touching what it must not:
there the results are looked at, and blockwise takes over where one is not finite.

The gradient of the output is cuDNN's too. It starts from statistics that `jax.nn` gives
only rounded, so it runs the forward pass again: XLA merges the two calls where both are in
one program. Tangents and higher orders are blockwise, and so is all of it in what
`jax.export` keeps, for JAX does not promise that a later cuDNN reads it, and where XLA is
to divide the arrays among devices: inside `jax.shard_map` each device runs cuDNN. Other
platforms run what they would have run without it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.call.problem import Operands, Problem
from jattn.implementations.kernel import Kernel, Sums
from jattn.mask import And
from jattn.masks import Causal, Window

PLATFORMS = ("gpu", "cuda")  # JAX's names of one thing

_WORDS = {
    "bias": "a `bias`, which it rounds to the dtype of the inputs",
    "scale": "a `scale`, which must be a number in its program: 1/√H is",
    "positions": "positions: its masks count queries and keys from 0",
    "logsumexp": "what needs the logsumexp, as `attention_state` and a sink do: it comes "
    "rounded and without a gradient",
}


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    sizes = problem.sizes
    if problem.dtype.name not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, got {problem.dtype}."
    for name, what in _WORDS.items():
        if name in problem.given:
            return f"does not take {what}."
    if problem.modifier is not None:
        return "has no words for a modifier."
    if problem.rate:
        return "draws other weights in dropout."
    if problem.blocks is not None:
        return "does not read a block table: give the mask itself."
    if problem.precision not in (None, "default"):
        return (
            f"rounds the weights to the dtype of the inputs, and the precision of "
            f"products is to be {problem.precision}."
        )
    if not sizes.are_known:
        return "needs sizes that are numbers; these are symbols."
    if 0 in (*sizes.BNTS, sizes.K):
        return "needs at least one example, head, query and key."
    if sizes.H != sizes.D:
        return f"needs values of the size of keys, got H={sizes.H} and D={sizes.D}."
    if sizes.H % 8 or not 8 <= sizes.H <= 128:
        return f"takes head sizes that are multiples of 8 up to 128, got H={sizes.H}."
    if sizes.T % 2 or sizes.S % 2 or min(sizes.T, sizes.S) < 64:
        return (
            f"takes even T and S from 64, as all its versions do for gradients, got "
            f"T={sizes.T} and S={sizes.S}."
        )
    if problem.mask is None:
        return None
    if _words(problem) is None:
        return (
            "has words for `Causal()` and `Window(left, 0)` only, left a Python number; of "
            "lengths it does not define what a query without keys gets."
        )
    if sizes.T != sizes.S:
        return (
            f"takes masks for T = S, where nobody can mean another diagonal, got "
            f"T={sizes.T} and S={sizes.S}."
        )
    return None


def _device() -> str | None:
    """What is missing on the default device, if that is a GPU."""
    if jax.default_backend() != "gpu":
        return None  # described, or lowered for
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return "runs on NVIDIA GPUs only, and this one is not."
    if float(device.compute_capability) < 8:
        return f"needs compute capability 8.0, and has {device.compute_capability}."
    return None if is_installed() else "is not installed: `pip install jax[cuda13]`."


@functools.cache
def is_installed() -> bool:
    """Whether JAX finds cuDNN, without which nothing can be lowered to it."""
    try:
        jax.eval_shape(_call, *[jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)] * 3)
    except RuntimeError:  # "cuDNN is not detected", or a version too old
        return False
    return True


class CuDNN(Kernel):
    """Output and gradient by cuDNN.

    What it says of the logsumexp is rounded, and its masks do not keep a NaN or Inf from
    where it must not go.
    """

    exact = False
    isolates = False

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Why cuDNN is not the same function, or cannot run."""
        if platform not in PLATFORMS:
            return f"runs on NVIDIA GPUs only, and the platform is {platform}."
        return _objection(problem) or _device()

    def block_sizes(self, problem: Problem, operands: Operands | None) -> None:
        """Skips on its own terms, which are not known."""
        del problem, operands

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """The output; its maximum is the logsumexp of a sum of 1, rounded."""
        run = _joined(functools.partial(_run, problem))
        output, logsumexp = run(operands.query, operands.key, operands.value)
        top = logsumexp.astype(problem.wide)
        return Sums(output.astype(problem.wide), top, jnp.ones_like(top))

    def backward(self, problem, operands, outputs, cotangents, wanted) -> Operands | None:
        """The cotangents of query, key and value; the logsumexp is read by nobody."""
        del outputs
        inputs = ("query", "key", "value")
        if any(jax.tree.leaves(wanted._replace(**dict.fromkeys(inputs, False)))):
            return None
        arrays = operands.query, operands.key, operands.value
        narrow = cotangents.output.astype(problem.dtype)
        results = _joined(functools.partial(_pull, problem))(*arrays, narrow)
        nothing = jax.tree.map(lambda _: None, wanted)
        return nothing._replace(**dict(zip(inputs, results, strict=True)))


def _run(problem: Problem, query, key, value):
    return _call(query, key, value, **(_words(problem) or {}))


def _pull(problem: Problem, query, key, value, cotangent):
    (_, logsumexp), pull = jax.vjp(functools.partial(_run, problem), query, key, value)
    return pull((cotangent, jnp.zeros_like(logsumexp)))


def _call(query, key, value, **words):
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn", return_residual=True, **words
    )


def _words(problem: Problem) -> dict | None:
    """The mask in the words of `jax.nn`, or None where it has none."""
    mask = _mask(problem)
    if mask is None:
        return {} if problem.mask is None else None
    if isinstance(mask, Causal):
        return {"is_causal": True}
    return {"is_causal": True, "local_window_size": (mask.left, mask.right)}


def _mask(problem: Problem) -> Causal | Window | None:
    """Gives the mask as one that cuDNN has too, or None.

    Its numbers are in cuDNN's program, so they must be known: see `Problem.named`.
    """
    named = problem.named
    both = (named.left, named.right) if isinstance(named, And) else (named,)
    windows = [x for x in both if isinstance(x, Window)]
    causal = [x for x in both if isinstance(x, Causal)]
    if len(windows) > 1 or len(causal) > 1 or len(windows + causal) < len(both):
        return None
    if any(x.offset != 0 for x in causal) or any(x.right != 0 for x in windows):
        return None
    if not windows or windows[0].left is None:
        return Causal()
    left = int(windows[0].left)
    return Causal() if left >= problem.sizes.S - 1 else Window(left, 0)


def _joined(function):
    """The function of arrays with examples first, which axes of a `vmap` join."""

    @custom_vmap
    def joined(*arrays):
        return function(*arrays)

    @joined.def_vmap
    def _(size, mapped, *arrays):
        arrays = [
            x if flag else jnp.broadcast_to(x, (size, *x.shape))
            for x, flag in zip(arrays, mapped, strict=True)
        ]
        outputs = joined(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        outputs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs)
        return outputs, (True,) * len(outputs)

    return joined
