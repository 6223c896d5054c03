"""Several devices: each of them holds a part of every matrix, and XLA lets them talk.

    query, key, value, gate, up    cut by what comes out: heads, numbers of the perceptron
    output, down                   cut by what goes in; the parts are added up
    embedding                      cut by words
    keys and values in the cache   cut by heads

What cannot be cut evenly, such as 9 heads by 2 devices, lies whole on each device. Shoeybi
et al., 2019, arXiv:1909.08053.
"""

import dataclasses

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from examples.chat.model import Sizes
from examples.command import Refusal

AXIS = "model"


def ask_for(number: int) -> None:
    """Lets a CPU count as so many devices; to be called before JAX has started."""
    if number > 1:
        jax.config.update("jax_num_cpu_devices", number)


def mesh(number: int) -> jax.sharding.Mesh:
    """Makes a mesh of the first devices.

    Raises:
        Refusal: If there are fewer.
    """
    found = jax.devices()
    if len(found) < number:
        raise Refusal(f"--devices {number}: there are {len(found)}; ask for no more.")
    types = (AxisType.Auto,)
    return jax.make_mesh((number,), (AXIS,), types, devices=found[:number])


def by_heads(sizes: Sizes, on: jax.sharding.Mesh) -> str | None:
    """Gives the mesh axis along which heads are cut; None where they stay whole."""
    return AXIS if sizes.heads % on.size == sizes.kv_heads % on.size == 0 else None


def spread_weights(params, sizes: Sizes, on: jax.sharding.Mesh):
    """Lays the weights along a mesh."""
    number, heads = on.size, by_heads(sizes, on)
    hidden = AXIS if sizes.hidden % number == 0 else None
    words = AXIS if sizes.vocabulary % number == 0 else None
    cut = {
        **dict.fromkeys(("query", "key", "value"), (heads, None)),
        "output": (None, heads),
        **dict.fromkeys(("gate", "up"), (hidden, None)),
        "down": (None, hidden),
    }

    def place(path, x):
        name = path[-1].key
        if name == "embedding":
            axes = (words, None)
        else:  # layers that are stacked have one axis more in front
            axes = (*[None] * (x.ndim - 2), *cut[name]) if name in cut else ()
        return jax.device_put(x, NamedSharding(on, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(place, params)


def spread_cache(kv, sizes: Sizes, on: jax.sharding.Mesh):
    """Lays a cache along a mesh: keys and values by heads, and all else on each device."""
    along = by_heads(sizes, on)

    def place(x, head: int | None = None):  # `head` counts from the last axis
        axes = [along if head == axis - x.ndim else None for axis in range(x.ndim)]
        return jax.device_put(x, NamedSharding(on, PartitionSpec(*axes)))

    store = kv.store  # keys …KHS, values …KSD, scales …KS
    heads = {"keys": -3, "values": -3, "key_scales": -2, "value_scales": -2}
    arrays = {name: getattr(store, name) for name in heads}
    cut = {name: place(x, heads[name]) for name, x in arrays.items() if x is not None}
    kv = jax.tree.map(place, dataclasses.replace(kv, store=None))
    return dataclasses.replace(kv, store=dataclasses.replace(store, **cut))
