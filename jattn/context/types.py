"""The context that types say, on a mesh with explicit axes, where none was given.

There the type of an array says along which mesh axes it is cut, while a program is traced:
so there is nothing left to say. On a mesh with automatic axes no type says it.
"""

import functools
import inspect
import math
from typing import Any

import jax
from jax.sharding import AxisType

from jattn.arrays.checks import is_word
from jattn.context.place import Axes, Context, axes_of

__all__ = ["told_by_types"]


def told_by_types(function):
    """Makes a public function one that reads its `context` off the types, if it can."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def told(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        whole_rows = is_word(given.get("implementation"), ("dense", "cudnn"))
        if given.get("context") is None and not whole_rows:
            context = _context(given.get("query"), given.get("key"))
            if context is not None:
                kwargs = kwargs | {"context": context}
        return function(*args, **kwargs)

    return told


def _context(query, key) -> Context | None:
    """Reads the context of queries and keys that lie alike; None where they do not."""
    spec_q, spec_k = _spec(query), _spec(key)
    if spec_q is None or spec_k is None or len(spec_q) != 4 or len(spec_k) != 4:
        return None
    (B, T, N, H), (key_B, S, K, key_H) = spec_q, spec_k
    if not S or T not in ((), S) or key_B != B or N != K or H or key_H:
        return None
    counts = dict(jax.typeof(query).sharding.mesh.shape)
    sizes = zip((*query.shape, *key.shape), (B, T, N, H, B, S, K, H), strict=True)
    count = lambda axes: math.prod(counts[name] for name in axes)
    if len(S) > 2 or not all(_divides(count(axes), size) for size, axes in sizes):
        return None
    strategy = None if T else "merge"
    axis: Any = S
    return Context(axis, strategy=strategy, batch=B or None, heads=N or None)


def _divides(count: int, size) -> bool:
    return isinstance(size, int) and size > 0 and size % count == 0


def _spec(array) -> list[Axes] | None:
    """Reads the mesh axes of each axis of an array; None where its type says none."""
    if not isinstance(array, jax.Array):
        return None
    sharding = jax.typeof(array).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return [axes_of(names) for names in sharding.spec]
