"""cuDNN where it is the same function: what is refused, what is lowered, and the wiring.

No GPU is needed. That JAX finds cuDNN is pretended where something is lowered, and where
values matter a plain function stands in for the call of cuDNN.
"""

import functools
import importlib
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.call.pose import by_name, pose
from jattn.call.problem import asking_logsumexp
from jattn.implementations import cudnn
from jattn.masks import Causal, Lengths, Window

FORWARD, BACKWARD = "@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("
B, T, N, K, H = 2, 64, 4, 2, 8
KERNEL = cudnn.CuDNN()


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def refusal(
    query=(B, T, N, H), key=(B, T, K, H), value=None, dtype="bfloat16", **options
) -> str | None:
    """What cuDNN says of a call on a GPU."""
    arrays = [struct(*shape, dtype=dtype) for shape in (query, key, value or key)]
    found = jattn.explain(*arrays, platform="gpu", **options)
    assert (found.implementation == "cudnn") == (found.refusals["cudnn"] is None)
    return found.refusals["cudnn"]


@pytest.mark.parametrize(
    "mask",
    [
        None,
        Causal(),
        Window(5, 0),
        Window(5, 0) & Causal(),
        Causal() & Window(np.int64(5), 0),
        Window(1000, 0),
    ],
)
def test_takes_masks_that_it_has_words_for(mask):
    assert refusal(mask=mask) is None


def test_takes_other_lengths_without_a_mask_and_both_dtypes():
    assert refusal((B, 66, N, H), (B, 128, N, H), dtype="float16") is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float32"}, "takes bfloat16 and float16, got float32."),
        ({"bias": struct(T, T)}, "does not take a `bias`, which it rounds to the dtype"),
        ({"scale": 0.5}, "does not take a `scale`, which must be a number in its program"),
        ({"query_position": 3}, "does not take positions: its masks count queries and"),
        ({"key_position": jnp.arange(T)}, "does not take positions"),
        ({"sink": 0.0}, "does not take what needs the logsumexp, as `attention_state` and"),
        ({"modifier": jattn.modifiers.SoftCap(3.0)}, "has no words for a modifier."),
        ({"dropout": jattn.Dropout(0.5, jax.random.key(0))}, "draws other weights in"),
        ({"value": (B, T, K, 16)}, "needs values of the size of keys, got H=8 and D=16."),
        ({"query": (B, T, N, 12), "key": (B, T, K, 12)}, "multiples of 8 up to 128, got"),
        ({"query": (B, T, N, 136), "key": (B, T, K, 136)}, "up to 128, got H=136."),
        ({"query": (B, 65, N, H)}, "takes even T and S from 64, .* got T=65 and S=64."),
        ({"query": (B, 1, N, H)}, "takes even T and S from 64, .* got T=1 and S=64."),
        ({"key": (B, 62, K, H)}, "takes even T and S from 64, .* got T=64 and S=62."),
        ({"key": (B, 0, K, H)}, "needs at least one example, head, query and key."),
        ({"query": (0, T, N, H), "key": (0, T, K, H)}, "needs at least one example"),
        ({"mask": Causal(1)}, r"has words for `Causal\(\)` and `Window\(left, 0\)` only"),
        ({"mask": Causal(jnp.int32(0))}, "has words for"),
        ({"mask": Window(5, 1)}, "has words for"),
        ({"mask": ~Causal()}, "has words for"),
        ({"mask": Causal() & Window(5, 0) & Window(5, 0)}, "has words for"),
        ({"mask": Window(jnp.int32(5), 0)}, "left a Python number"),
        ({"mask": Lengths(jnp.array([3, 4]))}, "what a query without keys gets."),
        ({"mask": jnp.ones((T, T), bool)}, "has words for"),
        ({"mask": lambda b, n, t, s: (s < 3) | (t > 5)}, "has words for"),
        ({"mask": Causal(), "key": (B, 66, K, H)}, "takes masks for T = S, .* S=66."),
    ],
)
def test_refuses_in_a_sentence(options, sentence):
    said = refusal(**options) or ""
    assert re.search(sentence, said), said
    assert said.endswith(".")


def test_refuses_other_platforms_tables_precisions_and_symbols():
    arrays = [jnp.zeros((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]
    problem = by_name(pose("test", *arrays, mask=Causal())[0], Causal())
    assert KERNEL.refusal(problem, "gpu") is KERNEL.refusal(problem, "cuda") is None
    for platform in ("cpu", "tpu", "rocm"):
        said = f"runs on NVIDIA GPUs only, and the platform is {platform}."
        assert KERNEL.refusal(problem, platform) == said
    assert "needs the logsumexp" in KERNEL.refusal(asking_logsumexp(problem), "gpu")
    with jax.default_matmul_precision("highest"):
        problem, _ = pose("test", *arrays)
    assert "the precision of products is to be highest." in KERNEL.refusal(problem, "gpu")
    table = jattn.block_table(Causal(), *arrays[:2])
    problem, _ = pose("test", *arrays, mask=table)
    assert "give the mask itself." in KERNEL.refusal(problem, "gpu")
    (size,) = export.symbolic_shape("t")
    said = refusal((B, size, N, H), (B, size, K, H))
    assert said == "needs sizes that are numbers; these are symbols."


class Device:
    """As much of a GPU as is asked about."""

    def __init__(self, capability="9.0", platform="cuda 13000"):
        self.client = type("Client", (), {"platform_version": platform})
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        (Device(), "is not installed: `pip install jax[cuda13]`."),
        (Device("7.5"), "needs compute capability 8.0, and has 7.5."),
        (Device(platform="rocm 7"), "runs on NVIDIA GPUs only, and this one is not."),
    ],
)
def test_refuses_a_device_that_cannot(device, sentence, monkeypatch):
    arrays = [jnp.zeros((B, T, heads, H), jnp.bfloat16) for heads in (N, K, K)]
    problem, _ = pose("test", *arrays)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(cudnn, "is_installed", lambda: False)
    assert KERNEL.refusal(problem, "gpu") == sentence
    monkeypatch.setattr(cudnn, "is_installed", lambda: True)
    assert (KERNEL.refusal(problem, "gpu") is None) == ("installed" in sentence)


def test_named_where_it_cannot_run_raises():
    query = jnp.zeros((T, 1, H), jnp.bfloat16)
    with pytest.raises(ValueError, match=r'"cudnn"\): runs on NVIDIA GPUs only, and the'):
        jattn.attention(query, query, query, implementation="cudnn")


def test_explain_refuses_a_platform_that_is_none():
    query = struct(T, 1, H)
    with pytest.raises(ValueError, match='explain: `platform` must be "cpu", "gpu" or'):
        jattn.explain(query, query, query, platform="H100")


# ---- lowered ----


@pytest.fixture
def found(monkeypatch):
    """JAX finds cuDNN."""
    private = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    cudnn.is_installed.cache_clear()
    assert cudnn.is_installed()
    yield
    cudnn.is_installed.cache_clear()


def attend(query, key, value, mask=None, **options):
    return jattn.attention(query, key, value, mask=mask, **options)


def gradients(mask=None, **options):
    def total(*arrays):
        return jnp.sum(attend(*arrays, mask=mask, **options).astype(jnp.float32))

    return jax.grad(total, (0, 1, 2))


STRUCTS = struct(B, T, N, H), struct(B, T, K, H), struct(B, T, K, H)


def lowered(function, *arguments, platform="cuda"):
    traced = jax.jit(function).trace(*(arguments or STRUCTS))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    return text.count(FORWARD), text.count(BACKWARD)


def test_lowers_to_cudnn_on_cuda_alone(found):
    text = lowered(attend)
    assert calls(text) == (1, 0)
    assert "mask_type\\22: \\22NO_MASK" in text
    text = lowered(functools.partial(attend, mask=Window(5, 0)))
    assert calls(text) == (1, 0)
    assert "mask_type\\22: \\22CAUSAL" in text
    assert "sliding_window_length\\22: 6" in text  # the first key that is not seen
    assert calls(lowered(attend, platform="cpu")) == (0, 0)
    assert calls(lowered(functools.partial(attend, sink=0.0))) == (0, 0)


def test_lowers_gradients_to_cudnn_and_tangents_to_blockwise(found):
    gradient = gradients(Causal())
    assert calls(lowered(gradient)) == (2, 1)

    def tangent(*arrays):
        return jax.jvp(functools.partial(attend, mask=Causal()), arrays, arrays)[1]

    text = lowered(tangent)
    assert calls(text) == (1, 0)  # of the output, which nobody asked for here
    assert "stablehlo.dot_general" in text


def test_examples_of_a_vmap_join_the_batch(found):
    vmapped = jax.vmap(attend, (0, None, 0))
    text = lowered(vmapped, struct(3, B, T, N, H), STRUCTS[1], struct(3, B, T, K, H))
    assert calls(text) == (1, 0)
    assert f"tensor<{3 * B}x{T}x{N}x{H}xbf16>" in text


def test_is_blockwise_where_cudnn_is_not_found(monkeypatch):
    monkeypatch.setattr(cudnn, "is_installed", lambda: False)
    assert calls(lowered(lambda *arrays: attend(*arrays))) == (0, 0)


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
def test_exports_without_calls_that_jax_does_not_keep(platforms, found):
    exported = export.export(jax.jit(attend), platforms=platforms)(*STRUCTS)
    assert calls(exported.mlir_module()) == (0, 0)
    assert export.deserialize(exported.serialize()).platforms == platforms


def test_each_device_of_a_shard_map_runs_cudnn(found):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("x"))
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in STRUCTS]
    assert calls(lowered(attend, *arrays)) == (0, 0)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert calls(lowered(mapped, *arrays)) == (1, 0)


# ---- values, with a plain implementation in cuDNN's place ----


def inputs():
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
    return [draw(x) for x in STRUCTS]


def plain(query, key, value, is_causal=False, local_window_size=(T, 0)):
    """What `jax.nn.dot_product_attention` gives, with the logsumexp rounded as it does."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
    if is_causal:
        before = np.subtract.outer(np.arange(T), np.arange(T))
        seen = (before >= 0) & (before <= local_window_size[0])
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    output = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)
    return output.astype(jnp.bfloat16), jnp.swapaxes(logsumexp, 1, 2).astype(jnp.bfloat16)


def close(got, want):
    """Equal to a few roundings of bfloat16, NaN where NaN is."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(
            a, b, atol=2**-6 * max(1, np.max(np.nan_to_num(np.abs(b))))
        )


def test_words_mean_the_mask_in_jax_nn():
    masks = Causal(), Window(5, 0), Causal() & Window(9, 0)

    @jax.jit
    def compared(*arrays):
        results = []
        for mask in masks:
            words = cudnn._words(by_name(pose("test", *arrays, mask=mask)[0], mask))
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                theirs = jax.nn.dot_product_attention(
                    *arrays, implementation="xla", **words
                )
            ours = attend(*arrays, mask=mask)
            results.append((theirs, plain(*arrays, **words)[0], ours))
        return results

    for theirs, stand_in, ours in compared(*inputs()):
        close(theirs, ours)
        close(stand_in, ours)


@pytest.fixture
def emulated(monkeypatch, found):
    """Its operation runs on the CPU, and notes what it calls cuDNN with."""
    called = []

    def call(query, key, value, **words):
        called.append(words)
        return plain(query, key, value, **words)

    monkeypatch.setattr(cudnn, "_call", call)
    monkeypatch.setattr(cudnn, "PLATFORMS", (*cudnn.PLATFORMS, "cpu"))
    jax.clear_caches()
    yield called
    jax.clear_caches()


def test_values_and_derivatives_are_those_of_blockwise(emulated):
    mask = Window(5, 0)

    def everything(implementation):
        function = functools.partial(attend, mask=mask, implementation=implementation)
        gradient = gradients(mask, implementation=implementation)

        def all_of_them(*arrays):
            return [jax.jvp(f, arrays, arrays) for f in (function, gradient)]

        return jax.jit(all_of_them)(*inputs())

    close(everything(None), everything("dense"))
    words = {"is_causal": True, "local_window_size": (5, 0)}
    assert emulated
    assert all(found == words for found in emulated)


def test_what_is_masked_out_touches_nothing_under_vmap(emulated):
    query, key, value = inputs()
    key, value = key.at[:, -1].set(jnp.inf), value.at[:, -1].set(jnp.nan)
    queries = jnp.stack([query, -query])

    def gradient(query, implementation=None):
        def total(query, key, value):
            output = attend(query, key, value, Causal(), implementation=implementation)
            return jnp.sum(output[:, :-1].astype(jnp.float32)), output

        return jax.grad(total, (0, 1, 2), has_aux=True)(query, key, value)

    @jax.jit
    def both(queries):
        expected = [gradient(query, "blockwise") for query in queries]
        return jax.vmap(gradient)(queries), jax.tree.map(lambda *x: jnp.stack(x), *expected)

    (got, output), expected = both(queries)
    assert emulated
    close((got, output), expected)
    for x in (output, got[0]):  # and in that of the queries which do not see the last key
        assert np.all(np.isfinite(x[:, :, :-1].astype(np.float32)))


def test_bench_says_what_to_install(monkeypatch, capsys):
    from bench import gpu

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.main([]) == 1
    assert f"jax-cuda13-plugin=={jax.__version__}" in capsys.readouterr().err
