"""A data set partitioned over clients and server, with all checks of the data against the configuration."""

import functools
from typing import NamedTuple

import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import partition_file, sources
from lwfedssl_jax.data.partition import MIN_CLIENT_IMAGES, partition_images
from lwfedssl_jax.data.partition_file import Partition
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError


class FederatedDataset(NamedTuple):
  """A data set and its partition.

  Attributes:
    dataset: the images and labels.
    client_images: one sorted int array of training image indices per client.
    server_ids: sorted int array of the server's training image indices, disjoint from the clients'.
    server_images: (A, S, S, 3) uint8, the server's images, from an auxiliary data set where one is given.
  """

  dataset: ImageDataset
  client_images: list[np.ndarray]
  server_ids: np.ndarray
  server_images: np.ndarray

  @property
  def image_size(self) -> int:
    return self.dataset.train_images.shape[1]

  @property
  def max_client_images(self) -> int:
    return max(map(len, self.client_images))


def _read_partition(dataset: ImageDataset, config: Config) -> Partition:
  """Reads the configured file; a client that holds all the data gets the images of all clients."""
  flag, num_clients = f'--partition={config.partition.partition}', config.effective_num_clients
  found = partition_file.read(config.partition.file, len(dataset.train_images))
  used, limit = sum(map(len, [*found.clients, found.server])), config.data.max_train_images
  if limit and used > limit:
    raise UsageError(f'--max_train_images: expected at least {used}, the images of {flag}, or 0, got {limit}')
  if not config.is_federated:
    return Partition([np.sort(np.concatenate(found.clients))], found.server)
  if len(found.clients) != num_clients:
    raise UsageError(f'--num_clients: expected {len(found.clients)}, the clients of {flag}, got {num_clients}')
  return found


def _get_groups(dataset: ImageDataset, config: Config) -> np.ndarray | None:
  """Returns what the partition is drawn by, one number for each training image: its label or its client folder."""
  if not config.partition.has_client_folders:
    return dataset.train_labels
  if dataset.train_clients is None:
    raise UsageError('--partition=folders: expected images of --dataset=folder:PATH, loaded with client_folders=True')
  if not config.is_federated:
    return np.zeros_like(dataset.train_clients)
  found, num_clients = int(dataset.train_clients.max()) + 1, config.effective_num_clients
  if found != num_clients:
    raise UsageError(f'--num_clients: expected {found}, the client folders of {dataset.name}, got {num_clients}')
  return dataset.train_clients


def _split_server(dataset: ImageDataset, config: Config, has_auxiliary: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the training image indices of the server and of the clients, sorted."""
  count, limit = len(dataset.train_images), config.data.max_train_images
  used = rng.host_generator(0, rng.Stream.TRAIN_SUBSET).permutation(count)[: limit or None]
  num_server = 0 if has_auxiliary else round(config.data.auxiliary_fraction * len(used))
  used = rng.host_generator(config.run.seed, rng.Stream.SERVER_SPLIT).permutation(used)
  return np.sort(used[:num_server]), np.sort(used[num_server:])


def _check_server_images(config: Config, images: np.ndarray) -> None:
  if config.uses_calibration and len(images) < MIN_CLIENT_IMAGES:
    flag = f'--partition={config.partition.partition}' if config.partition.file else '--auxiliary_fraction'
    raise UsageError(f'{flag}: expected at least {MIN_CLIENT_IMAGES} images for the server, got {len(images)}')


def _draw_partition(dataset: ImageDataset, config: Config, has_auxiliary: bool) -> Partition:
  """Holds out the server's images and partitions the others over the clients."""
  server_ids, client_ids = _split_server(dataset, config, has_auxiliary)
  groups = _get_groups(dataset, config)
  groups = None if groups is None else groups[client_ids]
  parts = partition_images(groups, len(client_ids), config.effective_num_clients, config.partition, config.run.seed)
  return Partition([client_ids[part] for part in parts], server_ids)


def partition_dataset(dataset: ImageDataset, config: Config, auxiliary: np.ndarray | None = None) -> FederatedDataset:
  """Partitions a data set's training images over the server and the clients.

  The server's share is held out for every method, so that clients hold the same images under every method. A partition
  in a file decides the server's share too.

  Args:
    dataset: the images.
    config: the run's configuration.
    auxiliary: the server's images (A, S, S, 3) uint8 from another data set; then none of this one are held out.

  Raises:
    UsageError: the images cannot be partitioned, or do not fit the batch size or the encoder.
  """
  size = dataset.train_images.shape[1]
  config.model.check_image_size(size, f'the image size {size} of {dataset.name}')
  if config.partition.file:
    client_images, server_ids = _read_partition(dataset, config)
  else:
    client_images, server_ids = _draw_partition(dataset, config, auxiliary is not None)
  largest = max(map(len, client_images))
  if config.client.batch_size > largest:
    raise UsageError(
      f'--batch_size: expected at most {largest}, the images of the largest client, got {config.client.batch_size}'
    )
  server_images = dataset.train_images[server_ids] if auxiliary is None else auxiliary
  _check_server_images(config, server_images)
  return FederatedDataset(dataset, client_images, server_ids, server_images)


def load_for_server(config: Config) -> FederatedDataset:
  """Loads the images of a server whose clients are elsewhere: as `load`, without the clients' parts. Raises UsageError.

  The server holds the same images as in the simulation of the same configuration.
  """
  dataset, auxiliary = _load_images(config)
  size = dataset.train_images.shape[1]
  config.model.check_image_size(size, f'the image size {size} of {dataset.name}')
  server_ids, _ = _split_server(dataset, config, auxiliary is not None)
  server_images = dataset.train_images[server_ids] if auxiliary is None else auxiliary
  _check_server_images(config, server_images)
  return FederatedDataset(dataset, [], server_ids, server_images)


def load(config: Config) -> FederatedDataset:
  """Loads and partitions the configured data. Raises UsageError."""
  dataset, auxiliary = _load_images(config)
  return partition_dataset(dataset, config, auxiliary)


def _load_images(config: Config) -> tuple[ImageDataset, np.ndarray | None]:
  """Returns the configured data set, and the server's images where they are another one's. Raises UsageError."""
  load_images = functools.partial(sources.load, data_dir=config.data.data_dir, cache_dir=config.data.cache_dir)
  dataset = load_images(
    config.data.dataset, image_size=config.model.image_size, client_folders=config.partition.has_client_folders
  )
  auxiliary = None
  if config.data.auxiliary_dataset:
    auxiliary = load_images(config.data.auxiliary_dataset, image_size=dataset.train_images.shape[1]).train_images
  return dataset, auxiliary
