"""The public surface, frozen."""

import importlib
import inspect
import subprocess
import sys

import jax
import pytest

import jattn
from jattn.implementations import dispatch

PUBLIC = {
    "jattn": {
        *("EMPTY", "Dropout", "Explanation", "State", "attention", "attention_logits"),
        *(
            "attention_state",
            "attention_weights",
            "BlockTable",
            "Context",
            "balanced",
            "block_table",
            "counted",
            "definition",
            "explain",
        ),
        *("caches", "masks", "merge", "merge_over", "modifiers"),
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
    "jattn.counted": {"counted_from"},
    "jattn.plot": {"entropy", "mask", "received", "weights"},
    "jattn.terminal": {"entropy", "mask", "received", "weights"},
    "jattn.caches": {
        *("Cache", "LatentCache", "PagedCache", "RollingCache"),
        *("empty", "latent", "paged", "rolling"),
    },
    "jattn.adapters.jax_nn": {"dot_product_attention"},
    "jattn.adapters.nnx": {"MultiHeadAttention", "attention"},
    "jattn.adapters.linen": {"MultiHeadDotProductAttention", "attention"},
    "jattn.adapters.equinox": {"MultiheadAttention"},
    "jattn.adapters.haiku": {"MultiHeadAttention"},
    "jattn.page": {"Page", "entropy", "mask", "received", "weights"},
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
    assert list(signature) == [*expected.split(), "dropout", "context", "implementation"]


def test_definition_takes_the_options_of_attention():
    options = set(inspect.signature(jattn.definition._attend_all).parameters)
    public = set(inspect.signature(jattn.attention).parameters)
    assert options == public - {"context", "implementation"}


def test_import_starts_no_backend_and_loads_no_extra():
    code = (
        "import sys, jattn, jax; from jax.extend import backend; "
        "extras = {'matplotlib', 'flax', 'equinox', 'haiku', 'keras', 'hypothesis'}; "
        "assert not extras & set(sys.modules); "
        "jax.config.update('jax_num_cpu_devices', 3); assert len(jax.devices()) == 3"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_one_can_type_after_the_dot_is_what_is_public():
    assert set(dir(jattn)) == {
        *jattn.__all__,
        "adapters",
        "page",
        "plot",
        "terminal",
        "testing",
    }
    code = "import jattn; jattn.testing.CASES; jattn.terminal.mask; jattn.adapters"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'jattn' has no attribute 'attend'"):
        jattn.attend  # noqa: B018


def test_an_option_that_a_function_does_not_have_is_refused_by_name():
    query = jax.numpy.zeros((2, 1, 2))
    message = r"attention_logits\(\) got an unexpected keyword argument 'sink'; its options"
    with pytest.raises(TypeError, match=message):
        jattn.attention_logits(query, query, sink=0.0)
    with pytest.raises(TypeError, match="'dropout'"):
        jattn.attention_entropy(query, query, dropout=None)


def test_package_is_typed():
    assert (importlib.resources.files("jattn") / "py.typed").is_file()


def test_version_is_the_installed_one():
    assert jattn.__version__ == importlib.metadata.version("jattn")


def test_explain_names_the_implementation_and_the_cost():
    struct = jax.ShapeDtypeStruct((2, 128, 8, 64), "bfloat16")
    found = jattn.explain(struct, struct, struct, mask=jattn.masks.Causal())
    assert found.implementation in dispatch.IMPLEMENTATIONS
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
    dense = dispatch.IMPLEMENTATIONS["dense"]
    monkeypatch.setattr(dense, "refusal", lambda problem, platform: "it is too hot.")
    query = jax.numpy.zeros((2, 1, 2))
    with pytest.raises(
        ValueError, match=r'attention\(implementation="dense"\): it is too hot.'
    ):
        jattn.attention(query, query, query, implementation="dense")
