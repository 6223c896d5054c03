"""Attention by kernels for NVIDIA Hopper GPUs: forward and backward."""

import dataclasses
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.blocks import of_call
from jattn.call.hoist import joint_equations
from jattn.call.problem import Operands, Problem
from jattn.implementations import joint
from jattn.implementations.gpu import layout
from jattn.implementations.gpu.pairs import LOG2_E, objection
from jattn.implementations.kernel import Kernel, Sums
from jattn.implementations.shared import sum_all

PLATFORMS = ("gpu", "cuda")  # JAX has two names for this platform
OLDEST = (0, 11, 2)  # of jax: earlier ones call and emulate these kernels in another way
CAPABILITY = "9.0"  # of Hopper, which alone has wgmma


@functools.lru_cache(maxsize=1024)
def _objection(problem: Problem) -> str | None:
    if problem.dtype.name not in ("bfloat16", "float16"):
        return (
            f"takes bfloat16 and float16, which tensor cores multiply, got {problem.dtype}."
        )
    sizes = problem.sizes
    if not all(isinstance(size, int) for size in (*sizes.BNTS, sizes.K)):
        return "needs sizes that are numbers; these are symbols."
    if 0 in (*sizes.BNTS, sizes.H, sizes.D):
        return "needs at least one query, key and number in each."
    if max(sizes.H, sizes.D) > 256:
        return f"takes head sizes up to 256, got H={sizes.H} and D={sizes.D}."
    if problem.precision not in (None, "default"):
        return (
            f"rounds the weights to the dtype of the inputs, and the precision of "
            f"products is to be {problem.precision}."
        )
    for name in ("mask", "modifier"):
        program = getattr(problem, name)
        if program is not None:
            found = objection(joint_equations(program, logit=name == "modifier"))
            if found:
                return (
                    f"the {name} joins queries and keys by {found}, which a kernel cannot "
                    f"evaluate; it can where only queries or only keys are indexed."
                )
    return None


def _missing() -> str | None:
    """Says what a kernel needs and JAX does not bring; None if all is here."""
    if jax.__version_info__ < OLDEST:
        return f"needs jax {'.'.join(map(str, OLDEST))}, and this is {jax.__version__}."
    if importlib.util.find_spec("absl") is None:
        return "needs a package that Pallas imports: `pip install absl-py`."
    return None


def _device() -> str | None:
    """Says what the default device lacks, if it is a GPU; None if it lacks nothing."""
    if jax.default_backend() != "gpu":
        return None  # the GPU is elsewhere: the call is only described or lowered here
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return "runs on NVIDIA GPUs only, and this one is not."
    if device.compute_capability != CAPABILITY:
        return (
            f"needs compute capability {CAPABILITY}, that of Hopper, and this device has "
            f"{device.compute_capability}."
        )
    return None


@dataclasses.dataclass(frozen=True)
class GPU(Kernel):
    """Forward and backward by Pallas kernels for Hopper.

    Attributes:
        interpret: How the kernels are emulated, which works on any platform; for tests.
    """

    interpret: Any = None

    def refusal(self, problem: Problem, platform: str) -> str | None:
        """Says why no kernel can be written for a problem, or run; None if it can."""
        if platform not in PLATFORMS and not self.interpret:
            return f"runs on NVIDIA GPUs only, and the platform is {platform}."
        device = None if self.interpret else _device()
        return _objection(problem) or _missing() or device

    def block_sizes(self, problem: Problem, operands: Operands | None) -> tuple[int, int]:
        """Gives the queries and keys of a block that forward can skip."""
        del operands
        plan = layout.forward_plan(problem.sizes.H, problem.sizes.D)
        return layout.BLOCK, plan.inner

    def forward(self, problem: Problem, operands: Operands) -> Sums:
        """Computes output, maximum and sum of each row."""
        from jattn.implementations.gpu.forward import forward

        sizes = problem.sizes
        plan = layout.forward_plan(sizes.H, sizes.D)
        call, arguments = self._call(problem, operands, plan)
        output, top, total = forward(call, arguments)
        output = output[:, : sizes.T, :, : sizes.D]
        return Sums(output, *(layout.unrows(x, sizes.T) for x in (top, total)))

    def backward(self, problem, operands, outputs, cotangents, wanted) -> Operands | None:
        """Computes the cotangents of the operands; None if one of them is for each pair.

        The kernels write no cotangent as large as T × S.
        """
        from jattn.implementations.gpu.backward import row_numbers

        _, read = layout.read(problem, operands)
        flags = joint.wanted_extras(read, wanted)
        leaves = zip(*map(jax.tree.leaves, (read, flags)), strict=True)
        if any(flag and layout.form(x) == "tile" for x, flag in leaves):
            return None
        factor, cotangents = _representable(problem, cotangents)
        narrow = cotangents.output.astype(problem.dtype)
        d_output = narrow.astype(problem.wide)
        rows = row_numbers(outputs, cotangents._replace(output=d_output), problem.rate)
        # Rows of padding have the level ∞, so that their weights are 0.
        vectors = tuple(map(layout.rows, rows, (jnp.inf, 0, 0)))
        gradient = functools.partial(
            self._gradient, problem, operands, (narrow, vectors, flags)
        )
        d_query, *d_rows = gradient(("query",))
        parts = [("key", "value")] if _share_kernel(problem) else [("key",), ("value",)]
        found = [gradient(sums) for sums in parts]
        pairs = zip(found, parts, strict=True)
        d_key, d_value = (x for one, sums in pairs for x in one[: len(sums)])
        d_columns = found[0][len(parts[0]) :]
        results = d_query, d_key, d_value, d_rows, d_columns
        results = jax.tree.map(lambda x: x * factor, results)
        return _operands(problem, operands, results, flags, wanted)

    def _gradient(self, problem, operands, given, sums):
        """Runs the kernel for these sums."""
        from jattn.implementations.gpu.backward import backward

        narrow, vectors, flags = given
        plan = layout.backward_plan(problem.sizes.H, problem.sizes.D)
        by_query = sums == ("query",)
        call, arguments = self._call(problem, operands, plan, by_query)
        (query, key, value), narrow = arguments.inputs, layout.padded(narrow)
        inputs = (query, narrow, key, value) if by_query else (key, value, query, narrow)
        if sums == ("value",):
            inputs = key, query, narrow
        arguments = arguments._replace(inputs=inputs, vectors=vectors)
        return backward(call, sums, flags, arguments)

    def _call(self, problem: Problem, operands: Operands, plan, by_query: bool = True):
        """Makes the call of a kernel, and its arguments: queries, keys and values."""
        from jattn.implementations.gpu.call import Arguments, Call
        from jattn.implementations.gpu.machine import Machine
        from jattn.implementations.gpu.schedule import schedule

        pairs, read = layout.read(problem, operands)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), read)
        counts = operands.query_position is None
        machine = Machine(self.interpret)
        call = Call(problem, plan, pairs, shapes, by_query, counts, machine)
        blocks = (layout.BLOCK, plan.inner)
        kinds = _kinds(problem, operands, blocks if by_query else blocks[::-1])
        if not by_query:
            kinds = kinds.swapaxes(2, 3)
        sign, numbers = _numbers(problem, operands)
        query = operands.query * sign.astype(problem.dtype)
        inputs = tuple(map(layout.padded, (query, operands.key, operands.value)))
        extras = jax.tree.map(lambda x: layout.arrange(x, by_query), read)
        return call, Arguments(schedule(kinds), numbers, inputs, (), extras)


def _kinds(problem: Problem, operands: Operands, blocks: tuple[int, int]):
    """Gives the kind of each block; the last keys are partial if some are padding."""
    kinds = of_call.block_table(problem, operands, *blocks)
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    sizes = problem.sizes
    queries, keys = -(-sizes.T // blocks[0]), -(-sizes.S // blocks[1])
    kinds = xp.broadcast_to(kinds, (*kinds.shape[:2], queries, keys))
    if keys * blocks[1] != sizes.S:
        last = xp.arange(keys).reshape(1, 1, 1, -1) == keys - 1
        kinds = xp.where(last, xp.minimum(kinds, of_call.PARTIAL), kinds)
    return kinds


def _share_kernel(problem: Problem) -> bool:
    """Says whether the registers of one kernel hold both d_key and d_value.

    Each has 64 rows in 128 threads: half as many registers as a head has numbers.
    """
    return problem.sizes.H + problem.sizes.D <= 256


def _representable(problem: Problem, cotangents: Sums):
    """Scales cotangents that float16 would round to 0; gives also the inverse factor.

    The factor is a power of 2, so nothing else changes: backward is linear.
    """
    if problem.dtype != jnp.float16:
        return jnp.ones((), problem.wide), cotangents
    largest = jnp.max(jnp.abs(cotangents.output))
    known = (largest > 0) & jnp.isfinite(largest)
    power = jnp.ceil(jnp.log2(jnp.where(known, largest, 1)))
    return jnp.exp2(power), Sums(*(x * jnp.exp2(-power) for x in cotangents))


def _operands(problem: Problem, operands: Operands, results, flags, wanted) -> Operands:
    """Makes the cotangents of the operands from those that the kernels computed.

    A kernel gives Σₛ d_logitₛ kₛ for each query q, multiplied by the scale's sign only.
    From it
        d_q = scale · Σₛ d_logitₛ kₛ        d_scale = Σ q · Σₛ d_logitₛ kₛ
    """
    d_query, d_key, d_value, d_rows, d_columns = results
    sizes = problem.sizes
    heads = lambda x, size: jnp.sum(
        x[:, : sizes.S, :, :size].reshape(sizes.B, sizes.S, sizes.K, sizes.G, size), axis=3
    )
    d_query = d_query[:, : sizes.T, :, : sizes.H]
    finite = jnp.where(jnp.isfinite(operands.query), operands.query, 0)
    _, numbers = _numbers(problem, operands)
    d_modifier, d_bias = _read_cotangents(problem, operands, flags, (d_rows, d_columns))
    nothing = jax.tree.map(lambda _: None, wanted)
    return nothing._replace(
        query=d_query * operands.scale,
        key=heads(d_key, sizes.H) * numbers[0],
        value=heads(d_value, sizes.D) / (1 - problem.rate),
        scale=sum_all(d_query * finite.astype(problem.wide)),
        bias=d_bias,
        modifier=d_modifier,
    )


def _read_cotangents(problem: Problem, operands: Operands, flags, vectors):
    """Computes the cotangents of the operands that modifier and bias are made of."""
    d_rows, d_columns = map(iter, vectors)
    _, read = layout.read(problem, operands)
    found = []
    for like, flag in zip(*map(jax.tree.leaves, (read, flags)), strict=True):
        if flag and layout.form(like) == "column":
            found.append(next(d_columns))
        elif flag:
            cotangent = next(d_rows)  # padding has no weight, and so the cotangent 0
            number = layout.form(like) == "number"
            found.append(jnp.sum(cotangent, axis=2) if number else cotangent)
    return joint.read_cotangents(problem, operands, flags, found, layout.arrange)


def _numbers(problem: Problem, operands: Operands):
    """Computes the sign of the scale, and the factors of products, exponents and maxima.

    The sign multiplies the queries, so that the largest product is the largest logit. The
    size of the scale multiplies the products, or the exponents of a forward pass without
    modifier and bias. XLA removes the multiplication by a sign that it knows to be 1.
    """
    scale = operands.scale
    sign, size = jnp.sign(scale), jnp.where(scale == 0, 1, jnp.abs(scale))
    plain = problem.modifier is None and operands.bias is None
    exponent = size if plain else jnp.ones_like(size)
    return sign, jnp.stack([size, exponent * LOG2_E, exponent])
