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

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jattn.call.problem import Operands, Problem, pose_mask
from jattn.implementations.blockwise import attention as anywhere
from jattn.implementations.tpu import attention as tpu
from jattn.masks import And, Causal, Window
from jattn.operations.mapped import cond_any
from jattn.operations.operation import restrict
from jattn.state import State

_WORDS = {
    "bias": "a `bias`, which it rounds to the dtype of the inputs",
    "scale": "a `scale`, which must be a number in its program: 1/√H is",
    "positions": "positions: its masks count queries and keys from 0",
    "logsumexp": "what needs the logsumexp, as `attention_state` and a sink do: it comes "
    "rounded and without a gradient",
}


def refusal(problem: Problem, platform: str) -> str | None:
    """Why cuDNN is not the same function, or cannot run."""
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs only, and the platform is {platform}."
    return _objection(problem) or _device()


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


def block_sizes(problem: Problem, operands: Operands | None) -> None:
    """Skips on its own terms, which are not known."""
    del problem, operands


def attention_state(problem: Problem, operands: Operands) -> State:
    """The output BTND; the logsumexp BTN beside it is rounded on GPU, and not to be used.

    `refusal` keeps this from whoever needs the logsumexp.
    """
    problem, operands, size = anywhere.prepared(problem, operands)
    leaves, tree = jax.tree.flatten(operands)
    return anywhere.state_of(*Attention(problem, tree, size)(*leaves))


class Attention(anywhere.Attention):
    """As blockwise, with output and gradient by cuDNN where it is lowered for CUDA."""

    def on(self, platform):
        """Itself on CUDA; the kernels of TPU there; else blockwise."""
        if platform == "cuda":
            return self
        kernels = platform == "tpu" and tpu.refusal(self.problem, platform) is None
        home = tpu.Attention if kernels else anywhere.Attention
        return home(self.problem, self.tree, self.size).on(platform)

    @property
    def elements(self):
        """None: examples of a `vmap` join the batch, whatever their number."""
        return 0

    def fast(self, *leaves, spread):
        """By cuDNN."""
        if spread:
            return super().fast(*leaves, spread=spread)
        return _joined(self._forward)(*leaves[:3])

    def push(self, active, primals, outputs, tangents, spread):
        """By blockwise, from an exact logsumexp."""
        if spread:
            return super().push(active, primals, outputs, tangents, spread)
        function, chosen = restrict(self.on("any"), active, primals)
        return jax.jvp(function, chosen, tuple(tangents))[1]

    def pull(self, active, primals, outputs, cotangents, spread):
        """By cuDNN; nobody reads the logsumexp, so its cotangent is 0."""
        if spread:  # and so was the forward pass, whose maximum and sum are exact
            return super().pull(active, primals, outputs, cotangents, spread)
        if any(active[3:]):
            function, chosen = restrict(self.on("any"), active, primals)
            return jax.vjp(function, *chosen)[1](tuple(cotangents))
        backward, otherwise = _joined(self._backward), self._blockwise_backward
        backward = jax.custom_jvp(backward)  # for derivatives of higher order
        backward.defjvp(functools.partial(jax.jvp, otherwise))
        results = backward(*primals[:3], cotangents[0])
        return [x for x, flag in zip(results, active[:3], strict=True) if flag]

    def _forward(self, query, key, value):
        output, logsumexp = self._call(query, key, value)
        logsumexp = logsumexp.astype(self.problem.wide)  # the maximum, of a sum of 1
        results = output.astype(logsumexp.dtype), logsumexp, jnp.ones_like(logsumexp)
        return self._finite(results, self._blockwise, query, key, value)

    def _backward(self, query, key, value, cotangent):
        arrays = query, key, value
        (_, logsumexp), pull = jax.vjp(self._call, *arrays)
        narrow = cotangent.astype(self.problem.dtype)
        results = pull((narrow, jnp.zeros_like(logsumexp)))
        return self._finite(results, self._blockwise_backward, *arrays, cotangent)

    def _call(self, query, key, value):
        return _call(query, key, value, **(_words(self.problem) or {}))

    def _finite(self, results, otherwise, *arrays):
        """The results; where a mask may hide what is not finite, only if they are."""
        if self.problem.mask is None:
            return tuple(results)
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in results]))
        return cond_any(
            ~finite, lambda xs: tuple(otherwise(*xs)), lambda _: tuple(results), arrays
        )

    def _blockwise(self, query, key, value):
        """By blockwise, for as many examples as there are."""
        sizes = dataclasses.replace(self.problem.sizes, batch=(query.shape[0],))
        problem = dataclasses.replace(self.problem, sizes=sizes)
        _, operands = pose_mask("cudnn", sizes, problem.dtype, mask=_mask(problem))
        scale = jnp.asarray(sizes.H**-0.5).astype(problem.wide)
        operands = operands._replace(query=query, key=key, value=value, scale=scale)
        problem, operands, size = anywhere.prepared(problem, operands)
        leaves, tree = jax.tree.flatten(operands)
        return anywhere.Attention(problem, tree, size)(*leaves)

    def _blockwise_backward(self, query, key, value, cotangent):
        function = lambda *xs: self._blockwise(*xs)[0]
        return jax.vjp(function, query, key, value)[1](cotangent)


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
