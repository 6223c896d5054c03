"""Checks that every implementation passes on each case.

The author of a kernel runs `assert_matches_definition` and `check_gradients` over `CASES`,
with a function of the signature of `jattn.attention_state`. The reference is
`jattn.definition` in float64, and no check has a tolerance of its own. The allowed error is
`budget` times the error of the definition in the same dtype, plus two units in the last
place of the largest number. The error of the definition counts as at least the change that
one rounding of the inputs causes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np

from jattn import definition
from jattn.testing.cases import Case, Inputs, cast, random_inputs


def derivatives(case: Case, attention_state: Callable, inputs: Inputs, seed: int = 0):
    """Computes output, logsumexp, and the derivatives of a case, by name.

    `empty` is 1 where a query sees nothing, so that its logsumexp is −∞, and 0 elsewhere.

    The gradients are those of Σ output · a + Σ logsumexp · b with random a and b, by each
    floating input. The tangents are along one random direction in all floating inputs.
    """
    floating = {name: x for name, x in inputs.items() if _is_floating(x)}

    def state(floating):
        output, logsumexp = case.call(attention_state, inputs | floating)
        # An empty row has logsumexp −∞, which would make each sum −∞; it counts as 0.
        # Beside it stands which rows are empty, so that no number passes for −∞.
        empty = logsumexp == -jnp.inf
        found = output, jnp.where(empty, 0, logsumexp)
        return found, empty.astype(logsumexp.dtype)

    rng = np.random.default_rng(seed + 1)
    like = lambda x: cast(rng.standard_normal(x.shape), x.dtype)
    result, pullback, empty = jax.vjp(state, floating, has_aux=True)
    (gradients,) = pullback(jax.tree.map(like, result))
    directions = jax.tree.map(like, floating)
    tangents = jax.jvp(lambda x: state(x)[0], (floating,), (directions,))[1]
    named = {"output": result[0], "logsumexp": result[1]}
    named["empty"] = empty
    named |= {"d_output": tangents[0], "d_logsumexp": tangents[1]}
    return named | {f"d_{name}": gradient for name, gradient in gradients.items()}


def errors(
    case: Case, attention_state: Callable, dtype="float32", *, sizes=None, seed: int = 0
) -> dict:
    """Computes the largest errors against the definition in float64, by name.

    Returns:
        For the output, the logsumexp and each derivative: the error of the function, the
        error of the definition in the same dtype, and the largest magnitude. The
        definition's own error can be tiny by luck. We take its largest over four seeds,
        relative to the magnitude, and at least the change caused by one float32 rounding
        of the inputs. In float64 it is the error in float32, scaled by the ratio of the
        two precisions.
    """
    dtype = jnp.dtype(dtype).name  # NumPy's types do not equal their names
    got, exact = _with_exact(case, attention_state, dtype, sizes, seed)
    near_dtype = "float32" if dtype == "float64" else dtype
    shrink = float(jnp.finfo(dtype).eps / jnp.finfo(near_dtype).eps)
    near, baseline = {}, dict.fromkeys(exact, 0.0)
    for near_seed in range(seed, seed + 4):
        function = definition.attention_state
        near, near_exact = _with_exact(case, function, near_dtype, sizes, near_seed)
        moved = _moved_exact(case, near_dtype, sizes, near_seed)
        for name, x in near_exact.items():
            error = max(_distance(near[name], x), _distance(moved[name], x))
            relative = shrink * error / max(_largest(x), 1e-30)  # 1e-30: never 0 / 0
            baseline[name] = max(baseline[name], relative)
    for name, x in exact.items():
        want = x.dtype if dtype == "float64" else near[name].dtype
        if (got[name].shape, got[name].dtype) != (x.shape, want):
            raise AssertionError(
                f"{case.name}, {dtype}: `{name}` must be {want}{list(x.shape)}, got "
                f"{got[name].dtype}{list(got[name].shape)}."
            )
    return {
        name: (_distance(got[name], x), baseline[name] * _largest(x), _largest(x))
        for name, x in exact.items()
    }


def _with_exact(case, attention_state, dtype, sizes, seed):
    """Computes the results of a function, and of the definition in float64."""
    with jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")):
        inputs = random_inputs(case, dtype, sizes=sizes, seed=seed)
        got = _derivatives(case, attention_state, inputs)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: cast(np.asarray(x), "float64"), inputs)
        return got, _derivatives(case, definition.attention_state, wide)


def _moved_exact(case, dtype, sizes, seed):
    """Computes the definition in float64 on inputs moved by one rounding of float32.

    No implementation can do better than the exact result for inputs so near. Where logits
    are large or sums cancel, the definition in the same dtype may be better by luck.
    """
    rng, eps = np.random.default_rng(seed), float(jnp.finfo("float32").eps)
    inputs = random_inputs(case, dtype, sizes=sizes, seed=seed)

    def move(x):
        x = np.asarray(x)
        return x * (1 + eps * rng.choice([-1.0, 1.0], x.shape))

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: cast(np.asarray(x), "float64"), inputs)
        wide = jax.tree.map(
            lambda x: cast(move(x), "float64") if _is_floating(x) else x, wide
        )
        return _derivatives(case, definition.attention_state, wide)


def _largest(x) -> float:
    return float(np.max(np.abs(x), initial=0))


def assert_matches_definition(
    attention_state: Callable,
    case: Case,
    dtype="float32",
    *,
    budget: float = 2.0,
    sizes=None,
    seed: int = 0,
) -> None:
    """Asserts that a function equals the definition: values, gradients and tangents.

    Args:
        attention_state: A function of the signature of `jattn.attention_state`.
        case: One of `CASES`, or your own.
        dtype: The dtype of the inputs.
        budget: How many times the definition's error in the same dtype is allowed, plus
            two units in the last place of the largest number.
        sizes: Sizes in place of the case's own.
        seed: The seed of the inputs.

    Raises:
        AssertionError: Naming the case, what differs, and by how much.
    """
    dtype = jnp.dtype(dtype).name
    found = errors(case, attention_state, dtype, sizes=sizes, seed=seed)
    for name, (error, baseline, largest) in found.items():
        wide = name in ("logsumexp", "d_logsumexp", "empty") and jnp.finfo(dtype).bits < 32
        # The logsumexp is in float32 at least, also for narrow inputs.
        allowed = budget * baseline
        allowed += 2 * float(jnp.finfo("float32" if wide else dtype).eps) * largest
        if not error <= allowed:
            raise AssertionError(
                f"{case.name}, {dtype}: `{name}` is off by {error:.2e}, more than {budget} "
                f"times the {baseline:.2e} of the definition in {dtype}; the largest "
                f"number is {largest:.2e}."
            )


def check_gradients(
    attention_state: Callable, case: Case, *, sizes=None, seed: int = 0
) -> None:
    """Asserts in float64 that derivatives are right.

    Each element of each first derivative is compared with the definition's. Gradients of
    first and second order are compared with finite differences along a random direction.
    All must be finite, even where rows are empty. An error of 0.1 % fails the check.

    Args:
        attention_state: A function of the signature of `jattn.attention_state`.
        case: One of `CASES`, or your own.
        sizes: Small sizes in place of the case's own.
        seed: The seed of the inputs.

    Raises:
        AssertionError: Naming the case and what differs.
    """
    with jax.enable_x64(True):
        inputs = random_inputs(case, "float64", sizes=sizes, seed=seed)
        got = _derivatives(case, attention_state, inputs)
        want = _derivatives(case, definition.attention_state, inputs)
        for name, expected in want.items():
            if not np.all(np.isfinite(got[name])):
                raise AssertionError(f"{case.name}: `{name}` is not finite everywhere.")
            np.testing.assert_allclose(
                got[name], expected, rtol=1e-9, atol=1e-11, err_msg=f"{case.name}: {name}"
            )
        scalar, floating = scalar_of(case, attention_state, inputs)
        if case.smooth:
            check = jax.test_util.check_grads
            check(jax.jit(scalar), (floating,), 2, ("rev",), atol=1e-4, rtol=1e-4, eps=1e-5)


def scalar_of(case: Case, attention_state: Callable, inputs: Inputs):
    """Gives a scalar function of the floating inputs of a case, and these inputs."""

    def scalar(floating):
        output, logsumexp = case.call(attention_state, inputs | floating)
        seen = jnp.where(logsumexp == -jnp.inf, 0, logsumexp)
        # Sine and cosine give each number of the results its own cotangent.
        return jnp.sum(jnp.sin(output)) + jnp.sum(jnp.cos(seen))

    return scalar, {name: x for name, x in inputs.items() if _is_floating(x)}


_derivatives = jax.jit(derivatives, static_argnums=(0, 1))


def _is_floating(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _distance(x, exact) -> float:
    difference = np.asarray(x, np.float64) - np.asarray(exact)
    return float(np.max(np.abs(difference), initial=0))
