"""Small operations on parameter trees."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Function, Params, Raveled

ONLINE_ONLY = 'online_only/'  # prefix of the groups that a target branch lacks
STATISTICS = 'statistics'  # the group that no optimizer touches
RUNNING = ('running_mean', 'running_var')  # the names of its leaves


def interpolate(decay: Any, old: Params, new: Params) -> Params:
  """Exponential moving average: decay * old + (1 - decay) * new.

  `optax.incremental_update` has the summands in the other order, which XLA fuses to other bits.
  """
  return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)


class Raveler(NamedTuple):
  """Concatenates the leaves of a parameter tree into a few vectors instead of dozens of leaves.

  An optimizer step on vectors compiles to a handful of kernels, for any number of layers.

  Attributes:
    ravel: {part: subtree}, leaves of one dtype -> {group: vector (n,)} in the leaves' order. The groups are `kernel`
      and `other`, `online_only/kernel` and `online_only/other` for the heads that a target branch lacks, and
      `statistics` for the running statistics of batch normalization. A group without leaves does not exist.
    unravel: (vectors, like) -> tree. `like` gives structure and shapes; online-only heads of `like` are omitted where
      `vectors` has none.
  """

  ravel: Function
  unravel: Function


def split_statistics(vectors: Raveled) -> tuple[Raveled, Raveled]:
  """Splits raveled parameters into those that are optimized, and the running statistics."""
  return (
    {name: vector for name, vector in vectors.items() if name != STATISTICS},
    {name: vector for name, vector in vectors.items() if name == STATISTICS},
  )


def overlay(tree: Params, part: Params) -> Params:
  """Replaces the leaves of a nested dictionary that `part`, which holds some of its paths, has."""
  return {
    **tree,
    **{name: overlay(tree[name], new) if isinstance(new, dict) else new for name, new in part.items()},
  }


def make_raveler(online_only: tuple[str, ...] = ()) -> Raveler:
  """Builds the raveler of an objective whose heads `online_only` exist in the online branch only."""

  def group_name(path: tuple[Any, ...]) -> str:
    name = path_name(path)
    if name.endswith(RUNNING):
      return STATISTICS
    kind = 'kernel' if name.endswith('kernel') else 'other'
    return f'{ONLINE_ONLY}{kind}' if name.split('/')[0] in online_only else kind

  def ravel(tree: Params) -> Raveled:
    groups: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      groups.setdefault(group_name(path), []).append(leaf.reshape(-1))
    return {name: jnp.concatenate(leaves) for name, leaves in groups.items()}

  def unravel(vectors: Raveled, like: Params) -> Params:
    has_online_only = any(name.startswith(ONLINE_ONLY) for name in vectors)
    present = {part: tree for part, tree in like.items() if has_online_only or part not in online_only}
    sizes: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(present):
      sizes.setdefault(group_name(path), []).append(leaf.size)
    pieces: dict[str, Iterator[jax.Array]] = {
      name: iter(jax.lax.split(vector, sizes[name])) for name, vector in vectors.items()
    }
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: next(pieces[group_name(path)]).reshape(leaf.shape), present
    )

  return Raveler(ravel, unravel)


def without_online_only(vectors: Raveled) -> Raveled:
  """Returns the groups that a target branch has."""
  return {name: vector for name, vector in vectors.items() if not name.startswith(ONLINE_ONLY)}


def path_name(path: tuple[Any, ...]) -> str:
  """'blocks/attention/qkv/kernel' for a leaf's key path."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def sha256(tree: Any) -> str:
  """Hex digest over every leaf's path, dtype, shape and bytes, in path order."""
  leaves = sorted((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))
  digest = hashlib.sha256()
  for name, leaf in leaves:
    value = np.asarray(leaf)
    digest.update(f'{name} {value.dtype} {value.shape}\n'.encode())
    digest.update(np.ascontiguousarray(value).tobytes())
  return digest.hexdigest()
