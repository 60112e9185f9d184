"""Small operations on parameter trees."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Params


def select(condition: Any, on_true: Params, on_false: Params) -> Params:
  """Leaf-wise `where` with one scalar condition."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def interpolate(decay: Any, old: Params, new: Params) -> Params:
  """Exponential moving average: decay * old + (1 - decay) * new."""
  return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def num_bytes(tree: Params) -> int:
  """Bytes of all leaves, from their shapes and dtypes."""
  return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def path_name(path: tuple[Any, ...]) -> str:
  """'blocks/attention/qkv/kernel' for a leaf's key path."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def sha256(tree: Params) -> str:
  """Hex digest over every leaf's path, dtype, shape and bytes, in path order."""
  leaves = sorted((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
  digest = hashlib.sha256()
  for name, leaf in leaves:
    value = np.asarray(leaf)
    digest.update(f'{name} {value.dtype} {value.shape}\n'.encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()
