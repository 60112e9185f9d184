"""Parameters as the components that are exchanged (stages.py): one float32 vector each, little-endian on the wire."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lwfedssl_jax.base import Params
from lwfedssl_jax.stages import block_name

WIRE_DTYPE = np.dtype('<f4')


def _parts(tree: Params, first_block: int) -> Iterator[tuple[str, str, Any]]:
  """Yields (component, part of the tree, index into its leaves) of all that a tree holds."""
  for part, subtree in tree.items():
    if part == 'blocks':
      for index in range(jax.tree.leaves(subtree)[0].shape[0]):
        yield block_name(first_block + index), part, index
    else:
      yield part, part, ...


def cut(tree: Params, first_block: int = 0) -> dict[str, np.ndarray]:
  """Returns {component: vector (n,)}, the leaves of each component in their tree's order.

  Args:
    tree: the parameters, or an active part of them; blocks stacked (L, ...).
    first_block: the number of the first of its blocks.
  """
  host = jax.tree.map(np.asarray, tree)
  return {
    name: np.concatenate([leaf[index].reshape(-1) for leaf in jax.tree.leaves(host[part])])
    for name, part, index in _parts(tree, first_block)
  }


def paste(tree: Params, vectors: Mapping[str, np.ndarray], first_block: int = 0) -> Params:
  """Returns a copy of the tree, as NumPy arrays, in which the given components are replaced; inverse of `cut`."""
  copy = jax.tree.map(lambda leaf: np.array(leaf), tree)
  for name, part, index in _parts(tree, first_block):
    if name in vectors:
      first = 0
      for leaf in jax.tree.leaves(copy[part]):
        target = leaf[index]
        leaf[index] = vectors[name][first : first + target.size].reshape(target.shape)
        first += target.size
  return copy


def to_bytes(vector: np.ndarray) -> bytes:
  """Returns a vector's bytes on the wire."""
  return vector.astype(WIRE_DTYPE, copy=False).tobytes()


def from_bytes(data: bytes) -> np.ndarray:
  """Returns the float32 vector of bytes on the wire; their number is a multiple of 4."""
  return np.frombuffer(data, WIRE_DTYPE).astype(np.float32, copy=False)


def digest(data: bytes) -> str:
  """Returns a component's version: the SHA-256 of its bytes, so that no counter can be lost."""
  return hashlib.sha256(data).hexdigest()
