"""A gradient in pieces, and with activations computed again, is the whole batch's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages, trees
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import calibration, training_step
from lwfedssl_jax.federated.client_update import make_step_options
from lwfedssl_jax.federated.training_step import Batch, StepState
from lwfedssl_jax.resources import memory
from lwfedssl_jax.trees import without_online_only
from tests import tiny

BATCH = 6
# (method, objective) -> 0-based stage: every combination of frozen prefix, trained embedding and number of active
# blocks, and every combination of heads and target branch.
CASES = {
  ('end_to_end', 'moco_v3'): 0,
  ('layerwise', 'moco_v3'): 2,
  ('lw_fedssl', 'moco_v3'): 0,
  ('prog_fedssl', 'moco_v3'): 1,
  ('prog_fedssl', 'byol'): 1,
  ('layerwise', 'simclr'): 2,
}


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def case(request, tiny_round):
  """The configuration, three branches of different weights, and a batch with two invalid samples."""
  method, objective = request.param
  tiny = tiny_round(
    'layerwise',
    objective,
    representation_alignment=True,
    alignment_kind='contrastive',
    blocks_per_stage=1,
    batch_size=BATCH,
    learning_rate=0.3,
  )
  plan = stages.make_plans(configs.with_values(tiny.config, {'method': method}))[CASES[request.param]]
  online, received, other = (stages.split(tiny.init(seed), plan.shape, plan.start) for seed in range(3))
  global_params = received._replace(frozen=online.frozen)
  ravel = make_step_options(tiny.config, 8).model.raveler.ravel
  target = None if objective == 'simclr' else without_online_only(ravel(other.active))
  state = StepState(ravel(online.active), target, optimizer=None)
  views = jax.random.uniform(jax.random.key(0), (2, BATCH, 8, 8, 3))
  mask = jnp.array([True, True, False, True, True, False])
  return tiny.config, (state, global_params, Batch(views, mask))


def gradient(case, **values):
  config, arguments = case
  options = make_step_options(configs.with_values(config, values), 8)
  found, losses, _ = jax.jit(lambda *given: training_step.gradient(options, *given))(*arguments)
  return options.model.raveler.unravel(found, arguments[1].active), losses


@pytest.fixture(scope='module')
def whole(case):
  return gradient(case)


def check_equal(found, losses, whole):
  np.testing.assert_allclose(losses, whole[1], rtol=1e-5)

  def leaves(tree):
    return {trees.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  expected = leaves(whole[0])
  scale = max(float(np.abs(leaf).max()) for leaf in expected.values())
  assert scale > 1e-2
  for name, leaf in leaves(found).items():
    np.testing.assert_allclose(leaf, expected[name], atol=1e-5 * scale, rtol=1e-4, err_msg=name)


def test_gradient_in_pieces_is_the_full_batch_s(case, whole):
  check_equal(*gradient(case, micro_batch_size=2), whole)


@pytest.mark.parametrize('case', [('prog_fedssl', 'moco_v3')], indirect=True)
@pytest.mark.parametrize(
  'values',
  [
    {'micro_batch_size': 1},
    {'rematerialize': 'all'},
    {'rematerialize': 'elementwise'},
    {'micro_batch_size': 3, 'rematerialize': 'all'},
  ],
  ids=str,
)
def test_gradient_with_activations_computed_again_is_the_same(case, whole, values):
  check_equal(*gradient(case, **values), whole)


@pytest.mark.parametrize('case', [('layerwise', 'moco_v3')], indirect=True)
def test_smaller_batches_would_give_another_gradient(case, whole):
  """What is tested above is not trivially true: the mean over pieces, each a batch of its own, is far away."""
  config, (state, global_params, (views, mask)) = case
  options = make_step_options(config, 8)
  piece = jax.jit(lambda *batch: training_step.gradient(options, state, global_params, Batch(*batch))[0])
  pieces = [piece(views[:, i : i + 3], mask[i : i + 3]) for i in (0, 3)]
  mean = options.model.raveler.unravel(jax.tree.map(lambda a, b: (a + b) / 2, *pieces), global_params.active)
  far = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(whole[0]))]
  assert max(far) > 1e-2


def test_micro_batch_must_divide_the_batch():
  with pytest.raises(UsageError, match='--micro_batch_size: expected a divisor of --batch_size=64, got 48'):
    configs.with_values(configs.Config(), {'batch_size': 64, 'micro_batch_size': 48})


def test_calibration_in_micro_batches_is_that_of_the_full_batch(tiny_round):
  """Seven images a batch, of which at most three are stored at once: pieces of one, the largest divisor."""
  case = tiny_round('lw_fedssl', 'moco_v3')
  images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), np.uint8))
  params = jax.device_get(case.init(0))

  def calibrate(micro_batch_size):
    config = configs.with_values(case.config, {'calibration_micro_batch_size': micro_batch_size})
    return jax.jit(tiny.make_parts(config).calibrate)(params, 3, images, calibration.draw_keys(jax.random.key(0), 0))

  (whole, losses), (pieces, found) = calibrate(0), calibrate(3)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  moved = max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params)))
  assert moved > 1e-3
  for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces)):
    np.testing.assert_allclose(one, other, atol=1e-3 * moved)


def test_micro_batches_shrink_the_compiled_calibration():
  sizes = []
  for size in (0, 2):
    config = configs.configure(
      method='lw_fedssl', encoder='vit_micro', batch_size=32, calibration_micro_batch_size=size
    )
    sizes.append(memory.calibration_memory(config, 16, 32).scratch_bytes)
  assert sizes[1] < 0.5 * sizes[0]
