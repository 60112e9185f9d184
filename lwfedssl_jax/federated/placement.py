"""Where a round runs: the devices, and how its clients and images are sharded over them."""

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from lwfedssl_jax.base import Function, Integer, Params
from lwfedssl_jax.devices import AXIS
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs, RoundMetrics
from lwfedssl_jax.stages import StageShape


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
    seed_key=replicated,
    round_num=replicated,
    images=sharded if placement.streams else replicated,
    clients=clients,
    server_images=replicated,
    loss_limit=replicated,
    stage_round=replicated,
    server_state=replicated,
  )


def shard_round(body: Function, placement: Placement) -> Function:
  """Wraps the body of a round so that each device runs it on its shard of clients; the identity for one device."""
  if placement.mesh is None:
    return body

  def run(
    shape: StageShape, params: Params, start: Integer, stop: Integer, inputs: RoundInputs
  ) -> tuple[Params, RoundMetrics]:
    replicated: Any = PartitionSpec()
    sharded: Any = PartitionSpec(AXIS)
    on_device = jax.shard_map(
      functools.partial(body, shape),
      mesh=placement.mesh,
      in_specs=(replicated, replicated, replicated, input_specs(placement)),
      out_specs=(replicated, RoundMetrics(replicated, sharded, sharded, replicated, replicated, replicated, sharded)),
      check_vma=False,
    )
    return on_device(params, start, stop, inputs)

  return run
