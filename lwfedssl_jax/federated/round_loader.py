"""Loads the inputs of rounds: client slots, and images, resident on the device or copied one round ahead."""

import concurrent.futures
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax import devices, stages
from lwfedssl_jax.base import Images, Int, UInt8
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.data.federated_dataset import FederatedDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import depth_dropout, scheduling
from lwfedssl_jax.federated.placement import Placement, input_specs
from lwfedssl_jax.federated.round_types import ClientSlots
from lwfedssl_jax.federated.sampling import Participation

MEGABYTE = 10**6


def flatten(images: UInt8[np.ndarray, 'N H W C']) -> UInt8[np.ndarray, 'N F']:
  """Returns images as devices hold them, a row each; `ClientData` says why."""
  return images.reshape(len(images), math.prod(images.shape[1:]))


def client_capacity(data: FederatedDataset, batch_size: int) -> int:
  """Returns the width of `ClientSlots.image_ids`: the largest client's images, padded."""
  return batching.padded_capacity(data.max_client_images, batch_size)


class RoundBatch(NamedTuple):
  """The part of a round's inputs that comes from the data set.

  Attributes:
    images: as `RoundInputs.images`.
    clients: as `RoundInputs.clients`.
    client_ids: the client of each slot; -1 in an empty slot.
    padding_fraction: of the computed client steps, 0 to 1.
  """

  images: Images
  clients: ClientSlots
  client_ids: Int[np.ndarray, ' S']
  padding_fraction: float


class RoundLoader:
  """Loads the inputs of each round. Streamed images of the next round are copied during the current one."""

  def __init__(self, config: Config, data: FederatedDataset, participation: Participation, placement: Placement):
    self._client, self._data, self._participation, self._placement = config.client, data, participation, placement
    self._layout = scheduling.run_layout(config, placement.num_devices)
    self._plans = [plan for plan in stages.make_plans(config) for _ in range(plan.num_rounds)]
    self._sizes = np.array([len(ids) for ids in data.client_images], np.int32)
    self._ahead: dict[int, concurrent.futures.Future[RoundBatch]] = {}
    self._copier = concurrent.futures.ThreadPoolExecutor(1, 'images') if placement.streams else None
    if placement.streams:
      self._capacity = self.max_device_images()
    else:
      self._images = devices.replicate(placement.mesh, flatten(data.dataset.train_images))

  def close(self) -> None:
    """Stops the background copy."""
    if self._copier is not None:
      self._copier.shutdown(cancel_futures=True)

  def load(self, round_num: int) -> RoundBatch:
    """Returns the inputs of a round, and starts copying those of the next."""
    if self._copier is None:
      return self._load(round_num)
    ahead = self._ahead.pop(round_num, None) or self._copier.submit(self._load, round_num)
    self._ahead.clear()
    if round_num + 1 < len(self._participation.client_ids):
      self._ahead[round_num + 1] = self._copier.submit(self._load, round_num + 1)
    return ahead.result()

  def client_steps(self) -> int:
    """Returns the steps that every client takes in a round; 0 if they differ.

    Also 0 for one step: XLA compiles a static loop of one step to other operations, which round differently from those
    of a client that trains elsewhere.
    """
    steps = {
      self._client.local_epochs * batching.steps_per_epoch(int(size), self._client.batch_size) for size in self._sizes
    }
    return steps.pop() if len(steps) == 1 and steps != {1} else 0

  def assign_slots(self, round_num: int) -> Int[np.ndarray, ' S']:
    """Returns the position among the round's clients of each slot's client; -1 for an empty slot."""
    return scheduling.assign_slots(self._steps(round_num), self._layout)

  def max_device_images(self) -> int:
    """Returns the maximum number of images that a device needs for one round, over all rounds."""
    return max(
      int(self._images_in_slots(r).reshape(self._layout.num_devices, -1).sum(axis=1).max())
      for r in range(len(self._participation.client_ids))
    )

  def _steps(self, round_num: int) -> Int[np.ndarray, ' K']:
    sizes = self._sizes[self._participation.client_ids[round_num]]
    return self._client.local_epochs * np.maximum(1, sizes // self._client.batch_size)

  def _images_in_slots(self, round_num: int) -> Int[np.ndarray, ' S']:
    order = self.assign_slots(round_num)
    return np.where(order < 0, 0, self._sizes[self._participation.client_ids[round_num][order]])

  def _load(self, round_num: int) -> RoundBatch:
    order = self.assign_slots(round_num)
    filled = order >= 0
    client_ids = np.where(filled, self._participation.client_ids[round_num][order], -1)
    num_images = self._images_in_slots(round_num)
    image_ids = np.zeros((len(order), client_capacity(self._data, self._client.batch_size)), np.int32)
    for row, client in zip(image_ids, client_ids):
      if client >= 0:
        row[: self._sizes[client]] = self._data.client_images[client]
    images = self._stream(image_ids, num_images) if self._placement.streams else self._images
    keeps = self._participation.keeps
    kept = [] if keeps is None else [depth_dropout.select_inputs(self._plans[round_num], keeps[round_num][order])]
    clients = (
      np.maximum(client_ids, 0).astype(np.int32),
      image_ids,
      num_images.astype(np.int32),
      filled & self._participation.returned[round_num][order],
      *kept,
    )
    specs = input_specs(self._placement).clients

    def put(array, spec):
      return devices.put(array, devices.sharding(self._placement.mesh, spec))

    return RoundBatch(
      images,
      ClientSlots(*map(put, clients, specs)),
      client_ids,
      scheduling.padding_fraction(self._steps(round_num), order, self._layout),
    )

  def _stream(self, image_ids: Int[np.ndarray, 'S M'], num_images: Int[np.ndarray, ' S']) -> Images:
    """Copies the images of the slots to their devices; afterwards `image_ids` count within the device's part."""
    per_device, source = len(num_images) // self._layout.num_devices, flatten(self._data.dataset.train_images)
    wanted: list[list[np.ndarray]] = [[] for _ in range(self._layout.num_devices)]
    for slot, count in enumerate(num_images):
      part = wanted[slot // per_device]
      first = sum(map(len, part))
      part.append(image_ids[slot, :count].copy())
      image_ids[slot] = 0
      image_ids[slot, :count] = first + np.arange(count)

    def copy(index: Any) -> UInt8[np.ndarray, 'N F']:
      chosen = np.concatenate(wanted[(index[0].start or 0) // self._capacity])
      images = np.zeros((self._capacity, *source.shape[1:]), np.uint8)
      np.take(source, chosen, axis=0, out=images[: len(chosen)])
      return images

    shape = (self._capacity * self._layout.num_devices, *source.shape[1:])
    spec: Any = input_specs(self._placement).images
    return jax.make_array_from_callback(shape, devices.sharding(self._placement.mesh, spec), copy)


def choose_placement(config: Config, data: FederatedDataset, participation: Participation) -> Placement:
  """Chooses the location of images: on the devices if they fit --device_data_budget_mb, else streamed per round.

  With several processes images always stream, so that each process reads only its own clients' images.

  Raises:
    UsageError: there are fewer devices than requested, or two rounds' images do not fit the budget.
  """
  mesh = devices.make_mesh(config.run.num_devices)
  budget = config.run.device_data_budget_mb * MEGABYTE
  images = data.dataset.train_images
  if jax.process_count() == 1 and (not budget or images.nbytes <= budget):
    return Placement(mesh)
  placement = Placement(mesh, streams=True)
  loader = RoundLoader(config, data, participation, placement)
  needed = 2 * loader.max_device_images() * images[0].nbytes  # this round's and the next one's
  loader.close()
  if budget and needed > budget:
    raise UsageError(
      f"--device_data_budget_mb: expected at least {math.ceil(needed / 1000) / 1000:.3f}, twice a round's images "
      f'on a device, got {config.run.device_data_budget_mb:g}'
    )
  return placement
