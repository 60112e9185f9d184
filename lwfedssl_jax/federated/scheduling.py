"""Client slots: which clients of a round are vmapped together, on which device, and what padding costs.

Vmapped clients take as many steps as the one with most. Clients are sorted by steps in descending order, so that
neighbors differ little, and assigned round-robin, so that devices finish together.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax.base import Int
from lwfedssl_jax.config import Config


class SlotLayout(NamedTuple):
  """The layout of a round's K clients on devices.

  Attributes:
    chunk: clients vmapped on a device.
    num_devices: devices over which clients are sharded.
    slots: rows of a round's arrays, at least K, a multiple of chunk * num_devices; a device has consecutive ones.
  """

  chunk: int
  num_devices: int
  slots: int


def default_chunk() -> int:
  """Returns the chunk where --client_chunk is 0 and the memory is unknown: measured, docs/performance.md."""
  return 1 if jax.default_backend() == 'cpu' else 10


def make_layout(num_clients: int, chunk_limit: int, num_devices: int = 1) -> SlotLayout:
  """Chooses the chunk, at most `chunk_limit` (>= 1), with the fewest empty slots.

  Args:
    num_clients: K, clients of a round.
    chunk_limit: maximum number of clients that a device vmaps.
    num_devices: D.
  """
  per_device = -(-num_clients // num_devices)
  chunks = -(-per_device // chunk_limit)
  chunk = -(-per_device // chunks)
  return SlotLayout(chunk, num_devices, chunk * chunks * num_devices)


def run_layout(config: Config, num_devices: int = 1) -> SlotLayout:
  """Returns the layout of a run's rounds."""
  return make_layout(config.effective_clients_per_round, config.client.client_chunk or default_chunk(), num_devices)


def assign_slots(steps: Int[np.ndarray, ' K'], layout: SlotLayout) -> Int[np.ndarray, ' S']:
  """Assigns clients to slots: descending steps, ties in the given order, round-robin over the devices.

  Args:
    steps: that each client takes.
    layout: with at least K slots.

  Returns:
    The position in `steps` of the client of each slot; -1 for an empty slot.
  """
  order = np.full(layout.slots, -1)
  order[: len(steps)] = np.argsort(-steps, kind='stable')
  return order.reshape(-1, layout.num_devices).T.reshape(-1)


def padding_fraction(steps: Int[np.ndarray, ' K'], order: Int[np.ndarray, ' S'], layout: SlotLayout) -> float:
  """Returns the share of a round's computed client steps that are padding, 0 to 1.

  Args:
    steps: as in `assign_slots`.
    order: from `assign_slots`.
    layout: the same.
  """
  in_chunks = np.where(order < 0, 0, steps[order]).reshape(-1, layout.chunk)
  computed = layout.chunk * in_chunks.max(axis=1).sum()
  return 1 - float(in_chunks.sum() / computed) if computed else 0.0


def chunk_clients(clients: Any, chunk: int) -> Any:
  """Reshapes a tree of (K, ...) arrays to (K / chunk, chunk, ...)."""
  return jax.tree.map(lambda x: x.reshape(x.shape[0] // chunk, chunk, *x.shape[1:]), clients)
