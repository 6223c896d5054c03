"""Every implementation and case on a GPU: `pytest -m gpu`, where JAX sees one."""

import jax
import pytest

import jattn
from jattn.call.pose import pose
from jattn.implementations.dispatch import IMPLEMENTATIONS
from jattn.testing import CASES, assert_matches_definition, random_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_on_gpu(implementation, case):
    dtype = "bfloat16" if implementation in ("gpu", "cudnn") else "float32"
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
