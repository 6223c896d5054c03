"""Attends from queries to what a source holds: by parts, or as one call.

A few queries go by `decode`, whose time is that of what is filled. Many are a call of
`jattn.attention` on all slots, which skips blocks beyond what is filled; the views that it
is given cost nothing, as it lays out its inputs in any case. What is rounded or in pages is
never made whole, and goes by `decode` however many queries there are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jattn.api.attention import attended
from jattn.arrays.meshes import across
from jattn.arrays.shapes import Sizes, flatten_batch, unflatten_batch, wide_dtype
from jattn.caches import asked, decode, rounding
from jattn.call.pose import check_sink
from jattn.call.problem import apart
from jattn.implementations.sums import Form, Sums, given_as
from jattn.masks import Lengths
from jattn.operations.compiled import compiled
from jattn.state import State

# Up to so many queries the part that is filled is looked at without skipping more of it.
FEW = 16


def attend(where: str, query, source, end, options, form: Form) -> Any:
    """Attends to the slots before `end` that the mask allows; gives the result in a form.

    Args:
        where: The public function, for messages.
        query: `BTNH`, checked; for sums in the wide precision, as in `attended`.
        source: A `Source`.
        end: A slot that nothing is seen from, int32.
        options: Those of `jattn.attention`.
        form: What is asked for; see `given_as`.
    """
    ask = {"output": _output, "state": _state, "sums": _sums}[form]
    return ask(query, where, source, end, options)


@across("BTN.")
def _output(query, where: str, source, end, options) -> State:
    return _attended(query, where, source, end, options, "output")


@across("BTN. BTN")
def _state(query, where: str, source, end, options) -> State:
    return _attended(query, where, source, end, options, "state")


@across("BTN. BTN BTN")
def _sums(query, where: str, source, end, options) -> Sums:
    return _attended(query, where, source, end, options, "sums")


def _attended(query, where: str, source, end, options, form: Form) -> Any:
    sizes = sizes_of(query, source)
    plain = hasattr(source, "values") and not source.is_rounded
    is_few = isinstance(sizes.T, int) and sizes.T <= FEW  # a symbolic number is not
    if 0 in sizes.BNTS:
        return given_as(form, _nothing(query, sizes), None, query.dtype)
    dtype = dtype_of(query, source)
    if options.get("implementation") is not None or (plain and not is_few):
        given = query if form == "sums" else query.astype(dtype)
        found = attended(where, form, given, *source.vectors(dtype), **options)
        return found._replace(output=found.output.astype(query.dtype))
    sink = check_sink(where, options.get("sink"), sizes)
    narrow = query.astype(dtype) if form == "sums" else query
    problem, operands = asked.posed(where, narrow, sizes, options)
    operands = operands._replace(query=flatten_batch(query, sizes))
    return _decoded(problem, operands, source.flat(), end, sink, form)


def from_last(where: str, source, length, query, count, options, form: Form) -> Any:
    """Attends from queries that stand at the last tokens of each example.

    Args:
        where: The public function, for messages.
        source: A `Source` whose slots hold the tokens in order.
        length: How many there are, one number or one of each example.
        query: `BTNH`, checked.
        count: How many of the T queries count; the last ones of the tokens are theirs.
        options: Those of `jattn.attention`.
        form: What is asked for; see `given_as`.
    """
    asked.check_options(where, options)
    T, batch = query.shape[-3], source.batch
    rows = None if count is None else asked.check_count(where, count, length.shape, T)
    length = length if length.ndim == 0 else asked.of_each(length, batch)
    if rows is not None and jnp.ndim(rows):
        rows = asked.of_each(rows, batch)
    options = options | {"mask": asked.mask_of(where, options, Lengths(length, rows))}
    if options.get("query_position") is None:
        first = length - (T if rows is None else rows)
        several = jnp.arange(T, dtype=jnp.int32).reshape(*[1] * first.ndim, T)
        options["query_position"] = first[..., None] + several if first.ndim else first
    end = jnp.minimum(jnp.max(length, initial=0), source.slots)
    return attend(where, query, source, end, options, form)


@compiled()
def spoiled(state, overflowed):
    """Gives a tree of arrays with NaN for examples that were appended more than fits.

    A compiled program cannot raise, and must not be wrong in silence.
    """

    def spoil(x):
        over = overflowed.reshape(*overflowed.shape, *[1] * (x.ndim - overflowed.ndim))
        return jnp.where(over, jnp.nan, x)

    return jax.tree.map(spoil, state)


def dtype_of(query, source) -> jnp.dtype:
    """Gives the dtype of a call on vectors of their own; wide for those with scales.

    In half precision these would be rounded once more, and overflow float16.
    """
    wide = wide_dtype(query.dtype)
    return wide if rounding.is_rounded(source.dtype) else jnp.dtype(source.dtype)


def sizes_of(query, source) -> Sizes:
    """Gives the letters of a call."""
    *batch, T, N, H = query.shape
    K, S, D = source.num_heads, source.slots, source.value_dim
    return Sizes(tuple(batch), T=T, S=S, N=N, K=K, H=H, D=D)


@compiled(static=(0, 5, 6))
def _decoded(problem, operands, source, end, sink, form, kernel=decode.KERNEL) -> Any:
    """Attends from posed queries, in one program."""
    operands, spoil = apart(operands)
    sums = Sums(*decode.attend(problem, operands, source, end, kernel))
    found = spoil(given_as(form, sums, sink, problem.dtype))
    return jax.tree.map(lambda x: unflatten_batch(x, problem.sizes), found)


def _nothing(query, sizes: Sizes) -> Sums:
    """Gives the sums of queries that see nothing, all of them 0."""
    zeros = functools.partial(jnp.zeros, dtype=wide_dtype(query.dtype))
    rows = query.shape[:-1]
    return Sums(zeros((*rows, sizes.D)), zeros(rows), zeros(rows))
