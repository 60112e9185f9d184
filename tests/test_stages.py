"""New blocks at a stage's start."""

import jax
import numpy as np
import pytest

from lwfedssl_jax import catalog, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.models import vit


def begun(method, stage, new_block_init, blocks_per_stage=1):
  values = {'method': method, 'blocks_per_stage': blocks_per_stage}
  plan = stages.make_plans(configs.with_values(configs.Config(), values))[stage]
  size = catalog.VitTraits(width=8, depth=4, num_heads=2, mlp_ratio=2)
  params = vit.make_vit(size, 8, 4).init(jax.random.key(0))

  def kernel(tree):
    return np.asarray(tree['blocks']['mlp1']['kernel'])

  return kernel(params), kernel(stages.init_new_blocks(params, plan, new_block_init))


@pytest.mark.parametrize('method', ['layerwise', 'lw_fedssl', 'prog_fedssl'])
def test_new_blocks_are_copies_of_the_block_below(method):
  before, after = begun(method, 2, 'previous')
  np.testing.assert_array_equal(after[2], before[1])
  np.testing.assert_array_equal(after[[0, 1, 3]], before[[0, 1, 3]])
  before, after = begun(method, 1, 'previous', blocks_per_stage=2)
  np.testing.assert_array_equal(after[2:], before[[1, 1]])
  np.testing.assert_array_equal(after[:2], before[:2])


def test_random_and_first_blocks_stay_as_drawn():
  for arguments in (('layerwise', 2, 'random'), ('layerwise', 0, 'previous'), ('end_to_end', 0, 'previous')):
    before, after = begun(*arguments)
    np.testing.assert_array_equal(after, before)
    assert not np.array_equal(before[0], before[1])  # blocks are drawn independently


def test_all_methods_run_the_same_number_of_rounds():
  for blocks_per_stage in (1, 2, 4):
    rounds = set()
    for method in catalog.METHODS:
      values = {'method': method, 'blocks_per_stage': blocks_per_stage, 'rounds_per_stage': 7}
      plans = stages.make_plans(configs.with_values(configs.Config(), values))
      assert [plan.first_round for plan in plans] == [i * plans[0].num_rounds for i in range(len(plans))]
      rounds.add(sum(plan.num_rounds for plan in plans))
    assert rounds == {7 * 4 // blocks_per_stage}
