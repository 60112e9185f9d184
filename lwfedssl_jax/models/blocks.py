"""Stacked equal blocks: frozen prefix and active blocks of an encoder, for any block."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Array, Key, Params


class BlockStack(NamedTuple):
  """Blocks that follow each other.

  Attributes:
    init: key -> parameters, every leaf (L, ...).
    prefix: as in `Encoder`.
    blocks: as in `Encoder`.
  """

  init: Callable[[Key], Params]
  prefix: Callable[..., Array]
  blocks: Callable[..., Array]


def stack_blocks(
  init_block: Callable[[Key], Params],
  apply_block: Callable[[Params, Array], Array],
  depth: int,
  rematerialize: str = 'none',
) -> BlockStack:
  """Stacks blocks of one kind.

  Args:
    init_block: key -> parameters of a block.
    apply_block: (its parameters, tokens) -> tokens of the same shape and dtype.
    depth: number of blocks L.
    rematerialize: what of a block that is differentiated is computed again when it is needed: 'none'; 'elementwise',
      all but the results of matrix products, which are kept; 'all', of which only the input is kept.
  """

  def init(key):
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(depth))
    return jax.vmap(init_block)(keys)

  def prefix(stacked, tokens, count):
    def body(i, x):
      return apply_block(jax.tree.map(lambda leaf: leaf[i], stacked), x)

    return jax.lax.fori_loop(0, count, body, tokens)

  run_block = apply_block
  if rematerialize != 'none':
    policies = jax.checkpoint_policies
    kept = {'elementwise': policies.dots_saveable, 'all': policies.nothing_saveable}[rematerialize]
    run_block = jax.checkpoint(apply_block, policy=kept)

  def blocks(stacked, tokens, stop=None):
    def body(x, scanned):
      params, index = scanned
      if stop is None:
        return run_block(params, x), None
      return jax.lax.cond(index < stop, run_block, lambda _, y: y, params, x), None

    length = jax.tree.leaves(stacked)[0].shape[0]
    if length == 1 and stop is None:
      return run_block(jax.tree.map(lambda leaf: leaf[0], stacked), tokens)
    return jax.lax.scan(body, tokens, (stacked, jnp.arange(length)))[0]

  return BlockStack(init, prefix, blocks)
