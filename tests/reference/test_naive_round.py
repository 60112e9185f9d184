"""The fast round agrees with the naive one, for every method and objective.

What is compared is the change of each tensor over the round, not its value: a value hides an update of 1e-3.

Tolerance. The reference is float64, the library float32, so what differs is the library's rounding, 6e-8 a number.
A parameter of size 1 that moves by 3e-3 in seven steps carries 7 * 6e-8 / 3e-3 = 1e-4 of its change as rounding of
the parameter alone; gradients through batch normalization carry as much. So 1e-3 of the largest change in the tensor
is allowed. Any of the mistakes this is to catch (a wrong sign, mask, weight, stage or step, a skipped decay) changes
some tensor by a percent at least, since every setting in tiny.VALUES is large. The loss is allowed 2e-5 of its
value.

One initialization decides. It does not amplify rounding: initial weights that are off by 1e-7 of their value move the
reference by 5e-5 of a change at most, in all cases (of eight initializations, by 5e-4). With batches of three it was
up to 0.3: batch normalization over samples that happen to be alike divides by next to nothing, and a unit that rounding
moves across a ReLU's kink has another gradient.
"""

import jax
import jax.numpy as jnp
import naive_round
import numpy as np
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.federated import client_update, optimizer
from tests.tiny import cheap_two_views, with_kept

pytestmark = pytest.mark.usefixtures('tiny_library')

CHANGE_TOLERANCE = 1e-3
LOSS_TOLERANCE = 2e-5
CHEAP_VIEWS = jax.jit(cheap_two_views, static_argnums=2)

METHODS = ('end_to_end', 'layerwise', 'lw_fedssl', 'prog_fedssl', 'centralized')
OBJECTIVES = ('moco_v3', 'byol', 'simclr', 'simsiam')


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf, np.float64) for path, leaf in leaves}


def relative_errors(before, fast, naive):
  """Per tensor: the largest error of its change, relative to its largest change or a quarter of the largest of all."""
  before, fast, naive = by_name(before), by_name(fast), by_name(naive)
  assert fast.keys() == naive.keys() == before.keys()
  largest = {name: np.abs(naive[name] - before[name]).max() for name in before}
  floor = 0.25 * max(largest.values())
  return {name: np.abs(fast[name] - naive[name]).max() / max(largest[name], floor) for name in before}


def assert_same_round(tiny, inputs, stage):
  params = tiny.init(0)
  fast, metrics = tiny.apply(params, tiny.plans[stage], inputs)
  naive = naive_round.naive_round(naive_round.Setting(tiny.config, tiny.epsilon, CHEAP_VIEWS), params, stage, inputs)
  found = {
    name: error for name, error in relative_errors(params, fast, naive.params).items() if not error <= CHANGE_TOLERANCE
  }

  pairs = {
    f'loss of client {i}': (metrics.client_losses[i], losses['total']) for i, losses in enumerate(naive.client_losses)
  }
  pairs |= {f'mean {name}': (getattr(metrics.client, name), value) for name, value in naive.client_mean.items()}
  assert (metrics.calibration is None) == (naive.calibration is None)
  pairs |= {
    f'calibration {name}': (getattr(metrics.calibration, name), value)
    for name, value in (naive.calibration or {}).items()
  }
  for name, (actual, expected) in pairs.items():
    error = abs(float(actual) - expected) / max(abs(expected), 0.1)
    if not error <= LOSS_TOLERANCE:
      found[name] = error
  if abs(metrics.divergence - naive.divergence) > CHANGE_TOLERANCE * naive.divergence:
    found['divergence'] = (metrics.divergence, naive.divergence)
  assert not found, f'fast and naive round differ: {found}'


@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('method', METHODS)
def test_fast_round_equals_naive_round(tiny_round, tiny_inputs, method, objective):
  tiny = tiny_round(method, objective)
  assert_same_round(tiny, tiny_inputs(method, objective), tiny.stage)


def test_later_layerwise_stages_agree(tiny_round, tiny_inputs):
  for stage in (2, 3):
    assert_same_round(tiny_round('layerwise', 'moco_v3'), tiny_inputs(round_num=2 * stage), stage)


def test_calibration_counts_the_distance_of_blocks_from_the_newest_that_exists(tiny_round, tiny_inputs):
  tiny = tiny_round('lw_fedssl', 'moco_v3', block_learning_rate_decay=0.5)
  assert_same_round(tiny, tiny_inputs(), 1)


def test_calibration_rate_follows_the_batch_that_the_images_allow(tiny_round, tiny_inputs):
  """15 images, a batch of 40 asked for: one step of 15, at the rate of 15."""
  tiny = tiny_round('lw_fedssl', 'moco_v3', calibration_batch_size=40)
  assert_same_round(tiny, tiny_inputs(), 2)


@pytest.mark.parametrize(
  ('method', 'stage', 'keep'), [('layerwise', 3, 2), ('layerwise', 3, 1), ('prog_fedssl', 3, 2), ('prog_fedssl', 1, 3)]
)
def test_rounds_with_depth_dropout_agree(tiny_round, tiny_inputs, method, stage, keep):
  tiny = tiny_round(method, 'moco_v3', depth_dropout_keep=keep)
  plan = tiny.plans[stage]
  inputs = with_kept(tiny_inputs(), plan)
  assert_same_round(tiny, inputs, stage)
  if (stage, keep) == (3, 2):
    assert len({tuple(row) for row in np.asarray(inputs.clients.kept).tolist()}) > 1


def test_real_augmentation_and_adam_epsilon(tiny_round, tiny_inputs):
  """One epoch with nothing replaced. Adam's own epsilon turns a gradient of rounding noise into a step, so tensors are
  compared by their norm, to 2 %.

  The biases of the keys and of the final norm have no gradient in exact arithmetic (softmax and batch normalization
  remove them); what they do is noise, and no result depends on it.
  """
  tiny = tiny_round(
    'layerwise',
    'moco_v3',
    epsilon=naive_round.ADAM_EPSILON,
    pipeline=client_update.Pipeline(),
    local_epochs=1,
    learning_rate=0.02,
  )
  inputs, stage, width = tiny_inputs(), 2, tiny.config.model.traits.width
  params = tiny.init(0)
  fast, metrics = tiny.apply(params, tiny.plans[stage], inputs)
  naive = naive_round.naive_round(naive_round.Setting(tiny.config), params, stage, inputs)
  before, fast, expected = by_name(params), by_name(fast), by_name(naive.params)
  errors = {}
  for name in before.keys() - {'norm/bias'}:
    values = [tree[name] for tree in (before, fast, expected)]
    if name == 'blocks/attention/qkv/bias':
      values = [np.delete(x, np.s_[width : 2 * width], axis=1) for x in values]
    start, got, wanted = values
    errors[name] = np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted - start), 1e-6)
  assert max(errors.values()) <= 0.02, errors
  np.testing.assert_allclose(metrics.client_losses, [x['total'] for x in naive.client_losses], rtol=2e-3)


def test_padding_is_not_seen(tiny_round, tiny_inputs):
  """Other images behind the padding, and another client that does not return, change nothing at all."""
  tiny, inputs = tiny_round('layerwise', 'moco_v3'), tiny_inputs()
  params = tiny.init(0)
  expected, _ = tiny.apply(params, tiny.plans[2], inputs)
  slot = jnp.arange(inputs.clients.image_ids.shape[1]) >= inputs.clients.num_images[:, None]
  image_ids = jnp.where(slot | ~inputs.clients.returned[:, None], 0, inputs.clients.image_ids)
  other = inputs._replace(clients=inputs.clients._replace(image_ids=image_ids))
  actual, _ = tiny.apply(params, tiny.plans[2], other)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_order_of_clients_does_not_matter(tiny_round, tiny_inputs):
  """Only the order of summation may differ: a client's draws depend on who it is, not on where it stands."""
  tiny, inputs = tiny_round('layerwise', 'moco_v3'), tiny_inputs()
  params = tiny.init(0)
  expected, _ = tiny.apply(params, tiny.plans[2], inputs)
  reverse = inputs._replace(clients=jax.tree.map(lambda x: x[::-1], inputs.clients))
  actual, _ = tiny.apply(params, tiny.plans[2], reverse)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)


@pytest.mark.parametrize('decay', [1.0, 0.5])
def test_adamw_equals_naive_adamw(tiny_round, decay):
  """Five steps of the library's own AdamW on gradients that are not small, on blocks 1 and 2 of 4."""
  params = tiny_round('layerwise', 'byol').init(0)
  active = dict(params, blocks=jax.tree.map(lambda leaf: leaf[1:3], params['blocks']))
  del active['embedding']

  def as_lists(tree):
    return dict(tree, blocks=[jax.tree.map(lambda leaf, i=i: leaf[i], tree['blocks']) for i in range(2)])

  factors = optimizer.layer_factors(active, stages.labels(active, 0, 2, False), decay)
  fast = optimizer.make_optimizer(0.5, 128, 0.1, factors)
  naive = naive_round.AdamW(0.25, 0.1, decay, naive_round.Trained((0, 1), 2, False), naive_round.ADAM_EPSILON)
  state, expected = fast.init(active), as_lists(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), active))
  generator = np.random.default_rng(0)
  for _ in range(5):
    gradients = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), active)
    updates, state = jax.jit(fast.update)(gradients, state, active)
    active = jax.tree.map(jnp.add, active, updates)
    expected = naive.step(expected, naive_round.flatten(as_lists(gradients)))
  actual, expected = naive_round.flatten(as_lists(active)), naive_round.flatten(expected)
  assert actual.keys() == expected.keys()
  for path in expected:
    np.testing.assert_allclose(actual[path], expected[path], rtol=1e-5, atol=1e-5, err_msg=str(path))
