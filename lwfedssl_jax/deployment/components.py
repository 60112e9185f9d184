"""Parameters as the components that are exchanged (stages.py): one float32 vector each, little-endian on the wire."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np

from lwfedssl_jax import block_trees
from lwfedssl_jax.base import Params

WIRE_DTYPE = np.dtype('<f4')


def cut(tree: Params, first_block: int = 0) -> dict[str, np.ndarray]:
  """Returns {component: vector (n,)}, the leaves of each component in their tree's order.

  Args:
    tree: the parameters, or an active part of them.
    first_block: the number of the first of its blocks.
  """
  parts = block_trees.components(jax.tree.map(np.asarray, tree), first_block)
  nothing = np.zeros(0, np.float32)  # a part may have no parameters
  return {
    name: np.concatenate([nothing, *(leaf.reshape(-1) for leaf in jax.tree.leaves(part))])
    for name, part in parts.items()
  }


def paste(tree: Params, vectors: Mapping[str, np.ndarray], first_block: int = 0) -> Params:
  """Returns a copy of the tree, as NumPy arrays, in which the given components are replaced; inverse of `cut`."""
  copy = jax.tree.map(lambda leaf: np.array(leaf), tree)
  for name, part in block_trees.components(copy, first_block).items():
    if name in vectors:
      first = 0
      for leaf in jax.tree.leaves(part):
        leaf[...] = vectors[name][first : first + leaf.size].reshape(leaf.shape)
        first += leaf.size
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
