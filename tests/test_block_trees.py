"""Blocks as a tree, stacked or by name: the same operations, written once with plain lists of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import block_trees

NUM_BLOCKS = 4


def make_block(index, size):
  """A block of `size` by 2 and a bias, all entries different."""
  first = 100.0 * index
  return {'conv': {'kernel': first + np.arange(2.0 * size).reshape(size, 2)}, 'bias': first - np.arange(1.0, 3.0)}


BLOCKS = [make_block(i, 3) for i in range(NUM_BLOCKS)]
UNLIKE = [make_block(i, 3 + i) for i in range(NUM_BLOCKS)]


def as_stack(blocks):
  return jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)


def as_names(blocks, start=0):
  return {f'block_{start + i:02d}': block for i, block in enumerate(blocks)}


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(('build', 'blocks'), [(as_stack, BLOCKS), (as_names, BLOCKS), (as_names, UNLIKE)])
def test_blocks_are_counted_cut_and_put_back(build, blocks):
  whole = build(blocks)
  assert block_trees.count(whole) == NUM_BLOCKS
  assert_same(block_trees.first(whole, 3), build(blocks[:3]))
  part = build(blocks[1:3], 1) if build is as_names else build(blocks[1:3])
  assert_same(block_trees.take(whole, 1, 2), part)
  changed = jax.tree.map(lambda leaf: leaf + 7, part)
  expected = build([jax.tree.map(lambda leaf, i=i: leaf + 7 * (i in (1, 2)), block) for i, block in enumerate(blocks)])
  assert_same(block_trees.put(whole, changed, 1), expected)


@pytest.mark.parametrize(('build', 'blocks'), [(as_stack, BLOCKS), (as_names, UNLIKE)])
def test_components_are_the_blocks_under_their_numbers_and_share_memory(build, blocks):
  part = build(blocks[1:], 1) if build is as_names else build(blocks[1:])
  tree = {'blocks': part, 'norm': {'scale': np.ones(2)}}
  found = block_trees.components(tree, 1)
  assert list(found) == ['block_01', 'block_02', 'block_03', 'norm']
  for index in range(1, NUM_BLOCKS):
    ours, theirs = jax.tree.leaves(found[f'block_{index:02d}']), jax.tree.leaves(blocks[index])
    assert [leaf.reshape(-1).tolist() for leaf in ours] == [leaf.reshape(-1).tolist() for leaf in theirs]
  found['block_02']['bias'][...] = 55
  again = block_trees.components(tree, 1)
  assert [np.ravel(again[name]['bias'])[0] % 100 for name in list(found)[:3]] == [99, 55, 99]


def test_a_stack_may_be_cut_at_a_traced_place_and_is_read_whole():
  whole = as_stack(BLOCKS)
  assert_same(jax.jit(lambda start: block_trees.take(whole, start, 1))(2), as_stack(BLOCKS[2:3]))
  assert block_trees.readable(whole, 2) is whole
  assert_same(block_trees.readable(as_names(UNLIKE), 2), as_names(UNLIKE[:2]))
  with pytest.raises(jax.errors.ConcretizationTypeError):
    jax.jit(lambda start: block_trees.take(as_names(UNLIKE), start, 1))(2)


@pytest.mark.parametrize(('build', 'blocks'), [(as_stack, BLOCKS), (as_names, UNLIKE)])
def test_a_value_per_block_reaches_every_leaf_of_it(build, blocks):
  values = jnp.array([3, 1, 4, 1])
  tree = block_trees.spread(build(blocks), values)
  np.testing.assert_array_equal(block_trees.gather(tree), values)
  assert [int(jnp.sum(leaf)) for leaf in jax.tree.leaves(block_trees.components({'blocks': tree})['block_02'])] == [
    4,
    4,
  ]
