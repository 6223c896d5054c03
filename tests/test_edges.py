"""Numbers at the edges of what public functions take, each refused in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jattn
from jattn import caches, page, plot
from jattn.masks import Causal

SHAPE = jax.ShapeDtypeStruct((8, 1, 4), "float32")
TABLE = jattn.block_table(Causal(), SHAPE, SHAPE, block=2)


def tokens_with(dropout):
    kv = caches.paged(2, 2, 1, 4, batch_size=2, max_pages=1)
    kv = kv.append(*2 * [jnp.ones((2, 1, 1, 4))])
    return kv.attend_tokens(jnp.ones((1, 1, 4)), [0], [0], dropout=dropout)


REFUSALS = {
    "balanced: `mask` is a block table": lambda: jattn.balanced(16, 2, TABLE, 2),
    "`block` be at least 1": lambda: jattn.balanced(8, 2, Causal(), 0),
    "all whole numbers": lambda: jattn.balanced(8, 2.0),
    "above 0 and below 2³¹": lambda: jattn.block_table(Causal(), SHAPE, SHAPE, block=2**31),
    "`megabytes` must be a number above 0": lambda: page.weights(
        *2 * [jnp.ones((2, 1, 4))], megabytes=float("nan")
    ),
    "must be shared": lambda: tokens_with(jattn.Dropout(0.5, jax.random.key(0))),
}

MESH = jax.make_mesh((2,), ("x",))
STATE = jattn.State(jnp.ones((1, 1, 4)), jnp.ones((1, 1)))


def merged(state, axis):
    merge = lambda state: jattn.merge_over(state, axis)
    return jax.shard_map(merge, mesh=MESH, in_specs=P(), out_specs=P())(state)


REFUSALS |= {
    "`axis` must be the name of a mesh axis, or several": lambda: jattn.Context(5),
    "`batch` must be the name of a mesh axis": lambda: jattn.Context("x", batch=("y", 3)),
    "`mesh` must be a jax.sharding.Mesh": lambda: jattn.Context("x", mesh="x"),
    "`state` must be a `jattn.State`": lambda: merged(STATE.output, "x"),
    "`axis` must name a mesh axis of": lambda: merged(STATE, "y"),
    "a mesh axis .* got 0": lambda: merged(STATE, 0),
    "got 'x'; call it inside one": lambda: jattn.merge_over(STATE, "x"),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_it_is_refused_in_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSALS[sentence]()


def test_what_is_shared_or_names_itself_is_taken():
    tokens_with(jattn.Dropout(0.5, jax.random.key(0), shared=True))
    assert page.received([2.0, 0.5], title=7).title == "7"
    assert plot.entropy([[1.0]], title=7).get_suptitle() == "7"
    assert jattn.balanced(8, 2, TABLE, 2).shape == (8,)
    assert jattn.Context(["x", "y"]) == jattn.Context(("x", "y"))
    np.testing.assert_allclose(merged(STATE, ("x",)).output, STATE.output)


@pytest.mark.parametrize("implementation", ["dense", "blockwise", None])
@pytest.mark.parametrize("sizes", [(1, 0, 3), (1, 3, 0), (0, 3, 3), (1, 0, 0)])
def test_nothing_is_masked(sizes, implementation):
    """No batch, no queries or no keys, with a mask, and their gradients."""
    B, T, S = sizes
    inputs = [jnp.ones((B, L, n, 4)) for L, n in ((T, 2), (S, 1), (S, 1))]
    options = {"mask": lambda b, n, t, s: t >= s, "implementation": implementation}
    loss = lambda inputs: jnp.sum(jattn.attention(*inputs, **options))
    assert not np.any(jattn.attention(*inputs, **options))
    for gradient, x in zip(jax.grad(loss)(inputs), inputs, strict=True):
        assert gradient.shape == x.shape
