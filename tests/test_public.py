"""The public surface, frozen."""

import importlib
import inspect
import subprocess
import sys

import jax
import pytest

import jattn

PUBLIC = {
    "jattn": {
        *("EMPTY", "Dropout", "Explanation", "State", "attention", "attention_logits"),
        *(
            "attention_state",
            "attention_weights",
            "BlockTable",
            "block_table",
            "definition",
            "explain",
        ),
        *("caches", "masks", "merge", "modifiers"),
        *("StrongestKeys", "attention_entropy", "attention_received", "strongest_keys"),
    },
    "jattn.masks": {
        *("Causal", "Explicit", "Lengths", "Mask", "Pointwise", "Prefix", "Segments"),
        *("Window", "as_mask"),
    },
    "jattn.modifiers": {
        *("ALiBi", "Bias", "Modifier", "Pointwise", "RelativeBias", "SoftCap"),
        *("alibi_slopes", "as_modifier", "distance", "log_bucket"),
    },
    "jattn.caches": {
        *("Cache", "LatentCache", "PagedCache", "RollingCache"),
        *("empty", "latent", "paged", "rolling"),
    },
    "jattn.adapters.jax_nn": {"dot_product_attention"},
    "jattn.adapters.nnx": {"attention"},
    "jattn.adapters.linen": {"attention"},
    "jattn.adapters.equinox": {"MultiheadAttention"},
    "jattn.adapters.haiku": {"MultiHeadAttention"},
    "jattn.testing": {
        *("CASES", "Case", "assert_matches_definition", "check_gradients"),
        *("derivatives", "errors", "random_inputs"),
    },
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_these(module):
    assert set(pytest.importorskip(module).__all__) == PUBLIC[module]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_function_and_class_says_what_it_is(module):
    module = pytest.importorskip(module)
    for name in module.__all__:
        assert (getattr(module, name).__doc__ or "").strip(), name


def test_attention_and_attention_state_take_the_same_arguments():
    signature = inspect.signature(jattn.attention).parameters
    assert signature.keys() == inspect.signature(jattn.attention_state).parameters.keys()
    expected = "query key value mask bias modifier sink scale query_position key_position"
    assert list(signature) == [*expected.split(), "dropout", "implementation"]


def test_definition_takes_the_options_of_attention():
    options = set(inspect.signature(jattn.definition._attend_all).parameters)
    public = set(inspect.signature(jattn.attention).parameters)
    assert options == public - {"implementation"}


def test_import_starts_no_backend_and_loads_no_extra():
    code = (
        "import sys, jattn, jax; from jax.extend import backend; "
        "extras = {'matplotlib', 'flax', 'equinox', 'haiku', 'keras', 'hypothesis'}; "
        "assert not extras & set(sys.modules); "
        "jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_package_is_typed():
    assert (importlib.resources.files("jattn") / "py.typed").is_file()


def test_version_is_the_installed_one():
    assert jattn.__version__ == importlib.metadata.version("jattn")


def test_explain_names_the_implementation_and_the_cost():
    struct = jax.ShapeDtypeStruct((2, 128, 8, 64), "bfloat16")
    found = jattn.explain(struct, struct, struct, mask=jattn.masks.Causal())
    assert found.implementation in jattn.dispatch.IMPLEMENTATIONS
    assert found.flops == 2 * 2 * 8 * 128 * 128 * (64 + 64)
    assert found.logits_bytes == 4 * 2 * 8 * 128 * 128
    assert found.bytes_moved == 2 * 4 * 2 * 128 * 8 * 64
    assert "B=2 T=128 S=128 N=8 K=8 H=64 D=64, bfloat16" in str(found)


def test_explain_takes_shapes_inside_masks_and_modifiers():
    struct = jax.ShapeDtypeStruct((4, 2, 8), "float32")
    ids = jax.ShapeDtypeStruct((4,), "int32")
    slopes = jax.ShapeDtypeStruct((2,), "float32")
    jattn.explain(
        struct,
        struct,
        struct,
        mask=jattn.masks.Segments(ids),
        modifier=jattn.modifiers.ALiBi(slopes),
        bias=jax.ShapeDtypeStruct((4, 4), "float32"),
    )


def test_explain_refuses_what_attention_refuses():
    struct = jax.ShapeDtypeStruct((4, 2, 8), "int32")
    with pytest.raises(ValueError, match="explain: `query` must have one of the dtypes"):
        jattn.explain(struct, struct, struct)


def test_refusal_of_a_named_implementation_is_raised(monkeypatch):
    dense = jattn.dispatch.IMPLEMENTATIONS["dense"]
    monkeypatch.setattr(dense, "refusal", lambda problem, platform: "it is too hot.")
    query = jax.numpy.zeros((2, 1, 2))
    with pytest.raises(
        ValueError, match=r'attention\(implementation="dense"\): it is too hot.'
    ):
        jattn.attention(query, query, query, implementation="dense")
