"""Where the tokens of a row lie: on one device, or a part of each row on each of several.

With several devices every array of tokens, `BT`, is cut along T, and all that is computed
token by token follows it. Only attention looks at other tokens: `jattn.Context` says along
which axis of the mesh these lie. Each device holds all weights of the model.
"""

import contextlib
import dataclasses

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jattn
from examples.command import Refusal
from examples.language_model.attending import within_documents
from examples.language_model.model import Attend
from examples.language_model.packing import Batch


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """Leaves everything where it is."""

    def batch(self, batch: Batch) -> Batch:
        """Places a batch."""
        return batch

    def weights(self, *modules: nnx.Module) -> None:
        """Places the state of modules."""

    def attending(self, document) -> Attend:
        """Attends within documents."""
        return within_documents(document)


@dataclasses.dataclass(frozen=True)
class ManyDevices(OneDevice):
    """Cuts rows of tokens along the one axis of a mesh."""

    mesh: Mesh

    def batch(self, batch: Batch) -> Batch:
        """Places a batch: of each row a part on each device."""
        cut = NamedSharding(self.mesh, PartitionSpec(None, *self.mesh.axis_names))
        return Batch(*(jax.device_put(array, cut) for array in batch))

    def weights(self, *modules: nnx.Module) -> None:
        """Places the state of modules: all of it on each device."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        for module in modules:
            nnx.update(module, jax.device_put(nnx.state(module), everywhere))

    def attending(self, document) -> Attend:
        """Attends within documents, to the tokens of all devices."""
        (axis,) = self.mesh.axis_names
        return within_documents(document, context=jattn.Context(axis, mesh=self.mesh))


def place(devices: int, length: int) -> OneDevice:
    """Gives the place for rows of so many tokens on so many devices.

    Raises:
        Refusal: If there are fewer devices, or they do not divide a row.
    """
    if devices == 1:
        return OneDevice()
    if length % devices:
        raise Refusal(f"--length {length} must be a multiple of --devices {devices}.")
    # A CPU is as many devices as JAX is told before it starts. Later it refuses.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)
    if devices > jax.device_count():
        raise Refusal(f"--devices {devices} are more than there are: {jax.device_count()}.")
    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,))
    return ManyDevices(mesh)


def back(*modules: nnx.Module) -> None:
    """Brings the state of modules back to one device, which writes and draws."""
    for module in modules:
        nnx.update(module, jax.device_put(nnx.state(module), jax.devices()[0]))
