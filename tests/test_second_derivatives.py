"""Derivatives of derivatives: finite where logits differ much, and as exact as `dense`'s.

The judge is the definition in float64. In a test of exactness all keys move together, so
all logits of a row do, and the weights hardly change. That tells whether a weight's tangent
is one small number, or the difference of two large ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import definition
from jattn.masks import Causal
from tests.helpers.calls import by_blocks

T, N, H = 128, 2, 8
MASK = Causal()


ATTEND = {
    "tiles": functools.partial(by_blocks, (12, 8)),
    "cut": functools.partial(by_blocks, (16, 16)),
    "whole": functools.partial(by_blocks, (T, T)),
    "dense": functools.partial(jattn.attention_state, implementation="dense"),
    "definition": definition.attention_state,
}


def loss_of(attend, cotangents):
    def loss(inputs):
        state = attend(*inputs, mask=MASK)
        output, logsumexp = cotangents
        return jnp.sum(state.output * output) + jnp.sum(state.logsumexp * logsumexp)

    return loss


def along(function, direction):
    """The derivative of a function along a direction, as a function."""
    return lambda x: jax.jvp(function, (x,), (direction,))[1]


def inner(x, y):
    return sum(map(jnp.vdot, x, y))


WAYS = {
    "jvp of jvp": lambda f, d: along(along(f, d), d),
    "jvp of grad": lambda f, d: along(jax.grad(f), d),
    "grad of grad": lambda f, d: jax.grad(lambda x: inner(jax.grad(f)(x), d)),
    "jvp of jvp of grad": lambda f, d: along(along(jax.grad(f), d), d),
}


@functools.cache
def compiled(which, way):
    def derived(inputs, direction, cotangents):
        loss = loss_of(ATTEND[which], cotangents)
        return jax.tree.leaves(WAYS[way](loss, direction)(inputs))

    return jax.jit(derived)


def given(seed, size, shift):
    """Inputs with logits of about `size`, a direction, and cotangents."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    inputs, direction = (
        (draw(1, T, N, H), draw(1, T, 1, H), draw(1, T, 1, H)) for _ in range(2)
    )
    query, *keys = inputs
    d_query, d_key, d_value = direction
    together = shift * draw(1, 1, 1, H)
    cotangents = draw(1, T, N, H), draw(1, T, N)
    return (size * query, *keys), (d_query, d_key + together, d_value), cotangents


def exact(way, arguments):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), "float64"), arguments)
        return [np.asarray(x) for x in compiled("definition", way)(*wide)]


def errors(which, way, arguments, want):
    got = compiled(which, way)(*arguments)
    return np.array([np.linalg.norm(x - y) for x, y in zip(got, want, strict=True)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["tiles", "cut"])
def test_logits_that_differ_much_leave_all_derivatives_right(which, way):
    arguments = given(0, 40.0, 0.0)  # the first tiles of a row weigh less than 1e-30
    want = exact(way, arguments)
    near = errors("dense", way, arguments, want)
    sizes = np.array([np.linalg.norm(x) for x in want])
    # A logit of 100 is rounded by 4e-6, and each derivative has it once more as a factor.
    allowed = 3 * near + 1e-4 * sizes
    assert np.all(errors(which, way, arguments, want) <= allowed)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jvp of jvp", "jvp of grad", "grad of grad"])
@pytest.mark.parametrize("which", ["cut", "whole"])
def test_second_derivatives_are_as_exact_as_dense(which, way):
    found, near = [], []
    for seed in range(8):
        arguments = given(seed, 1.0, 30.0)
        want = exact(way, arguments)
        found.append(errors(which, way, arguments, want))
        near.append(errors("dense", way, arguments, want))
    mean = lambda x: np.sqrt(np.mean(np.square(x), axis=0))
    assert np.all(mean(found) <= 1.5 * mean(near)), (mean(found), mean(near))


ONE_HOT = {
    "blockwise": functools.partial(jattn.attention_state, implementation="blockwise"),
    "small tiles": functools.partial(by_blocks, (16, 32)),
    "tiles": functools.partial(by_blocks, (12, 8)),
}


@pytest.mark.parametrize("way", ["jvp of jvp", "jvp of grad", "grad of grad"])
@pytest.mark.parametrize("which", ONE_HOT)
@pytest.mark.parametrize("sizes", [(17, 17, 8, 8), (40, 70, 16, 4), (4, 40, 8, 8)])
def test_a_key_with_all_the_weight_leaves_no_second_derivative(sizes, which, way):
    """The tangent of its logit and the mean of all tangents are the same, to the bit."""
    rows, keys, head_dim, value_dim = sizes
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    shapes = (1, rows, 2, head_dim), (1, keys, 1, head_dim), (1, keys, 1, value_dim)
    (query, key, value), direction = ([draw(*x) for x in shapes] for _ in range(2))
    loss = lambda inputs: jnp.sum(ONE_HOT[which](*inputs).output * cotangent)
    inputs, cotangent = (1e5 * query, key, value), draw(1, rows, 2, value_dim)

    logits = np.sort(jattn.attention_logits(*inputs[:2]))
    assert np.min(logits[..., -1] - logits[..., -2]) > 110  # then the others weigh 0
    found = jax.jit(WAYS[way](loss, tuple(direction)))(inputs)
    assert not any(np.any(x) for x in jax.tree.leaves(found))
