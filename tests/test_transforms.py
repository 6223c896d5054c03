"""JAX's transformations, one by one, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jattn
from jattn.implementations.dispatch import DEFAULT_ORDER
from jattn.masks import Causal, Segments
from jattn.modifiers import ALiBi, SoftCap
from tests.helpers.draws import normal

rng = np.random.default_rng(0)
QUERY = jnp.float32(rng.standard_normal((3, 5, 4, 8)))
KEY = jnp.float32(rng.standard_normal((3, 6, 2, 8)))
VALUE = jnp.float32(rng.standard_normal((3, 6, 2, 8)))
IDS = jnp.sort(jnp.asarray(rng.integers(0, 3, (3, 6))))
SLOPES = jnp.float32(rng.standard_normal(4))

pytestmark = pytest.mark.parametrize("implementation", DEFAULT_ORDER)
close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-5)


@pytest.fixture
def attend(implementation):
    """A call with a mask, a modifier that holds an array, and positions."""

    def attend(query, key, value, ids=IDS[0], slopes=SLOPES, offset=1):
        mask = Causal() & (lambda b, n, t, s: ids[t] == ids[s])
        modifier = SoftCap(3.0) >> ALiBi(slopes)
        return jattn.attention(
            query,
            key,
            value,
            mask=mask,
            modifier=modifier,
            query_position=offset,
            implementation=implementation,
        )

    return attend


def test_jit_changes_nothing(attend):
    close(jax.jit(attend)(QUERY, KEY, VALUE), attend(QUERY, KEY, VALUE))


MAPPED = {
    "query": (0, None, None, None, None, None),
    "key": (None, 0, None, None, None, None),
    "value": (None, None, 0, None, None, None),
    "ids_in_a_mask": (None, None, None, 0, None, None),
    "slopes_in_a_modifier": (None, None, None, None, 0, None),
    "position": (None, None, None, None, None, 0),
    "all": (0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("axes", MAPPED.values(), ids=MAPPED)
def test_vmap_equals_a_loop(attend, axes):
    operands = (QUERY, KEY, VALUE, IDS, jnp.stack([SLOPES] * 3), jnp.arange(3))
    single = [x if axis == 0 else x[0] for x, axis in zip(operands, axes, strict=True)]
    mapped = jax.vmap(attend, in_axes=axes)(*single)
    for i in range(3):
        one = [x[i] if axis == 0 else x for x, axis in zip(single, axes, strict=True)]
        close(mapped[i], attend(*one))


def test_vmap_over_another_axis_than_the_first(attend):
    moved = [jnp.moveaxis(x, 0, 2) for x in (QUERY, KEY, VALUE)]
    mapped = jax.vmap(attend, in_axes=2, out_axes=1)(*moved)
    close(jnp.moveaxis(mapped, 1, 0)[1], attend(QUERY[1], KEY[1], VALUE[1]))


def test_vmap_keeps_the_example_index_of_a_mask(implementation):
    mask = lambda b, n, t, s: (s + b) % 2 == 0
    attend = functools.partial(jattn.attention, mask=mask, implementation=implementation)
    stacked = [jnp.stack([x, 2 * x]) for x in (QUERY, KEY, VALUE)]
    close(jax.vmap(attend)(*stacked)[1], attend(*(2 * x for x in (QUERY, KEY, VALUE))))


def loss_of(attend):
    return lambda *operands: jnp.sum(jnp.sin(attend(*operands)))


def test_vmap_of_grad_equals_a_loop(attend):
    gradient = jax.grad(loss_of(attend), (0, 1, 2))
    mapped = jax.vmap(gradient)(QUERY, KEY, VALUE)
    for i in range(3):
        jax.tree.map(
            lambda m, one, i=i: close(m[i], one),
            mapped,
            gradient(QUERY[i], KEY[i], VALUE[i]),
        )


def test_jvp_agrees_with_vjp(attend):
    tangents = (KEY, KEY, VALUE)
    primals = (QUERY[:, :, :2], KEY, VALUE)
    tangents = (QUERY[:, :, 2:], VALUE, KEY)
    call = lambda *x: attend(*x, slopes=SLOPES[:2])
    output, d_output = jax.jvp(call, primals, tangents)
    _, pullback = jax.vjp(call, *primals)
    cotangent = jnp.cos(output)
    forward = jnp.vdot(cotangent, d_output)
    backward = sum(
        jnp.vdot(x, t) for x, t in zip(pullback(cotangent), tangents, strict=True)
    )
    np.testing.assert_allclose(forward, backward, rtol=1e-4)


def test_linearize_equals_jvp(attend):
    _, tangent = jax.jvp(lambda q: attend(q, KEY, VALUE), (QUERY,), (QUERY,))
    _, linear = jax.linearize(lambda q: attend(q, KEY, VALUE), QUERY)
    close(linear(QUERY), tangent)


def test_jacobians_forward_and_reverse_agree(attend):
    call = lambda query: attend(query, KEY[0, :3], VALUE[0, :3], ids=IDS[0, :3], offset=0)
    query = QUERY[0, :2]
    close(jax.jacfwd(call)(query), jax.jacrev(call)(query))


def second_orders(loss):
    """The Hessian times a vector, in the four ways to get it."""
    gradient = jax.grad(loss)
    return {
        "jvp_of_grad": lambda x, v: jax.jvp(gradient, (x,), (v,))[1],
        "grad_of_jvp": lambda x, v: jax.grad(lambda x: jax.jvp(loss, (x,), (v,))[1])(x),
        "grad_of_grad": lambda x, v: jax.grad(lambda x: jnp.vdot(gradient(x), v))(x),
        "hessian": lambda x, v: jnp.tensordot(jax.hessian(loss)(x), v, axes=v.ndim),
    }


@pytest.mark.parametrize("way", second_orders(jnp.sum))
def test_second_derivative_equals_the_definition_s(attend, way):
    query, key, value = QUERY[0, :2], KEY[0, :3], VALUE[0, :3]
    direction = QUERY[1, :2]

    def definition(query):
        mask = Causal() & (lambda b, n, t, s: IDS[0, t] == IDS[0, s])
        modifier = SoftCap(3.0) >> ALiBi(SLOPES)
        options = {"mask": mask, "modifier": modifier, "query_position": 1}
        return jattn.definition.attention(query, key, value, **options)

    got = second_orders(loss_of(lambda query: attend(query, key, value)))[way]
    want = second_orders(loss_of(definition))["hessian"]
    close(got(query, direction), want(query, direction))


def test_jvp_of_jvp_equals_the_definition_s(implementation):
    key, direction = KEY[0, :3], QUERY[1, :2]

    def curvature(function):
        call = lambda query: function(query, key, VALUE[0, :3])
        first = lambda query: jax.jvp(call, (query,), (direction,))[1]
        return jax.jvp(first, (QUERY[0, :2],), (direction,))[1]

    attend = functools.partial(jattn.attention, implementation=implementation)
    close(curvature(attend), curvature(jattn.definition.attention))


def test_checkpoint_changes_nothing(attend):
    plain = jax.grad(loss_of(attend))(QUERY, KEY, VALUE)
    again = jax.grad(loss_of(jax.checkpoint(attend)))(QUERY, KEY, VALUE)
    close(again, plain)


def test_scan_equals_a_loop(attend):
    step = lambda query, _: (attend(query, KEY, VALUE), None)

    def scanned(query):
        return jnp.sum(jax.lax.scan(step, query, None, length=3)[0] ** 2)

    def looped(query):
        for _ in range(3):
            query, _ = step(query, None)
        return jnp.sum(query**2)

    close(jax.grad(scanned)(QUERY), jax.grad(looped)(QUERY))


def test_export_with_symbolic_sizes(attend):
    b, t, s = export.symbolic_shape("b, t, s")
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(query, key, value):
        return jattn.attention(query, key, value, mask=Causal() & jattn.masks.Window(2, 0))

    gradient = jax.grad(lambda *x: jnp.sum(call(*x) ** 2))
    shapes = struct(b, t, 4, 8), struct(b, s, 2, 8), struct(b, s, 2, 8)
    for function in (call, gradient):
        exported = export.export(jax.jit(function))(*shapes)
        loaded = export.deserialize(exported.serialize())
        close(loaded.call(QUERY, KEY, VALUE), function(QUERY, KEY, VALUE))


@pytest.mark.parametrize("lengths", [(30, 30), (30, "s"), ("t", 30), (1, 600)])
def test_export_with_a_symbolic_batch_and_known_lengths(implementation, lengths):
    names = dict(zip("bts", export.symbolic_shape("b, t, s"), strict=True))
    struct = lambda *shape: jax.ShapeDtypeStruct(
        tuple(names.get(x, x) for x in shape), jnp.float32
    )
    t, s = lengths
    shapes = struct("b", t, 4, 8), struct("b", s, 2, 8), struct("b", s, 2, 8)
    T, S = (x if isinstance(x, int) else 17 for x in lengths)
    arrays = normal(0, (3, T, 4, 8)), normal(1, (3, S, 2, 8)), normal(2, (3, S, 2, 8))

    def call(query, key, value):
        mask = Causal(S - T) & jattn.masks.Window(9, 0)
        received = jattn.attention_received(query, key, mask=mask)
        options = {"mask": mask, "implementation": implementation}
        return jattn.attention(query, key, value, **options), received

    gradient = jax.grad(lambda *x: jnp.sum(call(*x)[0] ** 2))
    for function in (call, gradient):
        exported = export.export(jax.jit(function))(*shapes)
        jax.tree.map(close, exported.call(*arrays), function(*arrays))


def test_export_for_all_platforms_in_one_artifact(attend):
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(attend), platforms=platforms)(QUERY, KEY, VALUE)
    assert exported.platforms == platforms
    close(exported.call(QUERY, KEY, VALUE), attend(QUERY, KEY, VALUE))


def test_batch_and_heads_can_be_sharded(attend):
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec("data", None, "model", None)
    sharding = jax.sharding.NamedSharding(mesh, spec)
    query = jnp.concatenate([QUERY, QUERY])[:4]
    key, value = (jnp.concatenate([x, x])[:4] for x in (KEY, VALUE))
    placed = [jax.device_put(x, sharding) for x in (query, key, value)]
    compiled = jax.jit(attend).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    close(compiled(*placed), attend(query, key, value))


def test_donated_inputs_are_accepted(implementation):
    attend = functools.partial(jattn.attention, implementation=implementation)
    query = jnp.copy(KEY)
    expected = attend(KEY, KEY, VALUE)
    close(jax.jit(attend, donate_argnums=0)(query, KEY, VALUE), expected)


def test_mask_with_arrays_passes_through_jit_and_vmap(implementation):
    def call(query, mask):
        return jattn.attention(
            query, query, query, mask=mask, implementation=implementation
        )

    masks = Segments(IDS[:, :5])
    mapped = jax.jit(jax.vmap(call))(QUERY, masks)
    close(mapped[1], call(QUERY[1], Segments(IDS[1, :5])))


def test_products_have_the_precision_that_is_asked_for(implementation):
    """Also those that are compiled after the context has ended."""

    def loss(query):
        with jax.default_matmul_precision("highest"):
            output = jattn.attention(query, KEY, VALUE, implementation=implementation)
        return jnp.sum(output)

    program = jax.jit(jax.grad(loss)).lower(QUERY).as_text()
    asked = program.count("precision = [HIGHEST, HIGHEST]")
    assert asked == program.count("stablehlo.dot_general") > 1


def test_vmapped_gradient_of_bfloat16_with_shared_keys(implementation):
    # XLA's CPU of jax 0.12 lacked a product that this took.
    shapes = (2, 2, 64, 4, 8), (2, 64, 2, 8)
    query, key = (normal(i, shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    total = lambda query: jnp.sum(
        jattn.attention(query, key, key, mask=Causal(), implementation=implementation)
    )
    mapped = jax.jit(jax.vmap(jax.grad(total)))(query)
    for got, want in zip(mapped, map(jax.jit(jax.grad(total)), query), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2 * np.max(np.abs(want)))
