"""Arrays that lie on several devices: what their types say, kept out of the mathematics.

JAX types an array by more than shape and dtype. On a mesh with explicit axes the type says
along which mesh axes the array is cut, and JAX refuses an operation whose result could
lie in two ways, such as `ids[b, t]` for ids cut along b. Inside `jax.shard_map` the type
says over which mesh axes the array's values differ, and JAX refuses to combine two arrays
whose values differ over different axes. Where an array lies changes no number, so:

    `across`     runs a public function with explicit axes left to XLA, and gives its
                 results the sharding that the types of the inputs say
    `methods_across`   does the same for methods of a value, such as a cache
    `jaxpr_of`   traces a user's function of scalars into a jaxpr whose types say nothing
                 of devices, even if the types of the captured arrays do (`call.plain`)
"""

import contextlib
import contextvars
import functools
import inspect
import math

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, use_abstract_mesh


def across(letters: str):
    """Makes a public function work with arrays on any mesh.

    `letters` names the axes of the results; one "B" stands for all batch axes. Each axis
    is cut like the axis of the same letter in `query` (BTNH) or `key` (BSKH). An axis is
    not cut if these have no such letter, or if an earlier axis of the result is cut along
    the same mesh axis. A result with one axis less was averaged over heads. Where the
    function returns several arrays, a space separates their letters; results that are not
    arrays stay as they are.
    """

    def decorate(function):
        names = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def on_any_mesh(*args, **kwargs):
            leaves, tree = jax.tree.flatten((args, kwargs))
            mesh = _explicit_mesh(leaves)
            # Without explicit axes, no type says where an array lies.
            if mesh is None:
                return function(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            axes = _axes(given.get("query"), given.get("key"))
            with use_abstract_mesh(_left_to_xla(mesh)), _called_from(mesh):
                args, kwargs = tree.unflatten(map(without_axes, leaves))
                results, tree = jax.tree.flatten(function(*args, **kwargs))
            words = letters.split() or [""] * len(results)
            return tree.unflatten(
                jax.sharding.reshard(x, NamedSharding(mesh, _spec(word, x, axes)))
                if isinstance(x, jax.Array)
                else x
                for word, x in zip(words, results, strict=True)
            )

        return on_any_mesh

    return decorate


def methods_across(kind):
    """Makes the public methods of a class of trees work with arrays on any mesh.

    Of a method's results, trees of the same kind are cut as the tree itself, array by
    array; others are cut as the argument `query`, whose axes BTN they begin with.
    """
    for name, method in list(vars(kind).items()):
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _method_across(kind, method))
    return kind


def _method_across(kind, method):
    @functools.wraps(method)
    def on_any_mesh(self, *args, **kwargs):
        leaves, tree = jax.tree.flatten((self, args, kwargs))
        mesh = _explicit_mesh(leaves)
        if mesh is None:
            return method(self, *args, **kwargs)
        query = kwargs.get("query", args[0] if args else None)
        with use_abstract_mesh(_left_to_xla(mesh)), _called_from(mesh):
            own, args, kwargs = tree.unflatten(map(without_axes, leaves))
            result = method(own, *args, **kwargs)
        found, tree = jax.tree.flatten(result, is_leaf=lambda x: isinstance(x, kind))
        again = lambda x: (
            _cut_as(self, x, mesh) if isinstance(x, kind) else _cut_as_query(query, x, mesh)
        )
        return tree.unflatten(map(again, found))

    return on_any_mesh


def _cut_as(before, after, mesh):
    """Cuts each array of a tree as the array at the same place of another tree."""
    specs = {
        path: jax.typeof(x).sharding.spec
        for path, x in jax.tree_util.tree_leaves_with_path(before)
        if _mesh_of(x) is not None
    }

    def again(path, x):
        spec = [*specs.get(path, ()), *[None] * x.ndim][: x.ndim]
        parts = zip(x.shape, spec, strict=True)
        fitting = [
            names if size % _count(mesh, names) == 0 else None for size, names in parts
        ]
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*fitting)))

    return jax.tree_util.tree_map_with_path(again, after)


def _count(mesh, names) -> int:
    """Counts the devices along mesh axes: one name, several, or None."""
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def _cut_as_query(query, result, mesh):
    """Cuts a result BTN… as the query is."""
    word = "BTN." if result.ndim == query.ndim else "BTN"
    spec = _spec(word, result, _axes(query, None))
    return jax.sharding.reshard(result, NamedSharding(mesh, spec))


_CALLER: contextvars.ContextVar = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def _called_from(mesh):
    """Remembers, in the context, the mesh that a public function was called in."""
    token = _CALLER.set(mesh)
    try:
        yield
    finally:
        _CALLER.reset(token)


def without_axes(array):
    """Gives an array with its explicit mesh axes left to XLA; other objects unchanged."""
    if isinstance(array, jax.ShapeDtypeStruct):
        mesh = getattr(array.sharding, "mesh", None)
        if mesh is None or AxisType.Explicit not in mesh.axis_types:
            return array
        return jax.ShapeDtypeStruct(array.shape, array.dtype)
    mesh = _mesh_of(array)
    if mesh is None:
        return array
    mesh = _left_to_xla(mesh)
    uncut = PartitionSpec(*[None] * array.ndim)
    with use_abstract_mesh(mesh):
        return jax.sharding.reshard(array, NamedSharding(mesh, uncut))


def axes_that_vary(*arrays) -> frozenset[str]:
    """Gives the axes of `jax.shard_map` along which the numbers of any array differ."""
    arrays = [x for x in arrays if isinstance(x, jax.Array)]
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def varying(arrays, axes: frozenset[str]) -> list[jax.Array]:
    """Makes arrays vary over these axes and over all that any of them varies over."""
    union = axes | axes_that_vary(*arrays)
    missing = [tuple(union - axes_that_vary(x)) for x in arrays]
    return [
        lax.pcast(x, names, to="varying") if names else x
        for x, names in zip(arrays, missing, strict=True)
    ]


def _explicit_mesh(leaves):
    """Gives the abstract mesh with explicit axes that a call is on; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh if AxisType.Explicit in mesh.axis_types else None
    meshes = (_mesh_of(x) for x in leaves)
    return next((mesh for mesh in meshes if mesh is not None), None)


def _mesh_of(array):
    """Gives the abstract mesh of an array if that has explicit axes, else None."""
    if not isinstance(array, jax.Array):
        return None
    mesh = jax.typeof(array).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _left_to_xla(mesh):
    """Gives the abstract mesh with automatic axes in place of explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = [name for name, kind in kinds if kind == AxisType.Explicit]
    return mesh.update_axis_types(dict.fromkeys(explicit, AxisType.Auto))


def _axes(query, key) -> dict:
    """Gives for each letter the sizes of its axes and the mesh axes that cut them."""
    found = {}
    # The query comes last, so that the batch lies as the query's, if both have a mesh.
    for array, names in ((key, "SN"), (query, "TN")):
        if _mesh_of(array) is None or array.ndim < 3:
            continue
        pairs = [*zip(array.shape, jax.typeof(array).sharding.spec, strict=True)]
        found |= {"B": pairs[:-3], names[0]: [pairs[-3]], names[1]: [pairs[-2]]}
    return found


def _spec(word: str, result, axes: dict):
    """Gives the sharding of a result whose axes have these letters."""
    uncut = [(None, None)]
    # A result with an axis less was averaged over heads.
    if len(word) - 1 + len(axes.get("B", ())) > result.ndim:
        word = word.replace("N", "")
    pairs = [x for letter in word for x in axes.get(letter, uncut)]
    # Axes are counted from the last one; leading axes without a letter are not cut.
    pairs = ([*uncut * result.ndim, *pairs])[-result.ndim :] if result.ndim else []
    spec, taken = [], set()
    for size, (want, names) in zip(result.shape, pairs, strict=True):
        own = {names} if isinstance(names, str) else set(names or ())
        # A mesh axis may cut only one axis of an array.
        free = size == want and not own & taken
        spec.append(names if free else None)
        taken |= own if free else set()
    return PartitionSpec(*spec)
