"""Derivatives are as exact as those of `dense`, from logits of 1 to logits of 1e8.

An error is the largest difference from the definition in float64: for one seed, and of
several seeds the median or the largest, for where two logits are nearly equal one row
decides, and luck decides in that row. It may be 1.5 times that of `dense`. Where `dense`
is exact by luck, or because it happens to sum in the better order, there is a floor: what
moving the inputs by a rounding of float32 changes, and two units in the last place of the
largest number, as in `jattn.testing`.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.masks import Causal
from tests.helpers import emulated_tpu
from tests.helpers.calls import by_blocks
from tests.helpers.draws import normal

pytestmark = pytest.mark.slow

LOGITS = (1.0, 18.0, 1e2, 1e4, 1e6, 1e8)
SEEDS = 7


@dataclasses.dataclass(frozen=True)
class Call:
    """Some queries on some keys, in tiles, with options."""

    T: int
    S: int
    options: str
    tile: tuple[int, int] | str
    H: int = 16

    N, K, D = 4, 2, 8

    def inputs(self, seed, size, dtype):
        """Inputs whose logits are about `size`."""
        rng = np.random.default_rng(seed)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
        inputs = {
            "query": normal(1, self.T, self.N, self.H) * jnp.asarray(size, dtype),
            "key": normal(1, self.S, self.K, self.H),
            "value": normal(1, self.S, self.K, self.D),
        }
        if self.options == "everything":
            wide = lambda *shape: jnp.asarray(rng.standard_normal(shape), "float32")
            inputs["bias"] = wide(1, self.N, 1, self.S)
            inputs["sink"] = wide(self.N) * size
            inputs["scale"] = jnp.float32(0.3)
            inputs["gain"] = 1 + jnp.abs(wide(self.N))
        return inputs

    def state(self, function, inputs):
        """The state by a function of the signature of `attention_state`."""
        options = dict(inputs)
        arrays = [options.pop(x) for x in ("query", "key", "value")]
        if self.options == "causal":
            options["mask"] = Causal(3)
        if "gain" in options:
            gain = options.pop("gain")
            options["modifier"] = lambda x, b, n, t, s: x * gain[n].astype(x.dtype)
        return function(*arrays, **options)


@functools.cache
def derivatives(call: Call, which: str):
    """A compiled function to all derivatives of a call, by name, by one implementation."""
    function = {
        "definition": definition.attention_state,
        "dense": functools.partial(jattn.attention_state, implementation="dense"),
        "kernels": emulated_tpu.attention_state,
        "blockwise": functools.partial(by_blocks, call.tile),
    }[which]

    @jax.jit
    def derived(inputs, cotangent, tangents):
        def state(inputs):
            output, logsumexp = call.state(function, inputs)
            return output, jnp.where(logsumexp == -jnp.inf, 0, logsumexp)

        (output, logsumexp), pull = jax.vjp(state, inputs)
        cotangent = cotangent.astype(output.dtype)
        of_output, of_both = (
            pull((cotangent, jnp.full_like(logsumexp, x)))[0] for x in (0, 0.5)
        )
        pushed = jax.jvp(state, (inputs,), (tangents,))[1]
        named = {f"d_{name}": x for name, x in of_output.items()}
        named |= {f"d_{name} of both": x for name, x in of_both.items()}
        return named | {"d_output": pushed[0], "d_logsumexp": pushed[1]}

    return derived


def move(rng, x):
    """The array, each number moved up or down by a rounding of float32."""
    eps = float(jnp.finfo("float32").eps)
    return x * (1 + eps * rng.choice([-1.0, 1.0], x.shape))


def as_float64(x):
    return jnp.asarray(np.asarray(x).astype(np.float64))


@functools.cache
def expected(call: Call, size: float, dtype: str):
    """The derivatives in float64 for each seed, and the error that is allowed, by name."""
    call = dataclasses.replace(call, tile="any")
    exact, near, moved, kinds = [], {}, {}, {}
    for seed in range(SEEDS):
        arguments = given(call, seed, size, dtype)
        rng = np.random.default_rng(seed)
        with jax.enable_x64(True):
            wide = jax.tree.map(as_float64, arguments)
            exact.append(derivatives(call, "definition")(*wide))
            there = jax.tree.map(functools.partial(move, rng), wide)
            add_errors(moved, derivatives(call, "definition")(*there), exact[-1])
        got = derivatives(call, "dense")(*arguments)
        kinds = {name: x.dtype for name, x in got.items()}
        add_errors(near, got, exact[-1])
    allowed = {}
    for name in near:
        eps = float(jnp.finfo(kinds[name]).eps)
        sizes = [np.max(np.abs(x[name])) for x in exact]
        allowed[name] = [
            1.5 * max(over(near[name]), over(moved[name])) + 2 * eps * over(sizes)
            for over in (np.median, np.max)
        ]
    return exact, allowed


def given(call, seed, size, dtype):
    """Inputs, the cotangent of the output, and tangents."""
    inputs = call.inputs(seed, size, dtype)
    rng = np.random.default_rng(seed + 100)
    like = lambda x, dtype: jnp.asarray(rng.standard_normal(x), dtype)
    cotangent = like((1, call.T, call.N, call.D), dtype)
    return inputs, cotangent, {k: like(x.shape, x.dtype) for k, x in inputs.items()}


def add_errors(errors, got, exact):
    for name, x in exact.items():
        error = np.max(np.abs(np.asarray(got[name]).astype(np.float64) - np.asarray(x)))
        errors.setdefault(name, []).append(float(error))


def assert_as_exact_as_dense(call: Call, which: str, size: float, dtype: str):
    exact, allowed = expected(call, size, dtype)
    errors = {}
    for seed in range(SEEDS):
        got = derivatives(call, which)(*given(call, seed, size, dtype))
        add_errors(errors, got, exact[seed])
    for name, found in errors.items():
        budget = 1.0
        if which == "kernels" and call.options == "everything":
            # A kernel has δ from the output alone, and sums over all pairs show it; that
            # of the scale, one number, the most.
            budget = 4.0 if "scale" in name else 2.0
        errors = np.median(found), np.max(found)
        holds = [x <= budget * y for x, y in zip(errors, allowed[name], strict=True)]
        assert any(holds), (name, errors, allowed[name])


# Rows and columns of tiles are no multiples of what a processor computes at once.
FEW, MANY = (21, 90, (21, 40)), (90, 21, (40, 21))
SHAPES = {"few on many": FEW, "many on few": MANY, "tiny tiles": (9, 14, (4, 4))}


# The calls of one program go to one process, which compiles it once for all sizes.
PROGRAMS = [
    pytest.param(*x, id="-".join(x), marks=pytest.mark.xdist_group(f"exactness {x}"))
    for x in itertools.product(
        SHAPES, ["plain", "causal", "everything"], ["float32", "bfloat16"]
    )
]


@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize(("shape", "options", "dtype"), PROGRAMS)
def test_blockwise_is_as_exact_as_dense(shape, options, dtype, size):
    T, S, tile = SHAPES[shape]
    assert_as_exact_as_dense(Call(T, S, options, tile), "blockwise", size, dtype)


@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize("options", ["plain", "causal", "everything"])
@pytest.mark.parametrize("shape", ["few on many", "tiny tiles"])
def test_heads_of_one_number_are_as_exact_as_dense(shape, options, size):
    T, S, tile = SHAPES[shape]
    call = Call(T, S, options, tile, H=1)
    assert_as_exact_as_dense(call, "blockwise", size, "float32")


# In bfloat16 weights are rounded to it, for the matrix unit: gradients that are not, of a
# float32 bias for example, show it.
@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize(
    ("options", "dtype"),
    [("causal", "float32"), ("causal", "bfloat16"), ("everything", "float32")],
)
def test_kernels_are_as_exact_as_dense(options, dtype, size):
    assert_as_exact_as_dense(Call(21, 140, options, "any"), "kernels", size, dtype)


@pytest.mark.parametrize("size", [1e4, 1e7, 1e8])
@pytest.mark.parametrize(("T", "S"), [(40, 2500), (2500, 40), (3, 700)])
def test_values_have_the_gradient_of_dense_at_any_size_of_logits(T, S, size):
    query, key, value = (normal(i, (1, n, 1, 8)) for i, n in enumerate((T, S, S)))

    def gradient(implementation):
        attend = functools.partial(jattn.attention, implementation=implementation)
        return jax.grad(lambda v: jnp.sum(attend(query * size, key, v) ** 2))(value)

    got, want = gradient("blockwise"), gradient("dense")
    # Logits of 1e4 are rounded, in either: by up to a thousandth.
    near = (1e-3 if size == 1e4 else 2e-6) * np.max(np.abs(want))
    np.testing.assert_allclose(got, want, atol=near, rtol=0)


@pytest.mark.parametrize("tile", [(16, 16), (37, 64)])
@pytest.mark.parametrize("S", [5, 33, 64])
def test_no_weight_is_above_one(S, tile):
    query = 1e8 * normal(0, (1, 37, 1, 8))
    key = normal(1, (1, S, 1, 8))
    output = lambda v: by_blocks(tile, query, key, v).output
    _, pull = jax.vjp(output, jnp.ones((1, S, 1, 1)))
    (received,) = pull(jnp.ones((1, 37, 1, 1)))  # by each key; by all, one of each query
    assert float(jnp.sum(received)) == pytest.approx(37, abs=1e-4)


MODIFIERS = {
    "square root": lambda x, a, t, s: a * jnp.sqrt(x),
    "power": lambda x, a, t, s: a * x**0.5,
    "logarithm": lambda x, a, t, s: a * jnp.log(x),
    "reciprocal": lambda x, a, t, s: a / x,
    "by distance": lambda x, a, t, s: a + x / (t - s).astype(x.dtype),
}
ATTEND = {
    "definition": definition.attention_state,
    "dense": functools.partial(jattn.attention_state, implementation="dense"),
    "blockwise": functools.partial(by_blocks, (4, 4)),
    "kernels": emulated_tpu.attention_state,
}


@pytest.mark.parametrize("name", MODIFIERS)
@pytest.mark.parametrize("which", ATTEND)
def test_infinite_derivatives_of_modifiers_at_masked_pairs_touch_nothing(which, name):
    modify, attend = MODIFIERS[name], ATTEND[which]
    query, key, value = jnp.abs(normal(0, (3, 1, 9, 2, 8)))
    key = key.at[:, -1].set(0)  # which no query sees

    def output(query, key, value, gain):
        modifier = lambda x, b, n, t, s: modify(x, gain[n].astype(x.dtype), t, s)
        mask = lambda b, n, t, s: t > s
        return attend(query, key, value, mask=mask, modifier=modifier).output

    inputs = query, key, value, jnp.array([0.5, 1.5])

    @jax.jit
    def derived(*inputs):
        loss = lambda *xs: jnp.sum(output(*xs) ** 2)
        gradients = jax.grad(loss, (0, 1, 2, 3))
        found = gradients(*inputs), jax.jvp(output, inputs, inputs)[1]
        if which == "kernels":  # whose second derivatives are those of blockwise
            return found
        return *found, jax.grad(lambda *xs: jnp.sum(gradients(*xs)[0] ** 2))(*inputs)

    for x in jax.tree.leaves(derived(*inputs)):
        assert np.all(np.isfinite(x))
