"""Every implementation and case on a GPU: `pytest -m gpu`, where JAX sees one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call.pose import pose
from jattn.implementations import nvidia
from jattn.implementations.dispatch import IMPLEMENTATIONS
from jattn.implementations.gpu.kernel import GPU
from jattn.implementations.gpu.refusal import HOPPER
from jattn.masks import Causal
from jattn.testing import CASES, assert_matches_definition, random_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_on_gpu(implementation, case):
    # A GPU rounds the factors of float32 products, unless the highest precision is asked.
    dtype = "bfloat16" if implementation in ("gpu", "cudnn") else "float32"
    with jax.default_matmul_precision(None if dtype == "bfloat16" else "highest"):
        check_case(implementation, case, dtype)


def check_case(implementation, case, dtype):
    inputs = random_inputs(case, dtype)
    options = case.options(inputs)
    options.pop("sink", None)
    arrays = (inputs[name] for name in ("query", "key", "value"))
    problem, _ = pose("test", *arrays, **options)
    if sentence := IMPLEMENTATIONS[implementation].refusal(problem, "gpu"):
        pytest.skip(sentence)

    def attend(*args, **options):
        return jattn.attention_state(*args, implementation=implementation, **options)

    assert_matches_definition(attend, case, dtype)


@pytest.mark.parametrize("implementation", ["gpu", "cudnn", "blockwise", "dense"])
def test_what_nobody_sees_may_be_anything(implementation):
    """Keys from 200 on are seen by no query, and only keys before 45 by query 100."""
    arrays = [jax.random.normal(jax.random.key(i), (1, 256, 2, 64)) for i in range(3)]
    query, key, value = (x.astype("bfloat16") for x in arrays)
    spoil = lambda x: x.at[:, 200:].set(jnp.nan).at[:, 210, :, 0].set(jnp.inf)
    options = {"mask": Causal(-56), "implementation": implementation}
    if implementation == "cudnn":
        options["mask"] = Causal()
        spoil = lambda x: x

    def loss(query, key, value):
        output = jattn.attention(query, key, value, **options)
        return jnp.sum(output[:, np.delete(np.arange(256), 100)].astype(jnp.float32) ** 2)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    want = gradients(query, key, value)
    for x, y in zip(gradients(query, spoil(key), spoil(value)), want, strict=True):
        np.testing.assert_array_equal(np.asarray(x, "float32"), np.asarray(y, "float32"))
    bad = query.at[:, 100].set(jnp.nan)
    _, d_key, d_value = gradients(bad, key, value)
    after = 101 if implementation == "cudnn" else 45
    for x, y in ((d_key, want[1]), (d_value, want[2])):
        x, y = (np.asarray(x[:, after:], "float32") for x in (x, y))
        np.testing.assert_allclose(x, y, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize(
    "job",
    [
        "weights_near_one",
        "small_values_of_keys_with_all_the_weight",
        "huge_logits",
        "soft_caps_of_all_sizes",
        "small_cotangents_of_logits",
        "small_cotangents_and_large",
        "hidden_is_ignored",
        "traced_tables_match",
    ],
)
def test_what_is_emulated_elsewhere(job, monkeypatch):
    if nvidia.capability() != HOPPER:
        pytest.skip("needs Hopper")
    from tests.helpers import emulated_gpu, gpu_jobs

    monkeypatch.setattr(emulated_gpu, "kernel", lambda capability=HOPPER: GPU())
    getattr(gpu_jobs, job)()
