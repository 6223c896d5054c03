"""A function with hand-written derivatives that JAX can still transform in every way.

An `Operation` is a hashable object with a `fast` way to compute it and a `reference`, the
same function in a form that JAX can differentiate backward. All operations run through
one JAX primitive, whose rules make new operations out of old ones:

    any            jvp       →  Pushforward(operation), linear in the tangents
    Pushforward    transpose →  Pullback(operation), linear in the cotangents
    Pullback       transpose →  Pushforward(operation)
    any            vmap      →  Mapped(operation), a loop over the mapped axis; or an
                                operation of more, where one can take the axis as its own

An operation may bring its own `push` and `pull`; else they are JAX's derivatives, forward
through `fast` and backward through `reference`. So derivatives exist to every order.
"""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jattn.shapes import is_one

# How many elements a vmapped operation may hold at once before it runs as a loop.
BUDGET = 2**21


class Operation:
    """A function of arrays to a tuple of floating arrays; subclasses are hashable.

    Attributes:
        outputs: How many arrays it returns.
        linear: How many of its last arguments it is linear in.
        names: Where not empty, the names under which its outputs are kept for its
            derivatives, which take them after the arguments.
        elements: About how many elements it holds at once beside its arguments.
    """

    @property
    def outputs(self) -> int:
        """One, unless said otherwise."""
        return 1

    @property
    def linear(self) -> int:
        """None, unless said otherwise."""
        return 0

    @property
    def linear_in(self) -> frozenset[int]:
        """Which of its other arguments it is linear in while the rest stays; none here."""
        return frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """None, unless said otherwise."""
        return ()

    @property
    def elements(self) -> int:
        """None, unless said otherwise."""
        return 0

    def types(self, *types) -> list:
        """The types of the outputs, as `jax.typeof` gives them, for the arguments'."""
        raise TypeError(f"{type(self).__name__} must define `types`")

    def fast(self, *arrays, spread: bool) -> Any:
        """Computes it; `spread` says that the arrays may lie on several devices."""
        raise TypeError(f"{type(self).__name__} must define `fast`")

    def reference(self, *arrays) -> Any:
        """Computes it in a form that JAX differentiates backward in linear memory."""
        raise TypeError(f"{type(self).__name__} must define `reference`")

    def push(self, active, primals, outputs, tangents, spread: bool):
        """The tangents of the outputs, for tangents of the active arguments."""
        del outputs
        fast = functools.partial(self.fast, spread=spread)
        return jax.jvp(*restrict(fast, active, primals), tuple(tangents))[1]

    def pull(self, active, primals, outputs, cotangents, spread: bool):
        """The cotangents of the active arguments, for cotangents of the outputs."""
        del outputs, spread
        function, chosen = restrict(self.reference, active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def pushed(self, active) -> "Operation":
        """The operation that gives the tangents of this one."""
        return Pushforward(self, active)

    def transposed(self) -> "Operation":
        """The operation that gives the cotangents of the linear arguments."""
        raise TypeError(f"{type(self).__name__} is not linear")

    def joined(self, size, mapped, apart) -> "Joined | None":
        """Computes all slices of the `mapped` arguments as one call; None: it cannot.

        Args:
            size: How many slices there are.
            mapped: Which arguments have a slice each.
            apart: Which others must be given to each slice apart, for their derivatives
                are asked for slice by slice.
        """
        del size, mapped, apart
        return None

    def on(self, platform: str) -> "Operation":
        """The operation that computes it on a platform: itself, unless said otherwise.

        The platform is "export" where it is CUDA and `jax.export` is to keep the program,
        which it does for few of the calls that a GPU has.
        """
        del platform
        return self

    def __call__(self, *arrays) -> tuple[jax.Array, ...]:
        """Runs it, differentiably."""
        return tuple(_primitive.bind(*_vary(arrays), operation=self))


@dataclasses.dataclass(frozen=True)
class Kept:
    """An argument that is the same for every slice, and stays as it is."""

    def join(self, array, is_mapped: bool):
        """The array itself, which is not mapped."""
        del is_mapped
        return array


@dataclasses.dataclass(frozen=True)
class Leading:
    """An array whose first axis, of `length`, a mapped axis of `size` can join.

    The first axis may be 1 where it stands for all. Such an array stays as it is unless it
    is mapped, or must be given to each slice `apart`.
    """

    size: Any
    length: Any
    apart: bool

    def join(self, array, is_mapped: bool):
        """The array, its mapped axis first, with one axis for both."""
        if not is_mapped:
            if not self.apart and is_one(array.shape[0]):
                return array
            array = jnp.broadcast_to(array, (self.size, *array.shape))
        _, _, *rest = array.shape
        array = jnp.broadcast_to(array, (self.size, self.length, *rest))
        return array.reshape(self.size * self.length, *rest)

    def part(self, array, shape):
        """The transpose of `join`, for a mapped array of this shape."""
        array = array.reshape(self.size, self.length, *array.shape[1:])
        if is_one(shape[1]) and not is_one(self.length):
            return jnp.sum(array, axis=1, keepdims=True, dtype=array.dtype)
        return array


class Joined(NamedTuple):
    """An operation that computes all slices of a mapped axis, and how arrays join."""

    operation: Operation
    arguments: tuple[Any, ...]  # each a `Leading`, or what has its `join`
    outputs: tuple[Leading, ...]

    def __call__(self, arrays, mapped, types):
        """Runs it on arrays with the mapped axis first, to outputs of these types."""
        slots = zip(self.arguments, arrays, mapped, strict=True)
        outputs = self.operation(*(slot.join(x, flag) for slot, x, flag in slots))
        slots = zip(self.outputs, outputs, types, strict=True)
        return [slot.part(x, like.shape) for slot, x, like in slots]


@dataclasses.dataclass(frozen=True)
class _Derivative(Operation):
    """Takes the arguments of `operation`, its outputs where kept, and a linear rest."""

    operation: Operation
    active: tuple[bool, ...]

    @property
    def elements(self):
        """More than the operation, as there is more to hold."""
        return 2 * self.operation.elements

    def on(self, platform):
        """That of the operation for the platform."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def split(self, arrays):
        """The arguments, the outputs, and the rest."""
        count = len(self.active)
        kept = count + len(self.operation.names)
        return arrays[:count], arrays[count:kept], arrays[kept:]

    def join(self, size, mapped, apart):
        """The operation joined, its active arguments apart where `apart` says so too."""
        apart = [x or y for x, y in zip(apart, self.split(mapped)[0], strict=True)]
        joined = self.operation.joined(size, self.split(mapped)[0], tuple(apart))
        if joined is None:
            return None
        kept = joined.outputs if self.operation.names else ()
        return joined, (*joined.arguments, *kept), _choose(self.active, joined.arguments)


@dataclasses.dataclass(frozen=True)
class Pushforward(_Derivative):
    """The tangents of an operation, from those of its active arguments."""

    @property
    def outputs(self):
        """One for each output."""
        return self.operation.outputs

    @property
    def linear(self):
        """The tangents."""
        return sum(self.active)

    def types(self, *types):
        """Those of the outputs."""
        return self.operation.types(*self.split(types)[0])

    def fast(self, *arrays, spread):
        """By the operation's own rule."""
        return self.operation.push(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """By JAX's."""
        primals, _, tangents = self.split(arrays)
        restricted = restrict(self.operation.reference, self.active, primals)
        return jax.jvp(*restricted, tuple(tangents))[1]

    def transposed(self):
        """The pullback."""
        return Pullback(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Its arguments apart wherever their tangents are."""
        primals, _, tangents = self.split(tuple(map(operator.or_, mapped, apart)))
        tangents = iter(tangents)
        tangents = [flag and next(tangents) for flag in self.active]
        found = self.join(size, mapped, tuple(map(operator.or_, primals, tangents)))
        if found is None:
            return None
        inner, arguments, active = found
        operation = Pushforward(inner.operation, self.active)
        return Joined(operation, (*arguments, *active), inner.outputs)


@dataclasses.dataclass(frozen=True)
class Pullback(_Derivative):
    """The cotangents of an operation's active arguments, from those of its outputs."""

    @property
    def outputs(self):
        """One for each active argument."""
        return sum(self.active)

    @property
    def linear(self):
        """The cotangents."""
        return self.operation.outputs

    def types(self, *types):
        """Those of the active arguments."""
        return _choose(self.active, types[: len(self.active)])

    def fast(self, *arrays, spread):
        """By the operation's own rule."""
        return self.operation.pull(self.active, *self.split(arrays), spread)

    def reference(self, *arrays):
        """By JAX's."""
        primals, _, cotangents = self.split(arrays)
        function, chosen = restrict(self.operation.reference, self.active, primals)
        return jax.vjp(function, *chosen)[1](tuple(cotangents))

    def transposed(self):
        """The pushforward."""
        return Pushforward(self.operation, self.active)

    def joined(self, size, mapped, apart):
        """Its active arguments apart, for each slice has a cotangent of its own."""
        apart = map(operator.or_, self.split(apart)[0], self.active)
        found = self.join(size, mapped, tuple(apart))
        if found is None:
            return None
        inner, arguments, active = found
        operation = Pullback(inner.operation, self.active)
        return Joined(operation, (*arguments, *inner.outputs), tuple(active))


@dataclasses.dataclass(frozen=True)
class Mapped(Operation):
    """An operation for each slice of the `mapped` arguments along a new first axis.

    Outputs are stacked, or `summed` as the cotangent of an argument not mapped must be.
    """

    operation: Operation
    size: int
    mapped: tuple[bool, ...]
    summed: tuple[bool, ...]

    @property
    def outputs(self):
        """As many as the operation."""
        return self.operation.outputs

    @property
    def linear(self):
        """As the operation."""
        return self.operation.linear

    @property
    def linear_in(self):
        """As the operation."""
        return self.operation.linear_in

    @property
    def names(self):
        """As the operation."""
        return self.operation.names

    @property
    def chunk(self):
        """How many slices run at once: as many as fit, for small ones gain by it."""
        if not isinstance(self.size, int):
            return 1
        return max(1, min(self.size, BUDGET // max(self.operation.elements, 1)))

    @property
    def elements(self):
        """Those of the slices that run at once."""
        return self.chunk * self.operation.elements

    def types(self, *types):
        """Those of the operation, with the new axis where stacked."""
        inner = [
            retype(x, x.shape[1:], spec=x.sharding.spec[1:]) if mapped else x
            for x, mapped in zip(types, self.mapped, strict=True)
        ]
        return [
            x if summed else retype(x, (self.size, *x.shape), spec=(None, *x.sharding.spec))
            for x, summed in zip(self.operation.types(*inner), self.summed, strict=True)
        ]

    def on(self, platform):
        """That of the operation for the platform, mapped."""
        return dataclasses.replace(self, operation=self.operation.on(platform))

    def fast(self, *arrays, spread):
        """Chunk by chunk; all at once where a loop would cut an axis of many devices."""
        function = functools.partial(self.operation.fast, spread=spread)
        return self._run(function, arrays, self.size if spread else self.chunk)

    def reference(self, *arrays):
        """Chunk by chunk."""
        return self._run(jax.checkpoint(self.operation.reference), arrays, self.chunk)

    def pushed(self, active):
        """The tangents, mapped likewise."""
        kept = (True,) * len(self.names)
        mapped = (*self.mapped, *kept, *_choose(active, self.mapped))
        operation = self.operation.pushed(active)
        return Mapped(operation, self.size, mapped, self.summed)

    def transposed(self):
        """The transpose, mapped where this one stacks and summed where it broadcasts."""
        fixed = len(self.mapped) - self.linear
        mapped = (*self.mapped[:fixed], *(not x for x in self.summed))
        summed = tuple(not x for x in self.mapped[fixed:])
        return Mapped(self.operation.transposed(), self.size, mapped, summed)

    def _run(self, function, arrays, chunk):
        axes = [0 if mapped else None for mapped in self.mapped]

        def at_once(size, *arrays):
            if isinstance(size, int) and size == 1:  # kernels are not to be mapped
                return self._one(function, arrays)
            outputs = jax.vmap(function, axes, axis_size=size)(*arrays)
            return [
                jnp.sum(x, axis=0, dtype=x.dtype) if summed else x
                for x, summed in zip(outputs, self.summed, strict=True)
            ]

        if chunk is self.size or chunk == self.size:
            return at_once(self.size, *arrays)
        return self._loop(at_once, arrays, chunk)

    def _one(self, function, arrays):
        pairs = zip(arrays, self.mapped, strict=True)
        outputs = function(*(x[0] if mapped else x for x, mapped in pairs))
        pairs = zip(outputs, self.summed, strict=True)
        return [x if summed else x[None] for x, summed in pairs]

    def _loop(self, at_once, arrays, chunk):
        count = self.size // chunk
        cut = lambda part: [
            part(x) if mapped else x for x, mapped in zip(arrays, self.mapped, strict=True)
        ]
        head = lambda x: x[: count * chunk].reshape(count, chunk, *x.shape[1:])
        types = self.types(*map(jax.typeof, arrays))
        sums = [
            jnp.zeros(x.shape, x.dtype)
            for x, summed in zip(types, self.summed, strict=True)
            if summed
        ]

        def step(sums, scanned):
            scanned = iter(scanned)
            given = [
                next(scanned) if mapped else x
                for x, mapped in zip(arrays, self.mapped, strict=True)
            ]
            outputs = at_once(chunk, *given)
            sums = [
                total + x
                for total, x in zip(sums, _choose(self.summed, outputs), strict=True)
            ]
            return sums, _choose([not x for x in self.summed], outputs)

        xs = _choose(self.mapped, cut(head))
        sums, stacked = jax.lax.scan(step, sums, xs)
        stacked = [x.reshape(count * chunk, *x.shape[2:]) for x in stacked]
        sums, stacked = iter(sums), iter(stacked)
        outputs = [next(sums) if summed else next(stacked) for summed in self.summed]
        rest = 0 if chunk == 1 else self.size % chunk
        if not rest:
            return outputs
        tail = at_once(rest, *cut(lambda x: x[count * chunk :]))
        return [
            x + y if summed else jnp.concatenate([x, y])
            for x, y, summed in zip(outputs, tail, self.summed, strict=True)
        ]


@custom_vmap
def _in_any_slice(predicate):
    return predicate


@_in_any_slice.def_vmap
def _(size, mapped, predicate):
    del size, mapped
    return _in_any_slice(jnp.any(predicate, axis=0)), False


def cond_any(predicate, mend, otherwise, *operands):
    """`jax.lax.cond` that runs one branch in a `vmap` too: `mend`, if any slice asks.

    So `mend` must be right where `otherwise` is. A condition that differs from slice to
    slice makes JAX run both branches for all of them.
    """
    return jax.lax.cond(_in_any_slice(predicate), mend, otherwise, *operands)


def _choose(flags, items) -> list:
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def restrict(function, active, primals):
    """The function of its active arguments alone, and those."""

    def restricted(*chosen):
        chosen = iter(chosen)
        return tuple(
            function(
                *(
                    next(chosen) if flag else x
                    for flag, x in zip(active, primals, strict=True)
                )
            )
        )

    return restricted, tuple(_choose(active, primals))


_primitive = Primitive("jattn")
_primitive.multiple_results = True


@functools.partial(jax.jit, static_argnums=0)
def _compiled(operation, *arrays):
    return operation(*arrays)


@_primitive.def_impl
def _run(*arrays, operation):
    # Without `jit`, and where JAX runs again what gave a NaN or Inf, this would call itself
    # for ever. What takes the results looks at them.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _compiled(operation, *arrays)


@_primitive.def_abstract_eval
def _abstract(*types, operation):
    return operation.types(*types)


def retype(like, shape, dtype=None, spec=None):
    """The type of an array that lies where one of type `like` does."""
    spec = like.sharding.spec if spec is None else spec
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return like.update(shape=shape, dtype=dtype, sharding=sharding, weak_type=False)


def _vary(arrays):
    """The arrays, made to vary over every axis of a `shard_map` that one varies over."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def _jvp(primals, tangents, *, operation):
    outputs = operation(*primals)
    if operation.names:
        outputs = tuple(map(checkpoint_name, outputs, operation.names))
    active = tuple(type(tangent) is not ad.Zero for tangent in tangents)
    if not any(active):
        return outputs, [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in outputs]
    fixed = len(primals) - operation.linear
    if any(active[:fixed]):  # the linear arguments' too: all in one pass
        kept = outputs if operation.names else ()
        pushed = operation.pushed(active)
        return outputs, list(pushed(*primals, *kept, *_choose(active, tangents)))
    rest = map(ad.instantiate_zeros, tangents[fixed:])
    return outputs, list(operation(*primals[:fixed], *rest))


def _transpose(cotangents, *arrays, operation):
    fixed = len(arrays) - operation.linear
    cotangents = map(ad.instantiate_zeros, cotangents)
    unknown = tuple(map(ad.is_undefined_primal, arrays[:fixed]))
    if any(unknown):
        return _transpose_in(unknown, cotangents, arrays, operation)
    results = operation.transposed()(*arrays[:fixed], *cotangents)
    wanted = map(ad.is_undefined_primal, arrays[fixed:])
    results = [x if want else None for x, want in zip(results, wanted, strict=True)]
    return [None] * fixed + results


def _transpose_in(unknown, cotangents, arrays, operation):
    """Transposes an operation in arguments that it happens to be linear in."""
    if not {i for i, flag in enumerate(unknown) if flag} <= operation.linear_in:
        raise ValueError(
            "jattn: `jax.linear_transpose` must be asked in the values alone, for "
            "attention is linear in nothing else; use `jax.vjp`."
        )
    fill = lambda x: jnp.zeros(x.aval.shape, x.aval.dtype)
    arrays = [fill(x) if ad.is_undefined_primal(x) else x for x in arrays]
    kept = operation(*arrays) if operation.names else ()
    results = iter(Pullback(operation, unknown)(*arrays, *kept, *cotangents))
    return [next(results) if flag else None for flag in unknown]


def _batch(arrays, axes, *, operation):
    mapped = tuple(axis is not None for axis in axes)
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays, axes, strict=True)
    ]
    size = _choose(mapped, moved)[0].shape[0]
    each = Mapped(operation, size, mapped, (False,) * operation.outputs)
    types = list(map(jax.typeof, moved))
    specs = [x.sharding.spec for x in _choose(mapped, types)]
    # The axis comes before the batch, which then cannot be divided among devices.
    divided = any(len(spec) > 1 and spec[1] is not None for spec in specs)
    joined = None if divided else operation.joined(size, mapped, (False,) * len(mapped))
    outputs = each(*moved) if joined is None else joined(moved, mapped, each.types(*types))
    return outputs, [0] * len(outputs)


def _jet(primals, series, *, operation):
    """Gives the coefficients of a Taylor series, from derivatives along a path.

    path(time) = f(x + time · x₁ + time² · x₂ + …)        coefficient k: path⁽ᵏ⁾(0) / k!
    """

    def path(time):
        return operation(*map(functools.partial(_moved, time), primals, series))

    start = jnp.zeros(())
    outputs, terms = path(start), []
    for order, _ in enumerate(series[0], 1):
        path = functools.partial(_slope, path)
        terms.append([x / math.factorial(order) for x in path(start)])
    return outputs, list(zip(*terms, strict=True))


def _moved(time, primal, series):
    if not jnp.issubdtype(primal.dtype, jnp.floating):
        return primal
    total = jnp.zeros_like(primal)
    for term in reversed(series):
        total = time.astype(primal.dtype) * (term + total)
    return primal + total


def _slope(path, time):
    return jax.jvp(path, (time,), (jnp.ones_like(time),))[1]


def _lower(context, *arrays, operation, platform=None):
    module = context.module_context
    if platform is not None:  # of several that are lowered for, this rule is for one
        module = module.replace(platforms=(platform,))
    exported = platform == "cuda" and module.lowering_parameters.for_export
    # Of a module for several platforms, the context says which of them this is for.
    platform = platform or (context.platforms or module.platforms)[0]
    operation = operation.on("export" if exported else platform)
    spread = _is_spread(module.axis_context)
    if not spread:
        module = module.replace(axis_context=_alone(module.axis_context))
    fast = functools.partial(operation.fast, spread=spread)
    # Inside, shapes are all that matters: not how the arrays lie on a mesh.
    plain = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
    context = context.replace(avals_in=plain, module_context=module)
    return mlir.lower_fun(fast, multiple_results=True)(context, *arrays)


def _alone(axes):
    """The context, saying that one device runs the program, for rules that ask who does."""
    if _is_manual(axes):
        return dataclasses.replace(axes, manual_axes=frozenset(axes.mesh.axis_names))
    return dataclasses.replace(
        axes, num_devices=1, device_assignment=tuple(jax.devices()[:1])
    )


def _is_spread(axes) -> bool:
    """Whether the compiled program runs on several devices that share its arrays."""
    if not _is_manual(axes):
        return (axes.num_devices or 1) > 1
    shape = dict(axes.mesh.shape)
    rest = [size for name, size in shape.items() if name not in axes.manual_axes]
    return math.prod(rest) > 1


def _is_manual(axes) -> bool:
    """Whether a context is one inside `shard_map`, of the two kinds that JAX has.

    JAX does not export their classes, and might add one. To take it for another would
    compile a wrong program, so it is refused by name.
    """
    kinds = {"SPMDAxisContext": True, "ShardingContext": False}
    name = type(axes).__name__
    if name not in kinds:
        raise TypeError(
            f"jattn lowers programs in the contexts {', '.join(kinds)} of JAX, got {name}; "
            f"this version of JAX is newer than jattn knows."
        )
    return kinds[name]


ad.primitive_jvps[_primitive] = _jvp
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batch
jet.jet_rules[_primitive] = _jet
mlir.register_lowering(_primitive, _lower)
for _platform in ("tpu", "cuda"):
    _rule = functools.partial(_lower, platform=_platform)
    mlir.register_lowering(_primitive, _rule, platform=_platform)
