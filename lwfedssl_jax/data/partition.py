"""Partition of images over clients: IID, two Dirichlet schemes over labels, shards, client folders.

Every scheme is seeded, terminates, and gives each client images. Results depend on the scheme:

- `dirichlet`: every class is split over the clients in proportions drawn from Dir(beta) (Yurochkin et al. 2019, arXiv
  1905.12022; NIID-Bench, arXiv 2102.02079). Client sizes differ.
- `dirichlet_clients`: every client draws its class shares from Dir(beta * prior) and then equally many images (Hsu et
  al. 2019, arXiv 1909.06335). Client sizes are equal.
- `shards`: label-sorted shards (McMahan et al. 2017, arXiv 1602.05629).
- `folders`: as the images lie in a folder per client; no seed. partition_file.py reads any other partition.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.base import Float, Int
from lwfedssl_jax.config_groups import PartitionConfig
from lwfedssl_jax.errors import UsageError

Labels = Int[np.ndarray, ' N']
Ids = Int[np.ndarray, ' _']  # of one client's images
MIN_CLIENT_IMAGES = 2  # a contrastive batch needs a negative


def _sizes(total: int, weights: Float[np.ndarray, ' K']) -> Int[np.ndarray, ' K']:
  """Splits `total` in proportion to the weights, each share at least MIN_CLIENT_IMAGES; sums to total exactly."""
  spare = total - MIN_CLIENT_IMAGES * len(weights)
  exact = spare * weights / weights.sum()
  sizes = np.floor(exact).astype(int)
  largest_remainders = np.argsort(-(exact - sizes), kind='stable')[: spare - sizes.sum()]
  sizes[largest_remainders] += 1
  return sizes + MIN_CLIENT_IMAGES


def _iid(
  labels: Labels | None, num_images: int, num_clients: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Ids]:
  del labels
  weights = np.exp(config.client_size_sigma * generator.standard_normal(num_clients))
  order = generator.permutation(num_images)
  return np.split(order, np.cumsum(_sizes(num_images, weights))[:-1])


def _dirichlet(
  labels: Labels, num_images: int, num_clients: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Ids]:
  """Splits each class over the clients in proportions drawn from a symmetric Dirichlet."""
  del num_images
  clients: list[list[int]] = [[] for _ in range(num_clients)]
  for label in np.unique(labels):
    members = generator.permutation(np.flatnonzero(labels == label))
    # Normalized gamma draws. For a tiny beta all may underflow to zero; then one client gets the class.
    shares = generator.standard_gamma(config.dirichlet_beta, num_clients)
    if not shares.sum() > 0:
      shares = np.eye(num_clients)[generator.integers(num_clients)]
    cuts = np.round(np.cumsum(shares / shares.sum())[:-1] * len(members)).astype(int)
    for client, part in zip(clients, np.split(members, cuts)):
      client.extend(part.tolist())
  return _fill_small_clients(clients, generator)


def _dirichlet_clients(
  labels: Labels, num_images: int, num_clients: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Ids]:
  """Draws class proportions q ~ Dir(beta * prior) for every client, and equally many images each.

  The prior is the share of each class among the images. Once a class is exhausted, a client's other classes replace it
  in their own proportions; the last clients therefore hold the remaining images.
  """
  classes, counts = np.unique(labels, return_counts=True)
  concentration = np.maximum(config.dirichlet_beta * counts / counts.sum(), 1e-300)
  pools = [list(generator.permutation(np.flatnonzero(labels == label))) for label in classes]
  clients = []
  for size in _sizes(num_images, np.ones(num_clients)):
    # Logarithms of gamma draws: Gamma(a) is Gamma(a + 1) * U^(1/a), which underflows for a tiny concentration.
    logs = np.log(generator.standard_gamma(concentration + 1)) + np.log(generator.random(len(classes))) / concentration
    chosen: list[int] = []
    while len(chosen) < size:
      left = np.array([len(pool) for pool in pools])
      logs = np.where(left > 0, logs, -np.inf)
      shares = np.exp(logs - logs.max())
      wanted = generator.multinomial(size - len(chosen), shares / shares.sum())
      for pool, number in zip(pools, np.minimum(wanted, left)):
        chosen += [pool.pop() for _ in range(number)]
    clients.append(np.array(chosen, dtype=int))
  return clients


def _fill_small_clients(clients: Sequence[Sequence[int] | Ids], generator: np.random.Generator) -> list[Ids]:
  """Moves single images from the largest client to any with too few; terminates, as every move lowers the shortage."""
  filled = [list(generator.permutation(np.array(client, dtype=int))) for client in clients]
  for client in filled:
    while len(client) < MIN_CLIENT_IMAGES:
      client.append(max(filled, key=len).pop())
  return [np.array(client, dtype=int) for client in filled]


def _shards(
  labels: Labels, num_images: int, num_clients: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Ids]:
  """Sorts by label, cuts into equal shards and assigns a few to each client."""
  num_shards = num_clients * config.shards_per_client
  if num_shards > num_images:
    raise UsageError(
      f'--shards_per_client: expected at most {num_images // num_clients} '
      f'({num_images} images for {num_clients} clients), got {config.shards_per_client}'
    )
  order = generator.permutation(num_images)
  order = order[np.argsort(labels[order], kind='stable')]
  shards = np.array_split(order, num_shards)
  assigned = generator.permutation(num_shards).reshape(num_clients, config.shards_per_client)
  return _fill_small_clients([np.concatenate([shards[i] for i in row]) for row in assigned], generator)


def _folders(
  labels: Labels, num_images: int, num_clients: int, config: PartitionConfig, generator: np.random.Generator
) -> list[Ids]:
  """Returns the images of each client folder, whose number stands in for the label."""
  del num_images, config, generator
  counts = np.bincount(labels, minlength=num_clients)
  if counts.min() < MIN_CLIENT_IMAGES:
    raise UsageError(
      f'--partition=folders: expected at least {MIN_CLIENT_IMAGES} images in each client folder, '
      f'beside those held out; folder {counts.argmin() + 1} of {num_clients} has {counts.min()}'
    )
  return [np.flatnonzero(labels == number) for number in range(num_clients)]


_PARTITIONS: dict[str, Callable[..., list[Ids]]] = {
  'iid': _iid,
  'dirichlet': _dirichlet,
  'dirichlet_clients': _dirichlet_clients,
  'shards': _shards,
  'folders': _folders,
}


def partition_images(
  labels: Labels | None, num_images: int, num_clients: int, config: PartitionConfig, seed: int
) -> list[Ids]:
  """Partitions images 0 .. num_images-1 over clients, each image to exactly one.

  Args:
    labels: of the images, or None where there are none; for `folders` the number of each image's client folder.
    num_images: images to partition.
    num_clients: clients, each of which gets at least two images.
    config: kind of partition and its parameters.
    seed: the run's seed.

  Returns:
    One sorted int array of image indices per client.

  Raises:
    UsageError: too few images, or a partition over labels without labels.
  """
  if num_images < MIN_CLIENT_IMAGES * num_clients:
    raise UsageError(
      f'--num_clients: expected at most {num_images // MIN_CLIENT_IMAGES} '
      f'(two images each of {num_images}), got {num_clients}'
    )
  if config.partition != 'iid' and labels is None:
    raise UsageError(f'--partition: expected iid for images without labels, got {config.partition}')
  generator = rng.host_generator(seed, rng.Stream.PARTITION)
  parts = _PARTITIONS[config.partition](labels, num_images, num_clients, config, generator)
  return [np.sort(part) for part in parts]


def class_counts(parts: list[Ids], labels: Labels, num_classes: int) -> Int[np.ndarray, 'K {num_classes}']:
  """Images of each class that each client holds."""
  return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
