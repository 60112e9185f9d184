"""Small operations on parameter trees."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Params

PREDICTOR = 'predictor'  # the head that only the online branch has


def select(condition: Any, on_true: Params, on_false: Params) -> Params:
  """Leaf-wise `where` with one scalar condition."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def interpolate(decay: Any, old: Params, new: Params) -> Params:
  """Exponential moving average: decay * old + (1 - decay) * new."""
  return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


def pack(tree: Params) -> Params:
  """Lays the leaves of a parameter tree end to end, in a few vectors instead of dozens of leaves.

  An optimizer step on vectors is a handful of kernels to compile and to start, whatever the number of layers.

  Args:
    tree: {part: subtree}, leaves of one dtype.

  Returns:
    {'kernel': (n,), 'other': (m,)} in the leaves' order; the predictor, which a target branch lacks, has its own two
    vectors, 'predictor/kernel' and 'predictor/other'.
  """
  groups = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    groups.setdefault(_group(path), []).append(leaf.reshape(-1))
  return {name: jnp.concatenate(leaves) for name, leaves in groups.items()}


def unpack(packed: Params, like: Params) -> Params:
  """Inverse of `pack`; `like` gives structure and shapes, and may have parts that `packed` lacks."""
  groups = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(like):
    groups.setdefault(_group(path), []).append(leaf.size)
  parts = {name: iter(jax.lax.split(vector, groups[name])) for name, vector in packed.items()}
  present = {part: tree for part, tree in like.items() if part != PREDICTOR or f'{PREDICTOR}/kernel' in packed}
  return jax.tree_util.tree_map_with_path(lambda path, leaf: next(parts[_group(path)]).reshape(leaf.shape), present)


def _group(path: tuple[Any, ...]) -> str:
  name = path_name(path)
  kind = 'kernel' if name.endswith('kernel') else 'other'
  return f'{PREDICTOR}/{kind}' if name.startswith(PREDICTOR) else kind


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
