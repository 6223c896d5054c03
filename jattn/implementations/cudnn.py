"""Attention on NVIDIA GPUs by cuDNN, where it is the same function.

The computation is `jax.nn.dot_product_attention(implementation="cudnn")`; nothing else of
cuDNN is used. `refusal` says why it refuses a problem. It accepts:

    float16 and bfloat16, H = D a multiple of 8 up to 128, grouped heads; T and S even and
    at least 64; no mask, or for T = S `Causal()` or `Window(left, 0)`, alone or joined

cuDNN lets a masked NaN or Inf reach the output. So with a mask, what is not finite is
recomputed blockwise.

cuDNN also computes the gradient of the output. Its backward pass needs statistics of the
forward pass, and `jax.nn` returns these only rounded. So the gradient runs the forward pass
again; XLA merges the two calls where both are in one program.

Blockwise computes tangents and derivatives of higher order. It also computes everything in
a program for `jax.export`, since JAX does not promise that a later cuDNN can read it; and
everything where XLA divides the arrays among devices. Inside `jax.shard_map` each device
runs cuDNN. Other platforms run what they would run if cuDNN did not exist.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.arrays.shapes import Sizes
from jattn.call.problem import Operands, Problem
from jattn.implementations.kernel import Kernel
from jattn.implementations.nvidia import PLATFORMS, lacking, objection_to_precision
from jattn.implementations.sums import Sums
from jattn.masks import Causal, Window
from jattn.masks.mask import And

_WORDS = {
    "bias": "a `bias`, which it rounds to the dtype of the inputs",
    "scale": "a `scale`, which must be a number in its program: 1/√H is",
    "positions": "positions: its masks count queries and keys from 0",
    "logsumexp": "what needs the logsumexp, as `attention_state` and a sink do: it comes "
    "rounded and without a gradient",
}


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
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
    return (
        objection_to_precision(problem)
        or _objection_to_sizes(problem.sizes)
        or _objection_to_mask(problem)
    )


def _objection_to_sizes(sizes: Sizes) -> str | None:
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
    return None


def _objection_to_mask(problem: Problem) -> str | None:
    sizes = problem.sizes
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
    """Says what the default device lacks, if it is a GPU; None if it lacks nothing."""

    def lacks(capability: str) -> str | None:
        if float(capability) < 8:
            return f"needs compute capability 8.0, and has {capability}."
        return None if is_installed() else "is not installed: `pip install jax[cuda13]`."

    return lacking(lacks)


@functools.cache
def is_installed() -> bool:
    """Says whether JAX finds cuDNN; without it, no call can be lowered to cuDNN."""
    try:
        jax.eval_shape(_call, *[jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)] * 3)
    except RuntimeError:  # "cuDNN is not detected", or a version too old
        return False
    return True


class CuDNN(Kernel):
    """Output and gradient by cuDNN.

    It rounds the logsumexp, so it is not `exact`. Its masks do not stop a NaN or Inf, so
    it does not isolate.
    """

    exact = False
    isolates = False

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why cuDNN is not the same function, or cannot run; None if it accepts."""
        if platform not in PLATFORMS:
            return f"runs on NVIDIA GPUs only, and the platform is {platform}."
        return _objection(problem) or _device()

    def block_sizes(self, problem, operands, platform) -> None:
        """Gives None: cuDNN does not say which blocks it skips."""
        del problem, operands, platform

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes the output and the sums of each row, by cuDNN's rounded logsumexp.

        With top = logsumexp and total = 1, top + log total is the logsumexp.
        """
        run = _joined(functools.partial(_run, problem))
        output, logsumexp = run(operands.query, operands.key, operands.value)
        top = logsumexp.astype(problem.wide)
        return Sums(output.astype(problem.wide), top, jnp.ones_like(top))

    def backward(self, problem, operands, outputs, cotangents, wanted) -> Operands | None:
        """Computes the cotangents of query, key and value; None if others are wanted.

        The cotangent of the logsumexp is not used: `refusal` excludes calls that need the
        logsumexp.
        """
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
    # The residual is the logsumexp; nothing depends on it here, so its cotangent is 0.
    (_, logsumexp), pull = jax.vjp(functools.partial(_run, problem), query, key, value)
    return pull((cotangent, jnp.zeros_like(logsumexp)))


def _call(query, key, value, **words):
    return jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn", return_residual=True, **words
    )


def _words(problem: Problem) -> dict | None:
    """Gives the mask as arguments of `jax.nn`; None if `jax.nn` cannot express it."""
    mask = _mask(problem)
    if mask is None:
        return {} if problem.mask is None else None
    if isinstance(mask, Causal):
        return {"is_causal": True}
    return {"is_causal": True, "local_window_size": (mask.left, mask.right)}


def _mask(problem: Problem) -> Causal | Window | None:
    """Gives the mask as one that cuDNN supports, or None.

    The numbers of the mask become part of cuDNN's program, so they must be Python numbers:
    see `Problem.named`.
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
    # A window as wide as the sequence hides nothing that causality does not hide.
    return Causal() if left >= problem.sizes.S - 1 else Window(left, 0)


def _joined(function):
    """Makes a function that merges an axis of `vmap` into the first axis, of examples.

    cuDNN's batch has one axis, so the mapped axis becomes part of it.
    """

    @custom_vmap
    def joined(*arrays):
        return function(*arrays)

    @joined.def_vmap
    def _(size, mapped, *arrays):
        # An array without the mapped axis is repeated for each slice.
        arrays = [
            x if flag else jnp.broadcast_to(x, (size, *x.shape))
            for x, flag in zip(arrays, mapped, strict=True)
        ]
        outputs = joined(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        outputs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs)
        return outputs, (True,) * len(outputs)

    return joined
