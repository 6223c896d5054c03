"""What is compiled grows about linearly with the size of a mask or modifier."""

import functools
import operator

import jax
import jax.numpy as jnp
import pytest

from jattn.blocks import of_call
from jattn.call.pose import pose
from jattn.modifiers import as_modifier

pytestmark = pytest.mark.slow

T = 64
QUERY = jnp.zeros((1, T, 1, 4))
TABLES = jnp.arange(48 * T).reshape(48, T) % 7


def joined(join, rule):
    """A mask of one rule for each array, joined."""
    return lambda xs: lambda *at: functools.reduce(join, [rule(x, *at) for x in xs])


def nested(step):
    """A mask of one step for each array, each around the last."""
    return lambda xs: (
        lambda b, n, t, s: functools.reduce(
            lambda inner, x: step(inner, x, t, s), xs, t >= s
        )
    )


def conds(xs):
    def inside(xs, t, s):
        if not len(xs):
            return t >= s
        rest = lambda: inside(xs[1:], t, s)
        return jax.lax.cond(xs[0][t] > xs[0][s], rest, lambda: t - s < 5)

    return lambda b, n, t, s: inside(list(xs), t, s)


MASKS = {
    "documents": joined(operator.or_, lambda x, b, n, t, s: (t >= s) & (x[t] == x[s])),
    "padded": joined(
        operator.or_, lambda x, b, n, t, s: (t >= s) & (x[t] == x[s]) & (x[s] > 1)
    ),
    "either": joined(operator.and_, lambda x, b, n, t, s: (t >= s) | (x[t] == x[s])),
    "pairs of rules": joined(
        operator.and_, lambda x, b, n, t, s: (t - s > x[0]) | (x[t] == x[s])
    ),
    "and": joined(operator.and_, lambda x, b, n, t, s: x[t] == x[s]),
    "or": joined(operator.or_, lambda x, b, n, t, s: x[t] == x[s]),
    "xor": joined(operator.xor, lambda x, b, n, t, s: x[t] >= x[s]),
    "equal": joined(operator.eq, lambda x, b, n, t, s: x[t] >= x[s]),
    "lookups": joined(operator.or_, lambda x, b, n, t, s: x[abs(t - s)] > 3),
    "squares": joined(
        operator.or_, lambda x, b, n, t, s: x.reshape(8, 8)[t // 8, s // 8] > 3
    ),
    "where": nested(lambda inner, x, t, s: jnp.where(t - x[t] >= s, x[t] == x[s], inner)),
    "cond": conds,
    "shared": nested(
        lambda inner, x, t, s: (inner & (t - s > x[0])) | (inner ^ (x[s] > 2))
    ),
}
MODIFIERS = {
    "hidden": lambda x: (
        lambda l, b, n, t, s: jnp.where((t - s).astype(jnp.float32) >= x[s], l, -jnp.inf)
    ),
    "lookup": lambda x: lambda l, b, n, t, s: l + x[jnp.clip(t - s, 0, 9)],
    "product": lambda x: lambda l, b, n, t, s: l + x[t] * x[s],
    "cap": lambda x: lambda l, b, n, t, s: x[0] * jnp.tanh(l / x[0]),
}


def chained(name):
    def modifier(xs):
        steps = [as_modifier(MODIFIERS[name](x.astype(jnp.float32))) for x in xs]
        return functools.reduce(operator.rshift, steps)

    return modifier


def equations(jaxpr):
    """Counts equations, those inside of others too."""
    return len(jaxpr.eqns) + sum(map(inside, jaxpr.eqns))


def inside(equation):
    """Counts the equations inside of one; of what depends on the platform, the most."""
    is_jaxpr = lambda x: hasattr(x, "eqns")
    inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
    counts = [equations(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x)]
    # A platform compiles its own branch only.
    return max(counts) if equation.params.get("branches_platforms") else sum(counts)


def of_table(count, **option):
    """Counts the equations of a table, for functions of that many arrays."""
    ((name, make),) = option.items()

    def table(xs):
        problem, operands = pose("test", QUERY, QUERY, QUERY, **{name: make(list(xs))})
        return of_call.block_table(problem, operands, 8, 8)

    return equations(jax.make_jaxpr(table)(TABLES[:count]).jaxpr)


@pytest.mark.parametrize("name", MASKS)
def test_table_of_a_mask_grows_linearly(name):
    few, more, most = (of_table(count, mask=MASKS[name]) for count in (3, 12, 48))
    assert more <= 4.5 * few
    assert most <= 4.5 * more
    # 371 for each array of "pairs of rules" today, in the form for a GPU, which has more
    # equations than that for a CPU and fewer kernels.
    assert more <= 12 * 400


@pytest.mark.parametrize("name", MODIFIERS)
def test_table_of_a_modifier_grows_linearly(name):
    few, more, most = (of_table(count, modifier=chained(name)) for count in (3, 12, 48))
    assert more <= 4.5 * few
    assert most <= 4.5 * more
    assert more <= 12 * 130
