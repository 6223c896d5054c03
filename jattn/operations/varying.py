"""Functions of arrays whose values differ from device to device, run as one operation.

Inside `jax.shard_map` types say over which mesh axes an array's values differ, and JAX
refuses an equation whose operands differ over different axes. A user's function is traced
before these axes are known: `ids[t] == ids[s]` is one program, whether t comes from
`lax.axis_index` or not. What the library computes from such programs needs no other
device. So it is one operation, and the types inside it say nothing of devices.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jattn.arrays.meshes import axes_that_vary
from jattn.operations.operation import Operation, retype

_NOTHING: tuple[frozenset[int], frozenset[int]] = frozenset(), frozenset()


def locally(function: Callable, statics: tuple[Hashable, ...], *trees, linear=_NOTHING):
    """Returns `function(*statics, *trees)`, also where arrays in the trees vary.

    Floating results have derivatives of every order. `function` must be defined in a
    module, not inside a call, so that later calls pass an equal one and compile nothing.
    `linear` has the leaves of the trees that the results are linear in, by their indices,
    and the results that do not depend on them.
    """
    leaves, tree = jax.tree.flatten(trees)
    if not axes_that_vary(*leaves):
        return function(*statics, *trees)
    # Random keys pass through the operation as the integers that they are made of.
    keys = [_key_impl(x) for x in leaves]
    leaves = [
        x if key is None else jax.random.key_data(x)
        for x, key in zip(leaves, keys, strict=True)
    ]
    config: Any = jax.config  # `Any`, for type checkers do not know its attributes
    precision = config.jax_default_matmul_precision
    local = Local(function, statics, tree, tuple(keys), precision, (True,), linear)
    types, out_tree = jax.tree.flatten(local.shapes(leaves))
    real = [jnp.issubdtype(x.dtype, jnp.floating) for x in types]
    results = [None] * len(types)
    # Floating and other results are two operations: only floating ones have derivatives.
    for wanted in (real, [not x for x in real]):
        if any(wanted):
            part = dataclasses.replace(local, wanted=tuple(wanted))
            given = leaves if wanted is real else map(jax.lax.stop_gradient, leaves)
            found = iter(part(*given))
            results = [
                next(found) if want else x for want, x in zip(wanted, results, strict=True)
            ]
    return out_tree.unflatten(results)


@dataclasses.dataclass(frozen=True)
class Local(Operation):
    """An operation that computes the `wanted` results of a function."""

    function: Callable
    statics: tuple[Hashable, ...]
    tree: Any
    keys: tuple  # for each argument the `key_impl` of a random key, None for other arrays
    precision: str | None
    wanted: tuple[bool, ...]
    linear_of: tuple[frozenset[int], frozenset[int]]

    @property
    def outputs(self) -> int:
        """Gives the number of wanted results."""
        return sum(self.wanted)

    @property
    def linear_in(self) -> frozenset[int]:
        """Gives the arguments that it is linear in, as `locally` was told."""
        return self.linear_of[0]

    @property
    def constant(self) -> frozenset[int]:
        """Gives the wanted results that do not depend on them."""
        wanted = [i for i, want in enumerate(self.wanted) if want]
        return frozenset(i for i, x in enumerate(wanted) if x in self.linear_of[1])

    def shapes(self, arrays):
        """Gives the shapes of all results."""
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        return jax.eval_shape(self._call, *shapes)

    def types(self, *types) -> list:
        """Gives the types of the wanted results.

        They vary over the same axes as the arguments, and no mesh axis cuts them.
        """
        results = zip(jax.tree.leaves(self.shapes(types)), self.wanted, strict=True)
        return [
            retype(types[0], x.shape, x.dtype, (None,) * len(x.shape))
            for x, want in results
            if want
        ]

    def fast(self, *arrays, spread):
        """Computes the wanted results by the function."""
        del spread
        return self.reference(*arrays)

    def reference(self, *arrays):
        """Computes the wanted results by the function."""
        results = zip(jax.tree.leaves(self._call(*arrays)), self.wanted, strict=True)
        return tuple(jnp.asarray(x) for x, want in results if want)

    def _call(self, *arrays):
        arrays = [
            x if key is None else jax.random.wrap_key_data(x, impl=key)
            for x, key in zip(arrays, self.keys, strict=True)
        ]
        # This is traced after the caller's `jax.default_matmul_precision` may have ended.
        with jax.default_matmul_precision(self.precision):
            return self.function(*self.statics, *self.tree.unflatten(arrays))


def _key_impl(x):
    """Gives the implementation of a random key; None for any other array."""
    if not jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        return None
    return jax.random.key_impl(x)
