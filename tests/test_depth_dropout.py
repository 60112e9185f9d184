"""Depth dropout: who keeps what, what a client trains then, and what is aggregated over whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, block_trees, stages, trees
from lwfedssl_jax import config as configs
from lwfedssl_jax.catalog import MethodTraits, register_method
from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.deployment import server_options
from lwfedssl_jax.federated import aggregation, depth_dropout
from lwfedssl_jax.federated.aggregation import Uploads
from lwfedssl_jax.federated.aggregation_by_block import by_block
from tests.tiny import with_kept

pytestmark = pytest.mark.usefixtures('tiny_library')


def config_of(method, keep, **values):
  return configs.with_values(configs.Config(), {'method': method, 'depth_dropout_keep': keep, **values})


# Who keeps what.


@pytest.mark.parametrize('blocks_per_stage', [1, 2])
def test_clients_keep_the_new_blocks_and_an_even_draw_of_the_earlier_ones(blocks_per_stage):
  plan = stages.make_plans(config_of('layerwise', 3, encoder='vit_tiny', blocks_per_stage=blocks_per_stage))[4]
  keeps = depth_dropout.draw_kept(5, [plan] * 200, range(200), np.tile(np.arange(20), (200, 1)))
  assert keeps.shape == (200, 20, 12)
  earlier = plan.stop - blocks_per_stage
  assert (keeps.sum(axis=2) == 3).all() and keeps[..., earlier : plan.stop].all() and not keeps[..., plan.stop :].any()
  share = (3 - blocks_per_stage) / earlier
  error = np.sqrt(share * (1 - share) / 4000)
  np.testing.assert_allclose(keeps[..., :earlier].mean(axis=(0, 1)), share, atol=4 * error)
  assert [stages.kept_share(plan, block_trees.block_name(i)) for i in (0, earlier)] == [pytest.approx(share), 1]


def test_a_draw_depends_on_seed_round_and_client_alone():
  config = config_of('prog_fedssl', 6, encoder='vit_tiny', rounds_per_stage=2)
  ids = np.tile(np.arange(5), (24, 1))
  keeps = depth_dropout.plan_kept(config, ids)
  plans = [plan for plan in stages.make_plans(config) for _ in range(2)]
  np.testing.assert_array_equal(keeps[:, ::-1], depth_dropout.plan_kept(config, ids[:, ::-1]))
  np.testing.assert_array_equal(keeps[20:], depth_dropout.draw_kept(0, plans[20:], range(20, 24), ids[20:]))
  assert (keeps.sum(axis=2) == np.minimum([[plan.stop] for plan in plans], 6)).all()
  other = depth_dropout.plan_kept(configs.with_values(config, {'seed': 1}), ids)
  assert len({row.tobytes() for row in keeps[22]}) > 1 and not np.array_equal(keeps, other)
  assert not np.array_equal(keeps[22], keeps[23])


def test_without_it_nothing_is_drawn():
  for method, keep in (('layerwise', 0), ('end_to_end', 3), ('centralized', 3)):
    config = config_of(method, keep)
    assert depth_dropout.plan_kept(config, np.zeros((4, 2), int)) is None
    assert all(plan.num_kept == plan.stop and plan.num_frozen == plan.start for plan in stages.make_plans(config))


def test_stages_share_shapes():
  def shapes(method):
    plans = stages.make_plans(config_of(method, 3, encoder='vit_tiny'))
    return [(plan.shape.num_active, depth_dropout.num_inputs(plan)) for plan in plans]

  assert shapes('layerwise') == [(1, 1)] + [(1, 2)] * 11
  assert shapes('prog_fedssl') == [(1, 1), (2, 2)] + [(3, 3)] * 10


def test_what_makes_no_sense_is_refused(registries):
  with pytest.raises(UsageError, match=r'--depth_dropout_keep: expected 0 or at least --blocks_per_stage=2, got 1'):
    config_of('layerwise', 1, blocks_per_stage=2)
  register_method('last_two', MethodTraits(staged=True, first_trained=lambda stop, step: max(0, stop - 2)))
  with pytest.raises(UsageError, match='--depth_dropout_keep: expected 0 with --method=last_two'):
    stages.make_plans(config_of('last_two', 3))


@pytest.mark.parametrize('values', [{'server_optimizer': 'fedadam'}, {'client_update': 'fedema', 'objective': 'byol'}])
def test_what_is_kept_between_rounds_covers_the_same_blocks(values):
  values = {'method': 'prog_fedssl', **values}
  with pytest.raises(
    UsageError, match=r'--depth_dropout_keep: expected 0 with --(server_optimizer|client_update), whose'
  ):
    configs.with_values(configs.Config(), values | {'depth_dropout_keep': 2})
  assert configs.with_values(configs.Config(), values | {'depth_dropout_keep': 2, 'method': 'end_to_end'})


def test_real_clients_keep_all_blocks():
  server_options.check(config_of('end_to_end', 3), server_options.ServerOptions())
  with pytest.raises(UsageError, match='--depth_dropout_keep: expected 0 with real clients, got 3'):
    server_options.check(config_of('layerwise', 3), server_options.ServerOptions())


# Aggregation by block: three numbers a client.


# Two blocks of one number and a norm of one. Clients of 1, 2, 1 and 4 images; each trained one block.
ACTIVE = {'blocks': {'kernel': jnp.array([[10.0], [20.0]])}, 'norm': {'scale': jnp.array([30.0])}}
ROWS = np.array([(1.0, 1.0), (4.0, 2.0), (7.0, 4.0), (6.0, 8.0)], np.float32)  # its block, and the norm
KEPT, IMAGES = np.array([[0], [1], [1], [0]]), np.array([1, 2, 1, 4])


def aggregate(name, returned, axis=None):
  """Aggregates the clients one after the other, or two on each of two devices; returns both blocks and the norm."""
  raveler = trees.make_raveler()
  rule = by_block(aggregation.make_aggregator(MethodConfig(aggregation=name), axis), raveler, ACTIVE, axis)

  def on_device(rows, kept, images, accepted):
    weights = aggregation.client_weights(images, accepted, axis)
    tree = {'blocks': {'kernel': rows[:, :1, None]}, 'norm': {'scale': rows[:, 1:]}}
    params = jax.vmap(lambda own, blocks: raveler.ravel(stages.put_blocks(ACTIVE, own, blocks)))(tree, kept)
    state = rule.init(raveler.ravel(ACTIVE), len(rows))
    for index in range(len(rows)):
      own = jax.tree.map(lambda leaf, index=index: leaf[index : index + 1], Uploads(params, weights, accepted, kept))
      state = rule.add(state, own, index)
    found = raveler.unravel(rule.finish(state, accepted, aggregation.tally_clients(weights, accepted, axis)), ACTIVE)
    return jnp.append(found['blocks']['kernel'][:, 0], found['norm']['scale'])

  clients = jnp.asarray(ROWS), jnp.asarray(KEPT), jnp.asarray(IMAGES), jnp.array(returned)
  if axis is None:
    return on_device(*clients)
  both = jax.vmap(on_device, axis_name=axis)(*(leaf.reshape(2, 2, *leaf.shape[1:]) for leaf in clients))
  np.testing.assert_array_equal(*both)
  return both[0]


@pytest.mark.parametrize('axis', [None, 'clients'])
def test_golden_example_on_three_numbers(axis):
  found = aggregate('mean', [True, True, True, False], axis)
  np.testing.assert_allclose(found, [1, (2 * 4 + 7) / 3, 0.25 * 1 + 0.5 * 2 + 0.25 * 4], rtol=1e-6)
  found = aggregate('mean', [False, True, True, False], axis)
  np.testing.assert_allclose(found, [10, 5, (2 * 2 + 4) / 3], rtol=1e-6)  # nobody trained the first block: it stays


@pytest.mark.parametrize('axis', [None, 'clients'])
def test_any_rule_takes_the_clients_that_trained_a_block(axis):
  np.testing.assert_allclose(aggregate('median', [True] * 4, axis), [3.5, 5.5, 3], rtol=1e-6)
  np.testing.assert_allclose(aggregate('median', [True, False, False, True], axis), [3.5, 20, 4.5], rtol=1e-6)


# Rounds.


@pytest.mark.parametrize('method', ['layerwise', 'prog_fedssl'])
def test_keeping_all_blocks_is_the_round_without_it(tiny_round, tiny_inputs, method):
  without, all_kept = (tiny_round(method, 'moco_v3', depth_dropout_keep=keep) for keep in (0, 4))
  plan, inputs = all_kept.plans[1], tiny_inputs()
  params = without.init(0)
  expected, _ = without.apply(params, without.plans[1], inputs)
  found, _ = all_kept.apply(params, plan, with_kept(inputs, plan))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), found, expected)


def test_stages_share_a_program(tiny_round, tiny_inputs):
  tiny = tiny_round('layerwise', 'moco_v3', depth_dropout_keep=2)
  tiny.apply(tiny.init(0), tiny.plans[3], with_kept(tiny_inputs(), tiny.plans[3]))
  traced = len(tiny.traces)
  for stage in (1, 2):
    tiny.apply(tiny.init(0), tiny.plans[stage], with_kept(tiny_inputs(round_num=6), tiny.plans[stage]))
  assert len(tiny.traces) == traced
