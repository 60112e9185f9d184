"""Partitions in files: what a run writes as partition.json, and `--partition=file:PATH` reads.

    {"num_images": 1437, "clients": [[0, 5, ...], [2, ...]], "server": [1, ...]}

Numbers are indices of training images, 0 .. num_images - 1, in the order of `ImageDataset.train_images`. `num_images`
and `server` may be missing. An image that is not listed is not used.
"""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.base import Int
from lwfedssl_jax.data.partition import MIN_CLIENT_IMAGES, Ids
from lwfedssl_jax.errors import UsageError

NAME = 'partition.json'


class Partition(NamedTuple):
  """One sorted array of training image indices per client, and the server's."""

  clients: list[Ids]
  server: Int[np.ndarray, ' _']


def to_json(partition: Partition, num_images: int) -> dict[str, Any]:
  """Returns the content of the file, for a partition of `num_images` training images."""
  clients = [ids.tolist() for ids in partition.clients]
  return {'num_images': num_images, 'clients': clients, 'server': partition.server.tolist()}


def read(path: str, num_images: int) -> Partition:
  """Reads the partition of a data set with `num_images` training images.

  Raises:
    UsageError: no such file, another layout or number of images, an index out of range or repeated, or a client with
      fewer than two images.
  """
  flag = f'--partition=file:{path}'
  value = _parse(flag, os.path.expanduser(path))
  clients, server = value.get('clients'), value.get('server', [])
  if not isinstance(clients, list) or not clients:
    raise UsageError(f'{flag}: expected "clients", a list of indices for each client')
  if value.get('num_images', num_images) != num_images:
    raise UsageError(f'{flag}: expected a partition of {num_images} images, got one of {value["num_images"]!r}')
  holders = [*(f'client {number}' for number in range(len(clients))), 'server']
  parts = [_to_ids(flag, holder, ids, num_images) for holder, ids in zip(holders, [*clients, server])]
  for holder, ids in zip(holders[:-1], parts):
    if len(ids) < MIN_CLIENT_IMAGES:
      raise UsageError(f'{flag}: expected at least {MIN_CLIENT_IMAGES} images of each client, {holder} has {len(ids)}')
  _check_distinct(flag, holders, parts, num_images)
  return Partition(parts[:-1], parts[-1])


def _parse(flag: str, path: str) -> dict[str, Any]:
  if not os.path.isfile(path):
    raise UsageError(f'{flag}: expected a JSON file, found none')
  try:
    with open(path, encoding='utf-8') as file:
      value = json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(f'{flag}: expected a JSON file ({error})') from error
  if not isinstance(value, dict):
    raise UsageError(f'{flag}: expected a JSON object with "clients"')
  return value


def _to_ids(flag: str, holder: str, values: Any, num_images: int) -> Ids:
  """Returns sorted indices, each in range."""
  if not isinstance(values, list) or not all(type(value) is int for value in values):
    raise UsageError(f'{flag}: expected a list of whole numbers for {holder}')
  wrong = next((value for value in values if not 0 <= value < num_images), None)
  if wrong is not None:
    raise UsageError(f'{flag}: expected indices from 0 to {num_images - 1}, {holder} has {wrong}')
  return np.sort(np.array(values, dtype=int))


def _check_distinct(flag: str, holders: list[str], parts: list[Ids], num_images: int) -> None:
  counts = np.bincount(np.concatenate(parts), minlength=num_images)
  if counts.max() > 1:
    image = int(counts.argmax())
    where = [holder for holder, ids in zip(holders, parts) for _ in range(int((ids == image).sum()))]
    raise UsageError(f'{flag}: expected each image once, {image} is at {" and ".join(where)}')
