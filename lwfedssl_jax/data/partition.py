"""Dealing images to clients: IID, Dirichlet over labels, shards. Seeded, terminating, never an empty client."""

from collections.abc import Callable

import numpy as np

from lwfedssl_jax.base import UsageError
from lwfedssl_jax.config import PartitionConfig

MIN_CLIENT_IMAGES = 2  # a contrastive batch needs a negative


def _sizes(total: int, weights: np.ndarray) -> np.ndarray:
  """Splits `total` in proportion to weights (K,), each share at least MIN_CLIENT_IMAGES; sums to total exactly."""
  spare = total - MIN_CLIENT_IMAGES * len(weights)
  exact = spare * weights / weights.sum()
  sizes = np.floor(exact).astype(int)
  largest_remainders = np.argsort(-(exact - sizes), kind='stable')[:spare - sizes.sum()]
  sizes[largest_remainders] += 1
  return sizes + MIN_CLIENT_IMAGES


def _iid(labels, num_images, num_clients, config, generator):
  del labels
  weights = np.exp(config.client_size_sigma * generator.standard_normal(num_clients))
  order = generator.permutation(num_images)
  return np.split(order, np.cumsum(_sizes(num_images, weights))[:-1])


def _dirichlet(labels, num_images, num_clients, config, generator):
  """Each class is dealt by proportions drawn from a symmetric Dirichlet (Hsu et al. 2019, arXiv 1909.06335)."""
  del num_images
  clients = [[] for _ in range(num_clients)]
  for label in np.unique(labels):
    members = generator.permutation(np.flatnonzero(labels == label))
    # Gamma draws, normalised; all can underflow to zero for a tiny beta, when one client takes the class.
    shares = generator.standard_gamma(config.dirichlet_beta, num_clients)
    if not shares.sum() > 0:
      shares = np.eye(num_clients)[generator.integers(num_clients)]
    cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
    for client, part in zip(clients, np.split(members, cuts)):
      client.extend(part.tolist())
  return _feed_the_poorest(clients, generator)


def _feed_the_poorest(clients, generator):
  """Moves single images from the richest client to any with too few; ends, as every move lowers the shortage."""
  clients = [list(generator.permutation(np.array(c, dtype=int))) for c in clients]
  for client in clients:
    while len(client) < MIN_CLIENT_IMAGES:
      client.append(max(clients, key=len).pop())
  return [np.array(c, dtype=int) for c in clients]


def _shards(labels, num_images, num_clients, config, generator):
  """Sorts by label, cuts into equal shards and deals a few to each client (McMahan et al. 2017, arXiv 1602.05629)."""
  num_shards = num_clients * config.shards_per_client
  if num_shards > num_images:
    raise UsageError(f'--shards_per_client: expected at most {num_images // num_clients} '
                     f'({num_images} images for {num_clients} clients), got {config.shards_per_client}')
  order = generator.permutation(num_images)
  order = order[np.argsort(labels[order], kind='stable')]
  shards = np.array_split(order, num_shards)
  deal = generator.permutation(num_shards).reshape(num_clients, config.shards_per_client)
  return _feed_the_poorest([np.concatenate([shards[i] for i in row]) for row in deal], generator)


_PARTITIONS: dict[str, Callable[..., list[np.ndarray]]] = {'iid': _iid, 'dirichlet': _dirichlet, 'shards': _shards}


def partition_images(
    labels: np.ndarray | None, num_images: int, num_clients: int, config: PartitionConfig, seed: int
) -> list[np.ndarray]:
  """Deals images 0 .. num_images-1 to clients, each image to exactly one.

  Args:
    labels: (num_images,) integers, or None where there are none.
    num_images: images to deal.
    num_clients: clients, each of which gets at least two images.
    config: kind of partition and its parameters.
    seed: the run's seed.

  Returns:
    One sorted int array of image indices per client.

  Raises:
    UsageError: too few images, or a partition over labels without labels.
  """
  if num_images < MIN_CLIENT_IMAGES * num_clients:
    raise UsageError(f'--num_clients: expected at most {num_images // MIN_CLIENT_IMAGES} '
                     f'(two images each of {num_images}), got {num_clients}')
  if config.partition != 'iid' and labels is None:
    raise UsageError(f'--partition: expected iid for images without labels, got {config.partition}')
  generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
  parts = _PARTITIONS[config.partition](labels, num_images, num_clients, config, generator)
  return [np.sort(part) for part in parts]


def class_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Images of each class that each client holds, (clients, classes) int."""
  return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
