"""Stacked equal blocks: frozen prefix and active blocks of an encoder, for any block."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import Array, Encoder, Float, Function, Key, Mask, Params


class BlockExecution(NamedTuple):
  """How blocks are executed; results differ by rounding only.

  Attributes:
    rematerialize: what of a block is computed again when it is needed: 'none'; 'elementwise', all but the results of
      matrix products, which are kept (in bfloat16 the weights of attention, not their float32 scores); 'all', of which
      only the input is kept.
    unrolled: one copy of the program per block instead of a loop, which stacks what every block keeps in one array:
      writing and reading slices of it is a fifth of the memory traffic on a GPU (docs/accelerators.md).
    attention: `plain` or an `implementation` of `jax.nn.dot_product_attention`; frozen blocks too.
  """

  rematerialize: str = 'none'
  unrolled: bool = False
  attention: str = 'plain'


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


def compose(encoder: Encoder) -> Function:
  """Builds `Encoder.train` of an encoder that trains as it is evaluated."""

  def train(active: Params, x: Array, mask: Mask, stop: Any = None) -> tuple[Float[Array, 'N _'], Params]:
    del mask
    if 'embedding' in active:
      x = encoder.embed(active['embedding'], x)
    return encoder.pool(active['norm'], encoder.blocks(active['blocks'], x, stop)), {}

  return train


KEPT = 'kept'  # what a block keeps for its backward pass besides products: `jax.ad_checkpoint.checkpoint_name`


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p)


# Of a product of which only the named result is needed, the scores of attention, the backward pass keeps the latter.
_save_products = jax.checkpoint_policies.save_from_both_policies(
  _is_product, jax.checkpoint_policies.save_only_these_names(KEPT)
)


def rematerialize(apply_block: Function, execution: BlockExecution) -> Function:
  """Returns a block's function that keeps what `execution` says for the backward pass."""
  if execution.rematerialize == 'none':
    return apply_block
  policies = {'elementwise': _save_products, 'all': jax.checkpoint_policies.nothing_saveable}
  return jax.checkpoint(apply_block, policy=policies[execution.rematerialize])


def stack_blocks(
  init_block: Callable[[Key], Params],
  apply_block: Callable[[Params, Array], Array],
  depth: int,
  execution: BlockExecution = BlockExecution(),
) -> BlockStack:
  """Stacks blocks of one kind.

  Args:
    init_block: key -> parameters of a block.
    apply_block: (its parameters, tokens) -> tokens of the same shape and dtype.
    depth: number of blocks L.
    execution: of blocks that are differentiated.
  """

  def init(key):
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(depth))
    return jax.vmap(init_block)(keys)

  def prefix(stacked, tokens, count):
    def body(i, x):
      return apply_block(jax.tree.map(lambda leaf: leaf[i], stacked), x)

    return jax.lax.fori_loop(0, count, body, tokens)

  run_block = rematerialize(apply_block, execution)

  def blocks(stacked, tokens, stop=None):
    def body(x, scanned):
      params, index = scanned
      if stop is None:
        return run_block(params, x), None
      return jax.lax.cond(index < stop, run_block, lambda _, y: y, params, x), None

    length = jax.tree.leaves(stacked)[0].shape[0]
    if stop is None and (length == 1 or execution.unrolled):
      for index in range(length):
        tokens = run_block(jax.tree.map(lambda leaf, index=index: leaf[index], stacked), tokens)
      return tokens
    return jax.lax.scan(body, tokens, (stacked, jnp.arange(length)))[0]

  return BlockStack(init, prefix, blocks)
