"""What a caller says of the mesh, and where the arrays of a call lie on it."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import AxisType, Mesh

from jattn.arrays.checks import check_word

__all__ = ["Axes", "Context", "Place"]

Strategy = Literal["ring", "gather", "exchange", "merge"]
STRATEGIES = ("ring", "gather", "exchange", "merge")
Axes = tuple[str, ...]  # mesh axes that one axis of an array lies along, major first


@dataclasses.dataclass(frozen=True)
class Context:
    """Says along which mesh axes the queries and keys of a call lie.

        mesh = jax.make_mesh((2, 4), ("data", "context"))
        with jax.set_mesh(mesh):
            attention(query, key, value, mask=…, context=Context("context", batch="data"))

    The call equals the same call without it: value, every derivative, dropout's bits.

    Attributes:
        axis: The mesh axis that T and S lie along; a pair (outer, inner) for an exchange
            along the inner axis inside a ring along the outer one.
        strategy: `"ring"`, `"gather"`, `"exchange"` or `"merge"`; None chooses.
        batch: The mesh axis of the examples B, or several; None: B is not cut.
        heads: The mesh axis of the heads N and K, or several; None: they are not cut.
        mesh: A `jax.sharding.Mesh`; None: the one of `jax.set_mesh`.
    """

    axis: str | tuple[str, str]
    strategy: Strategy | None = dataclasses.field(default=None, kw_only=True)
    batch: str | Axes | None = dataclasses.field(default=None, kw_only=True)
    heads: str | Axes | None = dataclasses.field(default=None, kw_only=True)
    mesh: Mesh | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        for name in ("axis", "batch", "heads"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if self.mesh is not None and not hasattr(self.mesh, "axis_types"):
            raise ValueError(
                f"Context: `mesh` must be a jax.sharding.Mesh, got "
                f"{type(self.mesh).__name__}; `jax.make_mesh` makes one."
            )
        check_word("Context", "strategy", self.strategy, STRATEGIES)
        if not 1 <= len(axes_of(self.axis)) <= 2:
            raise ValueError(
                f"Context: `axis` must be the name of a mesh axis, or a pair of them "
                f"(outer, inner), got {self.axis!r}."
            )
        for name in ("batch", "heads"):
            both = set(axes_of(self.axis)) & set(axes_of(getattr(self, name)))
            if both:
                raise ValueError(
                    f"Context: axis {min(both)!r} carries {name} and cannot carry T and S "
                    f"too; name another."
                )
        names = [x for y in (self.axis, self.batch, self.heads) for x in axes_of(y)]
        twice = {x for x in names if names.count(x) > 1}
        if twice:
            raise ValueError(
                f"Context: a mesh axis must be named once in `axis`, `batch` and `heads`, "
                f"got {min(twice)!r} twice; name another."
            )


def _names(where: str, names):
    """Gives names of mesh axes as they were given, but a list as a tuple."""
    if names is None or isinstance(names, str):
        return names
    several = tuple(names) if isinstance(names, list | tuple) else ()
    if not all(isinstance(x, str) for x in several) or not isinstance(names, list | tuple):
        raise ValueError(
            f"Context: `{where}` must be the name of a mesh axis, or several, got "
            f"{names!r}."
        )
    return several


class Place(NamedTuple):
    """A context on a mesh of known sizes; hashable."""

    strategy: str
    axis: Axes
    batch: Axes
    heads: Axes
    counts: tuple[tuple[str, int], ...]  # how many devices each mesh axis has
    mesh: Any  # None: that of the context at hand

    def count(self, axes: Axes) -> int:
        """Counts the devices along these axes."""
        counts = dict(self.counts)
        return math.prod(counts[name] for name in axes)

    @property
    def devices(self) -> int:
        """Counts the devices that T and S are divided among."""
        return self.count(self.axis)

    @property
    def swapped(self) -> Axes:
        """Gives the axis along which heads are exchanged for sequence."""
        return self.axis[-1:] if self.strategy == "exchange" else ()

    @property
    def round(self) -> Axes:
        """Gives the axes that keys lie along after heads were exchanged."""
        return self.axis[:-1] if self.strategy == "exchange" else self.axis

    @property
    def rows(self) -> Axes:
        """Gives the axes that queries lie along after heads were exchanged."""
        return () if self.strategy == "merge" else self.round

    @property
    def is_ring(self) -> bool:
        """Says whether keys go round among devices, perhaps after heads were exchanged."""
        return self.strategy in ("ring", "exchange") and bool(self.round)

    @property
    def names(self) -> frozenset[str]:
        """Gives all axes along which some array is cut."""
        return frozenset((*self.axis, *self.batch, *self.heads))


def axes_of(names: str | Axes | None) -> Axes:
    """Gives mesh axes as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def written(axes: Axes) -> str:
    """Writes mesh axes for a message."""
    return " × ".join(f'"{name}"' for name in axes)


def find(where: str, context: Context) -> Place:
    """Finds the mesh of a context; the strategy may still be to choose, "".

    Raises:
        ValueError: If there is no mesh, or it lacks an axis.
    """
    if not isinstance(context, Context):
        raise ValueError(
            f"{where}: `context` must be a jattn.Context(axis), got "
            f"{type(context).__name__}."
        )
    current = jax.sharding.get_abstract_mesh()
    mesh: Any = context.mesh if current.empty else current
    if mesh is None:
        raise ValueError(
            f"{where}: `context` needs a mesh, and there is none here; call it inside "
            f"`jax.set_mesh(mesh)`, or give `Context(…, mesh=mesh)`."
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axis, batch, heads = map(axes_of, (context.axis, context.batch, context.heads))
    for name in (*axis, *batch, *heads):
        if name not in kinds:
            raise ValueError(
                f"{where}: `context` names the mesh axis {name!r}, but the mesh has "
                f"{', '.join(map(repr, kinds))}; name one of these."
            )
        if kinds[name] == AxisType.Manual:
            raise ValueError(
                f"{where}: `context` must be of axes that no `jax.shard_map` around it "
                f"has taken, got {name!r}; call it outside, or merge parts of your own "
                f"with `jattn.merge_over`."
            )
    counts = tuple(mesh.shape.items())
    mesh = _left_to_xla(current, mesh)
    return Place(context.strategy or "", axis, batch, heads, counts, mesh)


def _left_to_xla(current, mesh):
    """Gives the mesh for `shard_map`; None for the one at hand."""
    if not current.empty:
        return None
    if set(mesh.axis_types) == {AxisType.Auto}:
        return mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
