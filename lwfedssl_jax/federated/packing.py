"""Seats for a round's clients: which are computed side by side, on which device, and how many steps padding wastes.

Clients that are computed side by side take as many steps as the one with most. Seated in descending order of their
steps, neighbours differ little; dealt to the devices like cards, the devices finish together.
"""

from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
  """How a round's K clients are computed.

  Attributes:
    chunk: clients side by side on a device.
    num_devices: devices that share the clients.
    seats: rows of a round's arrays, at least K, a multiple of chunk * num_devices; a device has consecutive ones.
  """

  chunk: int
  num_devices: int
  seats: int


def make_layout(num_clients: int, chunk_limit: int, num_devices: int = 1) -> Layout:
  """Chooses the chunk, at most `chunk_limit` (>= 1), that leaves fewest seats empty.

  Args:
    num_clients: K, clients of a round.
    chunk_limit: clients that a device may compute side by side.
    num_devices: D.
  """
  per_device = -(-num_clients // num_devices)
  chunks = -(-per_device // chunk_limit)
  chunk = -(-per_device // chunks)
  return Layout(chunk, num_devices, chunk * chunks * num_devices)


def seat(steps: np.ndarray, layout: Layout) -> np.ndarray:
  """Seats clients: descending steps, ties in the given order, dealt to the devices in turn.

  Args:
    steps: (K,) int, steps that each client takes.
    layout: with at least K seats.

  Returns:
    (seats,) int: the position in `steps` of who sits there; -1 for an empty seat.
  """
  order = np.full(layout.seats, -1)
  order[:len(steps)] = np.argsort(-steps, kind='stable')
  return order.reshape(-1, layout.num_devices).T.reshape(-1)


def padded_share(steps: np.ndarray, order: np.ndarray, layout: Layout) -> float:
  """Returns the share of a round's computed client steps that are padding, 0 to 1.

  Args:
    steps: (K,) int, as in `seat`.
    order: from `seat`.
    layout: the same.
  """
  seated = np.where(order < 0, 0, steps[order]).reshape(-1, layout.chunk)
  computed = layout.chunk * seated.max(axis=1).sum()
  return 1 - float(seated.sum() / computed) if computed else 0.0
