"""Attention block by block, in plain JAX: memory linear in T and S, on any device.

Queries and keys are cut into blocks; the logits of one block of each, a tile, are all
that ever exists of T × S. A table says which tiles a mask leaves empty, which are then
skipped, and which it leaves full, which then need no mask.

    forward    over the tiles of a query block: running maximum, sum and output
    tangent    over the same tiles, with the logsumexp at hand
    backward   over the tiles of a key block, with logits as columns × rows, so that
               no product contracts the first axis of its left operand
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn import tile
from jattn.dropout import keep, words
from jattn.layout import Aligned, Layout, plan, rows_plan, schedules
from jattn.operation import Operation, retype
from jattn.pointwise import Arrays, Index
from jattn.problem import Operands, Problem, index
from jattn.shapes import wide_dtype
from jattn.state import State


def refusal(problem: Problem, platform: str) -> str | None:
    """Takes everything, anywhere."""
    del problem, platform
    return None


def attention_state(
    problem: Problem, operands: Operands, tile: tuple[int, int] | None = None
) -> State:
    """The output BTND in the dtype of the inputs, and the logsumexp BTN.

    `tile` is how many queries and keys a tile has, where the measured rule is not wanted.
    """
    sizes = problem.sizes
    if any(isinstance(x, int) and x == 0 for x in (sizes.B, sizes.T, sizes.S)):
        return _nothing(problem)
    if operands.rng is not None:  # one word per query and key serves every tile
        at, rng = index(problem, operands), operands.rng
        drawn = (words(rng, at.b, at.n, at.t, 0), words(rng, at.b, at.n, at.s, 1))
        operands = operands._replace(rng=drawn)
    leaves, tree = jax.tree.flatten(operands)
    return State(*Attention(problem, tree, tile)(*leaves))


def _nothing(problem: Problem) -> State:
    """The state of queries without keys."""
    B, N, T, _ = problem.sizes.BNTS
    output = jnp.zeros((B, T, N, problem.sizes.D), problem.dtype)
    return State(output, jnp.full((B, T, N), -jnp.inf, problem.wide))


@dataclasses.dataclass(frozen=True)
class Attention(Operation):
    """The leaves of `Operands`, its rng made into words, to output and logsumexp."""

    problem: Problem
    tree: Any
    tile: tuple[int, int] | None = None

    outputs = 2
    names = ("jattn_output", "jattn_logsumexp")

    def plan(self, spread: bool):
        """How much a tile holds."""
        return plan(self.problem, spread, self.tile)

    @property
    def elements(self) -> int:
        """Two tiles."""
        B, K, G, T, S, *_ = self.plan(spread=False)
        return 2 * B * K * G * T * S

    def types(self, *types):
        """BTND and BTN."""
        B, N, T, _ = self.problem.sizes.BNTS
        query = types[0]
        spec = query.sharding.spec[:3]
        return [
            retype(query, (B, T, N, self.problem.sizes.D), spec=(*spec, None)),
            retype(query, (B, T, N), self.problem.wide, spec),
        ]

    def fast(self, *leaves, spread):
        """Tile by tile."""
        return forward(
            Layout(self.problem, self.tree.unflatten(leaves), self.plan(spread), False)
        )

    def reference(self, *leaves):
        """A few whole rows at a time."""
        return by_rows(self.problem, self.tree.unflatten(leaves))

    def push(self, active, primals, outputs, tangents, spread):
        """Tile by tile."""
        layout = Layout(self.problem, self.tree.unflatten(primals), self.plan(spread))
        tangents = iter(tangents)
        tangents = [next(tangents) if flag else None for flag in active]
        return tangent(layout, outputs, self.tree.unflatten(tangents))

    def pull(self, active, primals, outputs, cotangents, spread):
        """Tile by tile."""
        layout = Layout(
            self.problem, self.tree.unflatten(primals), self.plan(spread), False
        )
        results = backward(layout, outputs, cotangents, self.tree.unflatten(active))
        results = self.tree.flatten_up_to(results)
        return [
            jnp.zeros(x.shape, x.dtype) if result is None else result.astype(x.dtype)
            for x, result, flag in zip(primals, results, active, strict=True)
            if flag
        ]


class Active(NamedTuple):
    """What the logits of a tile depend on beside the products; None where constant."""

    bias: Any
    captured: Any
    modifier: Any

    def fill(self, other: "Active") -> "Active":
        """The other's arrays where this one has None."""
        pick = lambda mine, other: other if mine is None else mine
        return jax.tree.map(pick, self, other, is_leaf=lambda x: x is None)


class Tile:
    """One tile's logits, mask and dropout, for rows × columns or columns × rows."""

    def __init__(self, layout: Layout, aligned: Aligned, i, j, columns_first=False):
        cut = lambda x: layout.cut(x, "BKGTS", T=i, S=j)
        self.layout, self.problem = layout, layout.problem
        self.part = jax.tree.map(cut, aligned)
        self.lay = functools.partial(layout.lay, columns_first=columns_first)
        self.index = Index(*map(self.lay, self.part.index))

    @property
    def active(self) -> Active:
        """All of it."""
        captured = self.layout.operands.modifier.captured
        return Active(self.part.bias, captured, self.part.modifier)

    def logits(self, products, active: Active):
        """Modifier, then bias, on products that were scaled."""
        logits = products
        if self.problem.modifier is not None:
            arrays = Arrays(active.captured, tuple(map(self.lay, active.modifier)))
            logits = self.problem.modifier(arrays, self.index, products)
            logits = jnp.broadcast_to(logits, products.shape).astype(products.dtype)
        return logits if active.bias is None else logits + self.lay(active.bias)

    def allowed(self):
        """Which pairs count: the mask's, and no padding."""
        allowed = None
        if self.problem.mask is not None:
            captured = self.layout.operands.mask.captured
            arrays = Arrays(captured, tuple(map(self.lay, self.part.mask)))
            allowed = self.problem.mask(arrays, self.index)
        if self.layout.has_padding:
            inside = self.lay(self.part.column) < self.problem.sizes.S
            allowed = inside if allowed is None else allowed & inside
        return allowed

    def drop(self, weights):
        """The weights that dropout keeps, scaled up."""
        if self.part.words is None:
            return weights
        kept = keep(*map(self.lay, self.part.words), self.problem.rate)
        return jnp.where(kept, weights / (1 - self.problem.rate), 0)


class Head(NamedTuple):
    """Some examples and key/value heads of a call."""

    at: dict
    key: jax.Array  # BKSH
    value: jax.Array  # BKSD
    aligned: Aligned


def _heads(layout: Layout, body, carry, folded=False):
    """Runs `body(head, carry)` for every step in B and K; folded keys stay BSK…."""
    counts = layout.counts

    def step(index, carry):
        b, k = index // counts["K"], index % counts["K"]
        cut = lambda x, axes: layout.cut(x, axes, B=b, K=k)
        aligned = jax.tree.map(lambda x: cut(x, "BKGTS"), layout.aligned)
        key, value = cut(layout.key, "BSK."), cut(layout.value, "BSK.")
        if not folded:
            key, value = jnp.moveaxis(key, 2, 1), jnp.moveaxis(value, 2, 1)
        return body(Head({"B": b, "K": k}, key, value, aligned), carry)

    return _loop(counts["B"] * counts["K"], step, carry)


def _loop(count, body, carry):
    """A loop; none for a single turn."""
    if isinstance(count, int) and count == 1:
        return body(0, carry)
    return lax.fori_loop(0, count, body, carry)


def _visit(schedule, head: Head, i, count, body, carry):
    """Runs `body(masked)(j, carry)` over the tiles of block `i` that are not empty."""
    if schedule is None:
        return _loop(count, body(False), carry)
    order, full, live = schedule.at(head.at["B"], head.at["K"], i)
    at = lambda masked: lambda turn, carry: body(masked)(order[turn], carry)
    if not schedule.masked:
        return lax.fori_loop(0, live, at(False), carry)
    carry = lax.fori_loop(0, full, at(False), carry)
    return lax.fori_loop(full, live, at(True), carry)


def _dot(spec: str, x, y, wide):
    return jnp.einsum(spec, x, y, preferred_element_type=wide)


def forward(layout: Layout):
    """The output BTND and the logsumexp BTN."""
    if not layout.plan.folded:
        return _forward(layout)
    # Folded heads mix in products with zeros, which keep them apart while all is finite.
    folded = _forward(layout)
    spoiled = functools.reduce(jnp.logical_or, (jnp.any(jnp.isnan(x)) for x in folded))
    plan = layout.plan._replace(folded=False)
    apart = Layout(layout.problem, layout.operands, plan, wide=not layout.narrow)
    return lax.cond(spoiled, lambda: _forward(apart), lambda: folded)


def _forward(layout: Layout):
    sizes, wide = layout.problem.sizes, layout.problem.wide
    folded, scale = layout.plan.folded, layout.operands.scale
    by_query, _ = schedules(layout)
    shape = (sizes.B, layout.padded["T"], sizes.K, sizes.G)
    output = jnp.zeros((*shape, sizes.D), layout.problem.dtype)

    def one_head(head, carry):
        def one_block(i, carry):
            query = layout.rows(layout.query, T=i, **head.at)
            # In float32, so that scaling before the product costs nothing and is exact.
            query = layout.scaled(query) if folded else query.astype(wide) * scale
            body = functools.partial(_forward_tile, layout, head, query, i)
            rows = query.shape[:3]
            start = (
                jnp.full(rows, -jnp.inf, wide),
                jnp.zeros(rows, wide),
                jnp.zeros((*rows, sizes.D), wide),
            )
            state = _visit(by_query, head, i, layout.counts["S"], body, start)
            return tuple(
                layout.put_rows(whole, part, T=i, **head.at)
                for whole, part in zip(carry, _finish(*state), strict=True)
            )

        return _loop(layout.counts["T"], one_block, carry)

    start = (output, jnp.zeros(shape, wide))
    output, logsumexp = _heads(layout, one_head, start, folded)
    return layout.unqueries(output), layout.unqueries(logsumexp)


def _forward_tile(layout, head, query, i, masked):
    """The body of the loop over the tiles of one query block."""
    folded = layout.plan.folded

    def body(j, carry):
        row_max, row_sum, output = carry
        view = Tile(layout, head.aligned, i, j)
        axes = "BSK." if folded else "BKS."
        key = layout.cut(head.key, axes, S=j)
        value = layout.narrowed(layout.cut(head.value, axes, S=j))
        products = (_folded_products if folded else _products)(layout, query, key)
        logits = view.logits(products, view.active)
        allowed = view.allowed() if masked else None
        if masked:
            logits = jnp.where(allowed, logits, -jnp.inf)
        top = jnp.maximum(row_max, jnp.max(logits, axis=-1))
        safe = lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
        weights = jnp.exp(logits - safe[..., None])
        shrink = jnp.exp(row_max - safe)
        row_sum = row_sum * shrink + jnp.sum(weights, axis=-1)
        weights = layout.narrowed(view.drop(weights))
        part = _folded_sums(weights, value) if folded else _sums(weights, value, allowed)
        return top, row_sum, output * shrink[..., None] + part

    return body


def _folded_products(layout, query, key):
    """Queries BKRH by keys BSKH as one product, which reads the keys where they lie.

    Each query has zeros for the heads that are not its own: K times the arithmetic, which
    is little beside moving the keys of each head together.
    """
    B, K, R, H = query.shape
    own = jnp.eye(K, dtype=bool)[None, :, None, :, None]
    query = jnp.where(own, query[:, :, :, None], 0).reshape(B, K * R, K * H)
    key = layout.narrowed(key).reshape(*key.shape[:2], K * H)
    products = _dot("BSX,BYX->BSY", key, query, layout.problem.wide)
    products = jnp.swapaxes(products, 1, 2).reshape(B, K, R, -1)
    return products * layout.operands.scale if layout.narrow else products


def _folded_sums(weights, value):
    """Values BSKD in proportion to weights BKRS, all heads as one product."""
    B, K, R, S = weights.shape
    wide = wide_dtype(weights.dtype)
    value = value.reshape(B, S, -1)
    sums = _dot("BYS,BSX->BYX", weights.reshape(B, K * R, S), value, wide)
    return jnp.einsum("BKRKD->BKRD", sums.reshape(B, K, R, K, -1))


def _products(layout, query, key):
    wide = layout.problem.wide
    return _dot("BKRH,BKSH->BKRS", query, key.astype(wide), wide)


def _sums(weights, value, allowed):
    """The values BKSD in proportion to weights BKRS.

    What is not finite in a value counts as 0 where there is a mask, for 0 · NaN is NaN;
    a row that sees some gets NaN after the sum.
    """
    wide = wide_dtype(weights.dtype)
    if allowed is None:
        return _dot("BKRS,BKSD->BKRD", weights, value, wide)
    value, poison = tile.isolate(value)
    poison = poison.astype(wide)
    total = _dot("BKRS,BKSD->BKRD", weights, value, wide)

    def spoil(total):
        seen = jnp.where(allowed, poison[..., None, :], 0)
        return total + jnp.sum(seen, axis=-1)[..., None]

    return lax.cond(jnp.any(jnp.isnan(poison)), spoil, lambda total: total, total)


def _finish(row_max, row_sum, output):
    """Output and logsumexp of rows that saw all their tiles."""
    empty = row_sum == 0
    row_sum = jnp.where(empty, 1, row_sum)
    logsumexp = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))
    return output / row_sum[..., None], logsumexp


def _cut_active(layout: Layout, active: Active, **at) -> Active:
    """The part of aligned arrays at the blocks `at`."""
    cut = lambda x: layout.cut(x, "BKGTS", **at)
    return active._replace(
        bias=jax.tree.map(cut, active.bias), modifier=jax.tree.map(cut, active.modifier)
    )


def _add_active(layout: Layout, whole: Active, part: Active, **at) -> Active:
    """Adds the derivatives of one tile to their sums."""
    add = lambda whole, part: layout.add(whole, part, "BKGTS", **at)
    return Active(
        jax.tree.map(add, whole.bias, part.bias),
        jax.tree.map(lambda x, y: x + y.astype(x.dtype), whole.captured, part.captured),
        jax.tree.map(add, whole.modifier, part.modifier),
    )


def backward(layout: Layout, outputs, cotangents, wanted: Operands) -> Operands:
    """The cotangents of the wanted operands; None for the others."""
    wide = layout.problem.wide
    _, by_key = schedules(layout)
    output, logsumexp = outputs
    d_output, d_logsumexp = cotangents
    delta = jnp.sum(d_output.astype(wide) * output.astype(wide), axis=-1) - d_logsumexp
    empty = logsumexp == -jnp.inf
    delta = jnp.where(empty, 0, delta)
    logsumexp = jnp.where(empty, jnp.inf, logsumexp)  # so that exp gives 0
    rows = tuple(map(layout.queries, (d_output, logsumexp, delta)))
    actives = _actives(layout)
    pick = lambda want, x: jnp.zeros(x.shape, wide) if want else None
    wants = Active(wanted.bias, wanted.modifier.captured, wanted.modifier.aligned)
    d_active = Active(
        *(jax.tree.map(pick, x, y) for x, y in zip(wants, actives, strict=True))
    )

    def one_head(head, carry):
        d_query, *carry = carry
        queries = tuple(layout.row_blocks(x, **head.at) for x in (layout.query, *rows))
        queries = (layout.scaled(queries[0]), layout.narrowed(queries[1]), *queries[2:])
        d_rows = jnp.zeros_like(jnp.swapaxes(queries[0], -1, -2), wide)
        body = functools.partial(_backward_block, layout, head, queries, by_key)
        d_rows, *carry = _loop(layout.counts["S"], body, (d_rows, *carry))
        d_rows = jnp.swapaxes(d_rows, -1, -2)
        return layout.put_row_blocks(d_query, d_rows, **head.at), *carry

    carry = tuple(
        jnp.zeros(x.shape, wide) for x in (layout.query, layout.key, layout.value)
    )
    results = _heads(layout, one_head, (*carry, d_active))
    return _cotangents(layout, wanted, *results)


def _actives(layout: Layout) -> Active:
    operands, aligned = layout.operands, layout.aligned
    return Active(aligned.bias, operands.modifier.captured, aligned.modifier)


def _backward_block(layout, head, queries, by_key, j, carry):
    """All that one block of keys adds: a loop over the rows that see it."""
    d_rows, d_key, d_value, d_active = carry
    key = layout.narrowed(layout.cut(head.key, "BKS.", S=j))
    value = layout.narrowed(layout.cut(head.value, "BKS.", S=j))
    wide = layout.problem.wide
    body = functools.partial(_backward_tile, layout, head, queries, (key, value), j)
    start = (d_rows, jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide), d_active)
    carry = _visit(by_key, head, j, layout.counts["T"], body, start)
    d_rows, key_part, value_part, d_active = carry
    put = lambda whole, part: layout.put(
        whole, jnp.moveaxis(part, 1, 2), "BSK.", S=j, **head.at
    )
    return d_rows, put(d_key, key_part), put(d_value, value_part), d_active


def _backward_tile(layout, head, queries, keys, j, masked):
    """The body of the loop over the tiles of one block of keys."""
    wide = layout.problem.wide
    isolated = masked and layout.problem.mask is not None

    def body(i, carry):
        d_rows, d_key, d_value, d_active = carry
        query, d_output, logsumexp, delta = (_at(x, i) for x in queries)
        key, value = keys
        view = Tile(layout, head.aligned, i, j, columns_first=True)
        allowed = view.allowed() if masked else None
        keep_allowed = lambda x: x if allowed is None else jnp.where(allowed, x, 0)
        products = _dot("BKSH,BKRH->BKSR", key, query, wide)
        products = products * layout.operands.scale if layout.narrow else products
        chosen = jax.tree.map(
            lambda total, x: None if total is None else x,
            d_active,
            view.active,
            is_leaf=lambda x: x is None,
        )
        logits, pull = jax.vjp(
            lambda x, chosen: view.logits(x, chosen.fill(view.active)), products, chosen
        )
        if isolated:  # what follows mixes rows, and columns, by products with zeros
            query, key = tile.isolate(query)[0], tile.isolate(key)[0]
            d_clean, poison = tile.isolate(d_output)
            logsumexp = logsumexp + poison.astype(wide)
        else:
            d_clean = d_output
        weights = keep_allowed(jnp.exp(logits - logsumexp[..., None, :]))
        d_weights = view.drop(_dot("BKSD,BKRD->BKSR", value, d_output, wide))
        d_logits = keep_allowed(weights * (d_weights - delta[..., None, :]))
        d_products, d_chosen = pull(d_logits)
        if layout.problem.modifier is not None:
            d_products = keep_allowed(d_products)
        d_products = layout.narrowed(d_products)
        dropped = layout.narrowed(view.drop(weights))
        d_key = d_key + _dot("BKSR,BKRH->BKSH", d_products, query, wide)
        d_value = d_value + _dot("BKSR,BKRD->BKSD", dropped, d_clean, wide)
        key = jnp.swapaxes(key, 2, 3)
        d_row = _at(d_rows, i) + _dot("BKHS,BKSR->BKHR", key, d_products, wide)
        d_rows = lax.dynamic_update_index_in_dim(d_rows, d_row, i, 0)
        d_active = _add_active(layout, d_active, d_chosen, T=i, S=j, **head.at)
        return d_rows, d_key, d_value, d_active

    return body


def _at(blocks, i):
    return lax.dynamic_index_in_dim(blocks, i, 0, keepdims=False)


def _cotangents(layout, wanted, d_query, d_key, d_value, d_active) -> Operands:
    """Sums over tiles as cotangents of the operands."""
    operands, S = layout.operands, layout.problem.sizes.S
    d_query = layout.unqueries(d_query)
    finite = jnp.where(jnp.isfinite(operands.query), operands.query, 0)
    d_scale = jnp.sum(d_query * finite.astype(d_query.dtype))
    d_key = d_key[:, :S] * (operands.scale if layout.narrow else 1)
    unalign = lambda d, x: None if d is None else layout.unalign(d, x)
    nothing = jax.tree.map(lambda _: None, wanted)
    return nothing._replace(
        query=d_query * operands.scale,
        key=d_key,
        value=d_value[:, :S],
        scale=d_scale,
        bias=unalign(d_active.bias, operands.bias),
        modifier=Arrays(
            d_active.captured,
            tuple(map(unalign, d_active.modifier, operands.modifier.aligned)),
        ),
    )


def tangent(layout: Layout, outputs, tangents: Operands):
    """The tangents of output and logsumexp, from those of operands; None is zero."""
    wide, scale = layout.problem.wide, layout.operands.scale
    by_query, _ = schedules(layout)
    output, logsumexp = outputs
    safe = layout.queries(jnp.where(logsumexp == -jnp.inf, jnp.inf, logsumexp))
    terms = []
    if tangents.query is not None:
        terms.append(tangents.query.astype(wide) * scale)
    if tangents.scale is not None:
        terms.append(layout.operands.query.astype(wide) * tangents.scale)
    d_query = layout.queries(sum(terms[1:], terms[0])) if terms else None
    d_keys = tuple(
        None if x is None else layout.keys(x.astype(wide))
        for x in (tangents.key, tangents.value)
    )
    align = lambda x: None if x is None else layout.align(x)
    d_active = Active(
        align(tangents.bias),
        tangents.modifier.captured,
        tuple(map(align, tangents.modifier.aligned)),
    )

    def one_head(head, carry):
        cut = lambda x: jnp.moveaxis(layout.cut(x, "BSK.", **head.at), 2, 1)
        d_head = (*jax.tree.map(cut, d_keys), _cut_active(layout, d_active, **head.at))

        def one_block(i, carry):
            rows = lambda x: layout.rows(x, T=i, **head.at)
            query = layout.scaled(rows(layout.query))
            d_rows = None if d_query is None else rows(d_query)
            given = (query, rows(safe), d_rows)
            body = functools.partial(_tangent_tile, layout, head, d_head, given, i)
            D = layout.problem.sizes.D
            start = jnp.zeros(query.shape[:3], wide), jnp.zeros((*query.shape[:3], D), wide)
            parts = _visit(by_query, head, i, layout.counts["S"], body, start)
            return tuple(
                layout.put_rows(whole, part, T=i, **head.at)
                for whole, part in zip(carry, parts, strict=True)
            )

        return _loop(layout.counts["T"], one_block, carry)

    shape = layout.query.shape[:4]
    start = jnp.zeros(shape, wide), jnp.zeros((*shape, layout.problem.sizes.D), wide)
    d_logsumexp, d_sum = map(layout.unqueries, _heads(layout, one_head, start))
    d_output = d_sum - d_logsumexp[..., None] * output.astype(wide)
    return d_output.astype(output.dtype), d_logsumexp


def _tangent_tile(layout, head, d_head, given, i, masked):
    """The body of the loop over the tiles of one query block."""
    wide = layout.problem.wide
    d_keys, d_values, d_actives = d_head

    def body(j, carry):
        total, output = carry
        query, logsumexp, d_query = given
        cut = lambda x: None if x is None else layout.cut(x, "BKS.", S=j).astype(wide)
        key, value, d_key, d_value = map(cut, (head.key, head.value, d_keys, d_values))
        view = Tile(layout, head.aligned, i, j)
        products = _dot("BKRH,BKSH->BKRS", query, key, wide)
        d_products = jnp.zeros_like(products)
        if d_query is not None:
            d_products += _dot("BKRH,BKSH->BKRS", d_query, key, wide)
        if d_key is not None:
            d_products += _dot("BKRH,BKSH->BKRS", query, d_key, wide)
        d_active = _cut_active(layout, d_actives, T=i, S=j)
        chosen = jax.tree.map(
            lambda d, x: None if d is None else x,
            d_active,
            view.active,
            is_leaf=lambda x: x is None,
        )
        d_active = jax.tree.map(lambda d, x: d.astype(x.dtype), d_active, chosen)
        logits, d_logits = jax.jvp(
            lambda x, chosen: view.logits(x, chosen.fill(view.active)),
            (products, chosen),
            (d_products, d_active),
        )
        weights = jnp.exp(logits - logsumexp[..., None])
        d_weights = weights * d_logits
        allowed = view.allowed() if masked else None
        if masked:
            weights = jnp.where(allowed, weights, 0)
            d_weights = jnp.where(allowed, d_weights, 0)
        output = output + _sums(view.drop(d_weights), value, allowed)
        if d_value is not None:
            output = output + _sums(view.drop(weights), d_value, allowed)
        return total + jnp.sum(d_weights, axis=-1), output

    return body


def by_rows(problem: Problem, operands: Operands):
    """Output and logsumexp, whole rows at a time: plain, for JAX to differentiate."""
    sizes, wide = problem.sizes, problem.wide
    layout = Layout(problem, operands, rows_plan(problem))
    key, value = (jnp.moveaxis(x.astype(wide), 2, 1) for x in (layout.key, layout.value))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rows(i):
        query = layout.scaled(layout.rows(layout.query, T=i))
        view = Tile(layout, layout.aligned, i, 0)
        allowed, clean, poison = view.allowed(), key, None
        if allowed is not None:  # the transpose of these products is a mixing one
            query, query_poison = tile.isolate(query)
            clean, key_poison = tile.isolate(key)
            poison = query_poison[..., None] + key_poison[..., None, :]
        logits = view.logits(_products(layout, query, clean), view.active)
        if allowed is not None:
            logits = jnp.where(allowed, logits + poison, -jnp.inf)
        top = lax.stop_gradient(jnp.max(logits, axis=-1))
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(logits - top[..., None])
        total = jnp.sum(weights, axis=-1)
        output = _sums(view.drop(weights), value, allowed)
        return _finish(top, total, output)

    results = lax.map(rows, jnp.arange(layout.counts["T"]))
    whole = (jnp.zeros((*layout.query.shape[:4], sizes.D), wide),)
    whole = (*whole, jnp.zeros(layout.query.shape[:4], wide))
    output, logsumexp = (
        layout.unqueries(layout.put_row_blocks(x, y))
        for x, y in zip(whole, results, strict=True)
    )
    return output.astype(problem.dtype), logsumexp
