"""The inputs of a round besides the parameters, and their sharding over devices."""

from typing import Any, NamedTuple

from jax.sharding import Mesh, PartitionSpec

from lwfedssl_jax.base import Array, Bool, Images, Int, Integer, Key, Number
from lwfedssl_jax.devices import AXIS


class ClientSlots(NamedTuple):
  """The sampled clients of a round in K client slots (see scheduling.py), at most M images each.

  Attributes:
    client_ids: any id in an empty slot.
    image_ids: into the images; a client's own first, padding after.
    num_images: 0 in an empty slot.
    returned: False for a client that dropped out; it is not aggregated.
  """

  client_ids: Int[Array, ' K']
  image_ids: Int[Array, 'K M']
  num_images: Int[Array, ' K']
  returned: Bool[Array, ' K']


class RoundInputs(NamedTuple):
  """All inputs of a round besides the parameters.

  Attributes:
    seed_key: typed key of the run's seed.
    round_num: int32, 0-based over the whole run.
    images: the training images; with a placement that streams, those of this round's clients, sharded.
    clients: who trains.
    server_images: the server's images; (0, ...) without calibration.
    loss_limit: float32; a client whose mean loss is above it is rejected.
  """

  seed_key: Key
  round_num: Integer
  images: Images
  clients: ClientSlots
  server_images: Images
  loss_limit: Number


class Placement(NamedTuple):
  """The devices of a round and the location of its images.

  Attributes:
    mesh: see devices.py; None: one device.
    streams: each round receives its own clients' images, sharded over the devices; else all images are replicated.
  """

  mesh: Mesh | None = None
  streams: bool = False

  @property
  def num_devices(self) -> int:
    return self.mesh.size if self.mesh is not None else 1

  @property
  def axis(self) -> str | None:
    """Name of the mesh axis over which clients are sharded; None: one device."""
    return AXIS if self.mesh is not None else None


def input_specs(placement: Placement) -> RoundInputs:
  """Returns how each of a round's inputs is sharded over the devices, a tree of PartitionSpecs."""
  replicated: Any = PartitionSpec()
  sharded: Any = PartitionSpec(AXIS)
  clients = ClientSlots(*[sharded] * len(ClientSlots._fields))
  return RoundInputs(
    replicated, replicated, sharded if placement.streams else replicated, clients, replicated, replicated
  )
