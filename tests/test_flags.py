"""What is True or False is nothing else: a text such as "no" would count as true."""

import os

os.environ["KERAS_BACKEND"] = "jax"  # before keras is first imported

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn import caches, modifiers, page
from jattn.adapters.jax_nn import dot_product_attention

X = jnp.ones((1, 3, 2, 4))
RNG = jax.random.key(0)
PAGE = page.mask(jattn.masks.Causal(), 3)


def view(function, *more):
    return lambda flag: function(X, X, *more, average=flag)


def saved(flag):
    PAGE.save("/nowhere/at/all.html", replace=flag)


FLAGS = {
    "shared": lambda flag: jattn.Dropout(0.5, RNG, flag),
    "ragged": lambda flag: caches.empty(1, 4, 2, 4, ragged=flag),
    "ragged (rolling)": lambda flag: caches.rolling(1, 4, 2, 4, ragged=flag),
    "ragged (latent)": lambda flag: caches.latent(1, 4, 2, 4, ragged=flag),
    "average": view(jattn.attention_entropy),
    "average (received)": view(jattn.attention_received),
    "average (strongest)": view(jattn.strongest_keys, 2),
    "bidirectional": lambda flag: modifiers.log_bucket(8, 16, flag),
    "replace": saved,
    "is_causal": lambda flag: dot_product_attention(X, X, X, is_causal=flag),
    "return_residual": lambda flag: dot_product_attention(X, X, X, return_residual=flag),
}
WRONG = ["no", "", 0, 1, 1.0, None, [], [True], np.ones(2, bool), np.int8(1)]


@pytest.mark.parametrize("name", FLAGS)
def test_what_is_no_flag_is_refused(name):
    name, call = name.partition(" ")[0], FLAGS[name]
    for wrong in WRONG:
        with pytest.raises(ValueError, match=f": `{name}` must be True or False.*, got"):
            call(wrong)
    with pytest.raises(ValueError, match=f"`{name}` must be .* got a traced array"):
        jax.jit(lambda flag: call(flag) and None)(True)


@pytest.mark.filterwarnings("ignore:.*average=True:DeprecationWarning")
@pytest.mark.parametrize("name", [name for name in FLAGS if name != "replace"])
def test_flags_of_numpy_and_jax_are_flags(name):
    for flag in (True, False):
        want = FLAGS[name](flag)
        for other in (np.bool_(flag), np.array(flag), jnp.asarray(flag)):
            same = FLAGS[name](other)
            shapes = lambda x: [np.shape(leaf) for leaf in jax.tree.leaves(x)]
            assert shapes(same) == shapes(want)
            assert not hasattr(same, "shared") or same.shared is flag


def refuses(name, call):
    with pytest.raises(ValueError, match=f"`{name}` must be True or False.*, got 'no'"):
        call("no")


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_flags_of_flax(kind):
    pytest.importorskip("flax")
    adapter = pytest.importorskip(f"jattn.adapters.{kind}")
    names = ["broadcast_dropout", "deterministic"]
    names += ["is_causal"] if kind == "nnx" else ["force_fp32_for_softmax"]
    for name in names:
        refuses(name, lambda flag, name=name: adapter.attention(X, X, X, **{name: flag}))
    x = X[..., 0]
    if kind == "linen":
        make = lambda flag: adapter.MultiHeadDotProductAttention(2, decode=flag)
        refuses("decode", lambda flag: make(flag).init(RNG, x))
        return
    layer = adapter.MultiHeadAttention(2, 2, rngs=pytest.importorskip("flax.nnx").Rngs(0))
    refuses("decode", lambda flag: layer(x, decode=flag))
    refuses("ragged", lambda flag: layer.init_cache((1, 4, 2), ragged=flag))


def test_flags_of_equinox():
    pytest.importorskip("equinox")
    from jattn.adapters.equinox import MultiheadAttention

    layer, x = MultiheadAttention(2, 4, key=RNG), X[0, :, 0]
    for name in ("inference", "deterministic"):
        call = lambda flag, name=name: layer(x, x, x, **{name: flag})
        refuses("inference", call)  # which is the name of both
    refuses("ragged", lambda flag: layer.empty(4, ragged=flag))


def test_flags_of_keras():
    pytest.importorskip("keras")
    from jattn.adapters.keras import MultiHeadAttention

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        layer, x = MultiHeadAttention(2, 4, dropout=0.5), X[..., 0]
        layer(x, x)
        for name in ("use_causal_mask", "return_attention_scores", "training"):
            refuses(name, lambda flag, name=name: layer(x, x, **{name: flag}))
        refuses("ragged", lambda flag: layer.empty(1, 4, ragged=flag))
