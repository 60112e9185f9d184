"""A data set partitioned over clients and server, with all checks of the data against the configuration."""

from typing import NamedTuple

import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.partition import MIN_CLIENT_IMAGES, partition_images
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


def _split_server(dataset: ImageDataset, config: Config, auxiliary: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
  """Returns the training image indices of the server and of the clients, sorted. Raises UsageError."""
  size = dataset.train_images.shape[1]
  config.model.check_image_size(size, f'the image size {size} of {dataset.name}')
  count, limit = len(dataset.train_images), config.data.max_train_images
  used = rng.host_generator(0, rng.Stream.TRAIN_SUBSET).permutation(count)[: limit or None]
  num_server = 0 if auxiliary is not None else round(config.data.auxiliary_fraction * len(used))
  used = rng.host_generator(config.run.seed, rng.Stream.SERVER_SPLIT).permutation(used)
  return np.sort(used[:num_server]), np.sort(used[num_server:])


def _check_server_images(config: Config, images: np.ndarray) -> None:
  if config.uses_calibration and len(images) < MIN_CLIENT_IMAGES:
    raise UsageError(
      f'--auxiliary_fraction: expected at least {MIN_CLIENT_IMAGES} images for the server, got {len(images)}'
    )


def partition_dataset(dataset: ImageDataset, config: Config, auxiliary: np.ndarray | None = None) -> FederatedDataset:
  """Partitions a data set's training images over the server and the clients.

  The server's share is held out for every method, so that clients hold the same images under every method.

  Args:
    dataset: the images.
    config: the run's configuration.
    auxiliary: the server's images (A, S, S, 3) uint8 from another data set; then none of this one are held out.

  Raises:
    UsageError: the images cannot be partitioned, or do not fit the batch size or the encoder.
  """
  server_ids, client_ids = _split_server(dataset, config, auxiliary)
  labels = None if dataset.train_labels is None else dataset.train_labels[client_ids]
  parts = partition_images(labels, len(client_ids), config.effective_num_clients, config.partition, config.run.seed)
  largest = max(map(len, parts))
  if config.client.batch_size > largest:
    raise UsageError(
      f'--batch_size: expected at most {largest}, the images of the largest client, got {config.client.batch_size}'
    )
  server_images = dataset.train_images[server_ids] if auxiliary is None else auxiliary
  _check_server_images(config, server_images)
  return FederatedDataset(dataset, [client_ids[part] for part in parts], server_ids, server_images)


def load_for_server(config: Config) -> FederatedDataset:
  """Loads the images of a server whose clients are elsewhere: as `load`, without the clients' parts. Raises UsageError.

  The server holds the same images as in the simulation of the same configuration.
  """
  dataset, auxiliary = _load_images(config)
  server_ids, _ = _split_server(dataset, config, auxiliary)
  server_images = dataset.train_images[server_ids] if auxiliary is None else auxiliary
  _check_server_images(config, server_images)
  return FederatedDataset(dataset, [], server_ids, server_images)


def load(config: Config) -> FederatedDataset:
  """Loads and partitions the configured data. Raises UsageError."""
  dataset, auxiliary = _load_images(config)
  return partition_dataset(dataset, config, auxiliary)


def _load_images(config: Config) -> tuple[ImageDataset, np.ndarray | None]:
  """Returns the configured data set, and the server's images where they are another one's. Raises UsageError."""
  folders = {'data_dir': config.data.data_dir, 'cache_dir': config.data.cache_dir}
  dataset = sources.load(config.data.dataset, image_size=config.model.image_size, **folders)
  auxiliary = None
  if config.data.auxiliary_dataset:
    size = dataset.train_images.shape[1]
    auxiliary = sources.load(config.data.auxiliary_dataset, image_size=size, **folders).train_images
  return dataset, auxiliary
