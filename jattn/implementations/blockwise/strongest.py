"""The strongest weights of each query, tile by tile, as a running list.

The weights of a tile are ranked together with the strongest ones found before it, and the
strongest of both stay. Tiles come in the order of their keys, so that among equal weights
the first key wins.
"""

import jax.numpy as jnp
from jax import lax

from jattn.call.problem import Operands, Problem
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.plan import Plan, plan
from jattn.implementations.blockwise.sweep import sweep


def strongest(
    problem: Problem, operands: Operands, normalizer, k: int, average: bool, tile=None
):
    """Finds the k largest weights of each query, descending, and the indices of their keys.

    Equal weights are in the order of their keys. If fewer than k keys have any weight, the
    remaining indices are −1 and the remaining weights 0.

    Returns:
        Indices, int32, and weights: BTNk, or BTk of the weights averaged over heads.
    """
    B, N, T, _ = problem.sizes.BNTS
    if k == 0 or problem.sizes.are_nothing:
        shape = (B, T, k) if average else (B, T, N, k)
        return jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, problem.wide)
    usual = plan(problem, False, tile).halved()
    usual = usual._replace(folded=False)  # `sweep` does not fold heads
    layout = Layout(problem, operands, _plan(problem, average, usual, tile))
    B, K, G, T, *_ = layout.plan
    rows, whole = (B, K, G * T), layout.query.shape[:3]
    if average:
        rows, whole = (B, T), layout.query.shape[:2]
    nothing = lambda shape: (
        jnp.zeros((*shape, k), problem.wide),
        jnp.full((*shape, k), -1, jnp.int32),
    )

    def step(part, logs, at):
        weights = jnp.exp(logs)
        if average:
            weights = jnp.mean(layout.by_head(weights), axis=(1, 2))
        return _merge(part, weights, layout.first_key(at.j))

    def finish(whole, part, i, at):
        put = lambda x, y: layout.put_rows(x, y, T=i, **at)
        if average:
            put = lambda x, y: layout.put(x, y, "BT.", T=i, **at)
        return tuple(map(put, whole, part))

    start = lambda whole: nothing(rows)
    results = sweep(layout, normalizer, nothing(whole), start, step, finish, ordered=True)
    cut = (lambda x: x[:, : problem.sizes.T]) if average else layout.unqueries
    weights, indices = map(cut, results)
    return jnp.where(weights > 0, indices, -1), weights


def _merge(best, weights, first):
    """Ranks the weights found so far and those of a later tile, and keeps the largest k."""
    columns = first + lax.broadcasted_iota(jnp.int32, weights.shape, weights.ndim - 1)
    weights = jnp.where(weights > 0, weights, 0)  # a NaN counts as no weight
    candidates = zip(best, (weights, columns), strict=True)
    weights, columns = (jnp.concatenate(x, axis=-1) for x in candidates)
    weights, places = lax.top_k(weights, best[0].shape[-1])  # equal ones stay in order
    return weights, jnp.take_along_axis(columns, places, axis=-1)


def _plan(problem: Problem, average: bool, usual: Plan, tile) -> Plan:
    """Chooses the sizes of a tile: it has all heads if their weights are averaged."""
    K = problem.sizes.K
    if not average or usual.K == K:
        return usual
    T = usual.T if tile is not None else max(usual.T * usual.K // K, 1)
    return usual._replace(B=1, K=K, T=T)
