"""What simulated clients keep between rounds, on disk: a file for each client and round, read as a memory map.

A client's file is named by the rounds that are done with it, and is never changed. A run that resumes from a checkpoint
deletes the files of later rounds; what a checkpoint that may still be restored needs is not deleted. So parameters and
clients' states always belong to the same round, whenever the run was killed.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from lwfedssl_jax.base import PyTree
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.workdir import storage

FOLDER = 'client_states'
_DIGEST_BYTES = hashlib.sha256().digest_size


class ClientStore:
  """The states of a run's clients. Memory does not depend on their number."""

  def __init__(self, workdir: str):
    """Opens the store of a run; `rewind` comes first."""
    self._workdir, self._folder = workdir, os.path.join(workdir, FOLDER)
    self._oldest = 0

  def check(self) -> None:
    """Raises UsageError if there is no folder, as one that was deleted."""
    if not os.path.isdir(self._folder):
      raise UsageError(f"{self._folder}: expected the clients' states of the run that is resumed")

  def rewind(self, rounds_done: int) -> None:
    """Deletes what later rounds left. Raises StorageError."""
    with storage.writing(self._folder, self._workdir):
      os.makedirs(self._folder, exist_ok=True)
      for client in os.scandir(self._folder):
        for version in _versions(client.path):
          if version > rounds_done:
            os.unlink(_path(client.path, version))

  def keep_since(self, rounds_done: int) -> None:
    """Allows to delete what only checkpoints of fewer rounds need."""
    self._oldest = rounds_done

  def load(self, client_ids: Iterable[int], first_round: int, like: PyTree) -> PyTree:
    """Returns the states of K clients, leaves (K, ...) of NumPy; zeros for a client without one.

    Args:
      client_ids: a negative one has no state.
      first_round: of the stage, 0-based; a state of an earlier stage does not count.
      like: a client's state, arrays or jax.ShapeDtypeStructs, float32.

    Raises:
      UsageError: a file is damaged.
    """
    ids, size = list(client_ids), sum(leaf.size for leaf in jax.tree.leaves(like))
    states = jax.tree.map(lambda leaf: np.zeros((len(ids), *leaf.shape), leaf.dtype), like)
    for row, client in enumerate(ids):
      versions = _versions(self._client(client)) if client >= 0 else []
      if versions and versions[-1] > first_round:
        vector = _read(_path(self._client(client), versions[-1]), size)
        for leaf in jax.tree.leaves(states):
          piece, vector = vector[: leaf[row].size], vector[leaf[row].size :]
          leaf[row] = piece.reshape(leaf[row].shape)
    return states

  def save(self, client: int, rounds_done: int, state: PyTree) -> None:
    """Keeps a client's state after a number of rounds (1 or more), and deletes those that no checkpoint needs.

    Raises:
      StorageError: there is no room or no permission.
    """
    folder = self._client(client)
    path, data = _path(folder, rounds_done), [np.asarray(leaf, np.float32).tobytes() for leaf in jax.tree.leaves(state)]
    with storage.writing(path, self._workdir):
      os.makedirs(folder, exist_ok=True)
      with open(f'{path}.tmp', 'wb') as file:
        file.write(hashlib.sha256(b''.join(data)).digest())
        file.writelines(data)
      os.replace(f'{path}.tmp', path)
      versions = _versions(folder)
      needed = max((version for version in versions if version <= self._oldest), default=0)
      for version in versions:
        if version < needed:
          os.unlink(_path(folder, version))

  def _client(self, client: int) -> str:
    return os.path.join(self._folder, f'{client:06d}')


def clear(workdir: str) -> None:
  """Deletes all states: the run is finished."""
  shutil.rmtree(os.path.join(workdir, FOLDER), ignore_errors=True)


def _path(folder: str, version: int) -> str:
  return os.path.join(folder, f'{version:06d}')


def _versions(folder: str) -> list[int]:
  """Returns the rounds after which there is a state, ascending."""
  return sorted(_numbers(os.listdir(folder))) if os.path.isdir(folder) else []


def _numbers(names: Iterable[str]) -> Iterator[int]:
  return (int(name) for name in names if name.isdecimal())


def _read(path: str, size: int) -> Any:
  """Returns the memory map of a state of `size` numbers. Raises UsageError."""
  with open(path, 'rb') as file:
    digest = file.read(_DIGEST_BYTES)
    if hashlib.file_digest(file, 'sha256').digest() == digest and file.tell() == _DIGEST_BYTES + 4 * size:
      return np.memmap(path, np.float32, 'r', _DIGEST_BYTES, (size,))
  raise UsageError(f'{path}: expected the state of a client as it was saved, its digest does not match')
