"""A gradient in pieces, and with activations computed again, is the whole batch's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages, trees
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.federated import local
from lwfedssl_jax.federated import round as rounds

BATCH = 6
# (method, 0-based stage): every combination of frozen prefix, trained embedding and number of active blocks.
CASES = {'end_to_end': 0, 'layerwise': 2, 'lw_fedssl': 0, 'prog_fedssl': 1}


@pytest.fixture(scope='module', params=['moco_v3', 'byol', 'simclr'])
def objective(request):
  return request.param


@pytest.fixture(scope='module', params=CASES)
def case(request, objective, tiny_round):
  """Rules, three branches of different weights, and a batch with two invalid samples."""
  tiny = tiny_round('layerwise', objective, representation_alignment=True, alignment_kind='contrastive',
                    blocks_per_stage=1, batch_size=BATCH, learning_rate=0.3)
  plan = stages.make_plans(configs.with_values(tiny.config, {'method': request.param}))[CASES[request.param]]
  active, frozen = stages.split(tiny.init(0), plan.shape, plan.start)
  received, other = (stages.split(tiny.init(seed), plan.shape, plan.start)[0] for seed in (1, 2))
  without_predictor = {name: tree for name, tree in other.items() if name != 'predictor'}
  target = None if objective == 'simclr' else without_predictor
  views = jax.random.uniform(jax.random.key(0), (2, BATCH, 8, 8, 3))
  mask = jnp.array([True, True, False, True, True, False])
  return tiny.config, (trees.pack(active), target, received, frozen, plan.start, views, mask)


def gradient(case, **values):
  config, arguments = case
  rules = rounds.make_rules(configs.with_values(config, values), 8)
  found, losses = jax.jit(lambda *given: local.gradient(rules, *given))(*arguments)
  return trees.unpack(found, arguments[2]), losses


@pytest.fixture(scope='module')
def whole(case):
  return gradient(case)


def check_equal(found, losses, whole):
  np.testing.assert_allclose(losses, whole[1], rtol=1e-5)
  leaves = lambda tree: {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
  expected = leaves(whole[0])
  scale = max(float(np.abs(leaf).max()) for leaf in expected.values())
  assert scale > 1e-2
  for name, leaf in leaves(found).items():
    np.testing.assert_allclose(leaf, expected[name], atol=1e-5 * scale, rtol=1e-4, err_msg=name)


def test_gradient_in_pieces_is_the_whole_batch_s(case, whole):
  check_equal(*gradient(case, micro_batch_size=2), whole)


@pytest.mark.parametrize('objective', ['moco_v3'], indirect=True)
@pytest.mark.parametrize('case', ['prog_fedssl'], indirect=True)
@pytest.mark.parametrize('values', [
    {'micro_batch_size': 1}, {'rematerialize': 'all'}, {'rematerialize': 'elementwise'},
    {'micro_batch_size': 3, 'rematerialize': 'all'}], ids=str)
def test_gradient_with_activations_computed_again_is_the_same(case, whole, values):
  check_equal(*gradient(case, **values), whole)


@pytest.mark.parametrize('objective', ['moco_v3'], indirect=True)
@pytest.mark.parametrize('case', ['layerwise'], indirect=True)
def test_smaller_batches_would_give_another_gradient(case, whole):
  """What is tested above is not trivially true: the mean over pieces, each a batch of its own, is far away."""
  config, (packed, target, received, frozen, start, views, mask) = case
  rules = rounds.make_rules(config, 8)
  piece = jax.jit(lambda views, mask: local.gradient(rules, packed, target, received, frozen, start, views, mask)[0])
  pieces = [piece(views[:, i:i + 3], mask[i:i + 3]) for i in (0, 3)]
  mean = trees.unpack(jax.tree.map(lambda a, b: (a + b) / 2, *pieces), received)
  far = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole[0]))]
  assert max(far) > 1e-2


def test_micro_batch_must_divide_the_batch():
  with pytest.raises(UsageError, match='--micro_batch_size: expected a divisor of --batch_size=64, got 48'):
    configs.with_values(configs.Config(), {'batch_size': 64, 'micro_batch_size': 48})
