"""The blocks of an encoder as a tree: equal blocks stacked along a depth axis, or unlike blocks by name.

Equal blocks (a vision transformer's) are one tree whose leaves carry the blocks along a leading axis L. The first of
them to be taken may be traced, so that stages share an executable. Unlike blocks (a ResNet's stages) are a dictionary
`{'block_00': tree, 'block_01': tree, ...}`, cut by names, which are static: each stage has its own executable. No other
module asks which of the two a tree holds.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Array, Integer, Params, Shaped

_NAME = re.compile(r'block_(\d\d)')


def block_name(index: int) -> str:
  """Returns the name of a block as a component that is exchanged."""
  return f'block_{index:02d}'


def adapter_name(index: int) -> str:
  """Returns the name of the temporary layer behind a block, see `Encoder`."""
  return f'adapter_{index:02d}'


def is_stacked(blocks: Any) -> bool:
  """Whether the blocks are stacked; without any block they are not."""
  return not all(_NAME.fullmatch(name) for name in blocks)


def count(blocks: Any) -> int:
  """Returns the number of blocks."""
  return jax.tree.leaves(blocks)[0].shape[0] if is_stacked(blocks) else len(blocks)


def take(blocks: Params, start: Integer, number: int) -> Params:
  """Returns `number` blocks from `start` on, which may be traced if they are stacked."""
  if is_stacked(blocks):
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, number), blocks)
  return {name: blocks[name] for name in map(block_name, range(int(start), int(start) + number))}


def put(blocks: Params, part: Params, start: Integer) -> Params:
  """Replaces the blocks of a part that `take` returned from `start` on."""
  if is_stacked(blocks):
    return jax.tree.map(
      lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), start, 0), blocks, part
    )
  return {**blocks, **part}


def first(blocks: Any, number: int) -> Any:
  """Returns the first blocks."""
  if is_stacked(blocks):
    return jax.tree.map(lambda leaf: leaf[:number], blocks)
  return take(blocks, 0, number)


def readable(blocks: Any, stop: Integer) -> Any:
  """Returns what `Encoder.prefix` takes to run the blocks below `stop`.

  A stack is passed as it is, whatever `stop`, which may be traced. Of unlike blocks, those below `stop` are returned.
  """
  return blocks if is_stacked(blocks) else first(blocks, int(stop))


def copy_below(blocks: Params, start: int, stop: int) -> Params:
  """Makes stacked blocks `start` .. `stop` - 1 copies of the block below them."""
  return jax.tree.map(lambda leaf: leaf.at[start:stop].set(leaf[start - 1]), blocks)


def spread(blocks: Any, values: Shaped[Array, ' L']) -> Any:
  """Returns a tree like the blocks of one value per block: (L,) for every stacked leaf, else scalars."""
  if is_stacked(blocks):
    return jax.tree.map(lambda _: values, blocks)
  return {name: jax.tree.map(lambda _, i=i: values[i], blocks[name]) for i, name in enumerate(sorted(blocks))}


def gather(tree: Any) -> Shaped[Array, ' L']:
  """Returns the values of a tree that `spread` made."""
  if is_stacked(tree):
    return jax.tree.leaves(tree)[0]
  return jnp.stack([jax.tree.leaves(tree[name])[0] for name in sorted(tree)])


def components(tree: Any, start: int = 0) -> dict[str, Any]:
  """Returns {component: its part of the tree}, whose leaves are views if they are NumPy arrays.

  Args:
    tree: the parameters, or an active part of them.
    start: the number of the first of its blocks, if they are stacked. Each is a stack of one.
  """
  found: dict[str, Any] = {}
  for part, subtree in tree.items():
    if part == 'adapters' or (part == 'blocks' and not is_stacked(subtree)):
      found |= subtree
    elif part == 'blocks':
      for i in range(count(subtree)):
        found[block_name(start + i)] = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], subtree)
    else:
      found[part] = subtree
  return found
