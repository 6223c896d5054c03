"""The cotangents of one tile, of columns × rows; `backward` has the formulas."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jattn.implementations import shared
from jattn.implementations.blockwise.layout import Layout
from jattn.implementations.blockwise.products import columns_of, dot
from jattn.implementations.blockwise.strips import block_of, part_of, put_part
from jattn.implementations.blockwise.tiles import Active, Tile, block_at, exponentials


class Rows(NamedTuple):
    """What backward needs of each query: blocks × BKR, then any further axes."""

    query: jax.Array  # scaled, unless products are narrow
    d_output: jax.Array
    top: jax.Array
    inverse: jax.Array  # 1 / total
    doubt: jax.Array  # see `shared.doubts`
    delta: jax.Array
    d_logsumexp: jax.Array
    d_logits: jax.Array  # the sum of d_logitₛ, which is d_logsumexp, never divided

    def at(self, layout: Layout, place) -> "Rows":
        """Gives the rows of one tile: those of a whole block, or of a strip."""
        block, place = block_of(layout, place)
        return Rows(*(part_of(layout, block_at(x, block), place) for x in self))


def keys_of(layout: Layout, head, j):
    """Cuts the keys and values of one block, in the dtype of products.

    Gives the keys a second time, without what they have in common, for d_query; see
    `backward`.
    """
    cut = lambda x: layout.narrowed(layout.cut(x, "BKS.", S=j))
    key, value = cut(head.key), cut(head.value)
    if head.centre is None:
        return key, value, key
    return key, value, layout.narrowed(key.astype(layout.problem.wide) - head.centre)


def _pairs(layout: Layout, head, at, rows: Rows, key, masked):
    """Makes a tile: the tile itself, which pairs count, and their scaled products BKSR."""
    view = Tile(layout, head.aligned, *at, columns_first=True)
    allowed = view.allowed() if masked else None
    products = columns_of(rows.query, key, layout.problem.wide)
    if layout.narrow:
        products = shared.rounded(products * layout.operands.scale)
    if layout.problem.modifier is not None:
        products = shared.harmless(products, allowed)
    return view, allowed, products


def _weights(layout: Layout, logits, rows: Rows, allowed):
    """Computes the weights of a tile.

    A weight is exp(logit − top) / total. Only narrow products need this division here;
    otherwise `_rows` has divided by the total already, and the weights are exponentials.
    """
    row = lambda x: x[..., None, :]
    powers = exponentials(logits, row(rows.top))
    weights = powers * row(rows.inverse) if layout.narrow else powers
    return weights if allowed is None else jnp.where(allowed, weights, 0)


def _d_weights(view: Tile, rows: Rows, value):
    """Computes the cotangents of the weights, vₛ · d_output, after dropout's choice."""
    wide = view.problem.wide
    return view.drop(dot("BKSD,BKRD->BKSR", value, rows.d_output, wide))


def add_deltas(head, queries: Rows, layout, masked, keys, at, deltas):
    """Adds what one tile contributes to δ = Σₛ weightₛ vₛ · d_output of its rows."""
    rows, (key, value, _) = queries.at(layout, at[0]), keys
    view, allowed, products = _pairs(layout, head, at, rows, key, masked)
    logits = view.logits(products, view.active)
    weights = _weights(layout, logits, rows, allowed)
    # XLA:CPU (jax 0.10) fuses a product of vectors of up to 32 numbers with the sum over
    # its first axis, and then the sum is wrong. It does not fuse across a `where`.
    part = weights * shared.rounded(_d_weights(view, rows, value))
    # A hidden value may be infinite, and 0 · ∞ is NaN.
    part = part if allowed is None else jnp.where(allowed, part, 0)
    part = jnp.sum(part, axis=-2)
    part = part if layout.narrow else part * rows.inverse
    return _add_rows(layout, deltas, part, at[0])


def add_tile(head, queries: Rows, first, layout, masked, keys, at, carry):
    """Adds the contribution of one tile: of a whole one, or of a strip.

    It computes, with δ and d_logsumexp of the row,

        d_logitₛ = weightₛ (vₛ · d_output − (δ − d_logsumexp))

    and pulls it back through bias and modifier to the products. The sums over the queries
    are those of a block of keys, which starts at the key `first`.
    """
    isolated = masked and layout.problem.mask is not None
    row = lambda x: x[..., None, :]
    *sums, d_active, d_scale = carry
    (i, j), (key, value, centred) = at, keys
    rows = queries.at(layout, i)
    view, allowed, products = _pairs(layout, head, at, rows, key, masked)
    keep_allowed = lambda x: x if allowed is None else jnp.where(allowed, x, 0)
    # Only arrays whose cotangents are wanted are differentiated.
    chosen = view.active.where(d_active)
    logits, pull = jax.vjp(
        lambda x, chosen: view.logits(x, chosen.fill(view.active)), products, chosen
    )
    clean = rows.d_output
    if isolated:  # the products below mix rows, and columns, and 0 · NaN is NaN
        centred = shared.isolate(centred)[0]
        clean, poison = shared.isolate(rows.d_output)
        # Through top, a NaN of d_output reaches the pairs of its row that count.
        top = rows.top + poison.astype(layout.problem.wide)
        rows = rows._replace(query=shared.isolate(rows.query)[0], top=top)
    weights = _weights(layout, logits, rows, allowed)
    d_weights = _d_weights(view, rows, value)
    d_weights = shared.without_doubt(d_weights, row(rows.delta), row(rows.doubt))
    offset = rows.delta - rows.d_logsumexp
    d_products, d_chosen = pull(keep_allowed(weights * (d_weights - row(offset))))
    # The derivative of a modifier may be infinite or NaN at a masked pair.
    if layout.problem.modifier is not None:
        d_products = keep_allowed(d_products)
    if d_scale is not None:  # products are scaled, so this sums up scale · d_scale
        d_scale = d_scale + shared.sum_all(keep_allowed(d_products * products))
    given = rows.query, centred, clean
    place = i, layout.first_key(j) - first
    sums = _add_products(layout, sums, given, place, d_products, view.drop(weights))
    d_active = _add_active(layout, d_active, d_chosen, T=i, S=j, **head.at)
    return *sums, d_active, d_scale


def _add_products(layout, sums, given, place, d_products, weights):
    """Adds the contribution of a tile to d_query, d_key and d_value.

        d_q += Σₛ d_logitₛ kₛ        d_kₛ += Σ d_logitₛ q        d_vₛ += Σ weightₛ d_output

    d_query is transposed, BKHR: its columns are queries. `place` says which ones the tile
    has, and at which key of d_key and d_value it starts.
    """
    d_rows, d_key, d_value = sums
    query, key, d_output = given
    i, first = place
    wide = layout.problem.wide
    d_products, weights = layout.narrowed(d_products), layout.narrowed(weights)
    d_key = _add_keys(d_key, dot("BKSR,BKRH->BKSH", d_products, query, wide), first)
    d_value = _add_keys(d_value, dot("BKSR,BKRD->BKSD", weights, d_output, wide), first)
    key = jnp.swapaxes(key, 2, 3)
    d_query = dot("BKHS,BKSR->BKHR", key, d_products, wide)
    return _add_rows(layout, d_rows, d_query, i, axis=3), d_key, d_value


def _add_keys(sums, part, first):
    """Adds the sums of a tile to those of its block of keys, from the key `first` on."""
    if sums.shape == part.shape:
        return sums + part
    own = lax.dynamic_slice_in_dim(sums, first, part.shape[2], axis=2)
    return lax.dynamic_update_slice_in_dim(sums, own + part, first, axis=2)


def _add_rows(layout: Layout, blocks, part, place, axis=2):
    """Adds the numbers of a tile's rows to those of all rows: blocks × BKR or BKHR."""
    block, place = block_of(layout, place)
    rows = block_at(blocks, block)
    total = part_of(layout, rows, place, axis) + part
    total = put_part(layout, rows, total, place, axis)
    return lax.dynamic_update_index_in_dim(blocks, total, block, 0)


def _add_active(layout: Layout, whole: Active, part: Active, **at) -> Active:
    """Adds the derivatives of one tile to their sums."""
    add = lambda whole, part: layout.add(whole, part, "BKGTS", **at)
    return Active(
        jax.tree.map(add, whole.bias, part.bias),
        jax.tree.map(lambda x, y: x + y.astype(x.dtype), whole.captured, part.captured),
        jax.tree.map(add, whole.modifier, part.modifier),
    )
