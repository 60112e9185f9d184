"""Which updates the server accepts, and how it aggregates them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.federated import aggregation
from lwfedssl_jax.federated.aggregation import Uploads

CLIENTS, SIZE = 10, 50


def make_aggregator(rule):
  return aggregation.make_aggregator(MethodConfig(aggregation=rule, trim_fraction=0.2))


@pytest.fixture
def updates():
  generator = np.random.default_rng(0)
  return {
    'a': generator.normal(1.0, 0.1, (CLIENTS, SIZE)).astype(np.float32),
    'b': generator.normal(-2.0, 0.1, (CLIENTS, 12)).astype(np.float32),
  }


@pytest.mark.parametrize(
  ('rule', 'count'), [(rule, count) for rule in ('median', 'trimmed_mean') for count in (1, 2, 5, 8, 10)]
)
def test_order_statistics_are_numpy_s_over_the_accepted(updates, rule, count):
  accepted = np.zeros(CLIENTS, bool)
  accepted[np.random.default_rng(count).permutation(CLIENTS)[:count]] = True
  poisoned = {
    name: np.where(accepted.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, np.nan) for name, leaf in updates.items()
  }
  add = jax.jit(make_aggregator(rule).add)
  state = make_aggregator(rule).init(jax.tree.map(lambda leaf: leaf[0], updates), CLIENTS)
  for first in (0, 5):  # in two chunks
    rows = slice(first, first + 5)
    uploads = Uploads({name: leaf[rows] for name, leaf in poisoned.items()}, jnp.ones(5), jnp.asarray(accepted[rows]))
    state = add(state, uploads, first)
  tally = aggregation.tally_clients(jnp.ones(CLIENTS), jnp.asarray(accepted))
  found = jax.jit(make_aggregator(rule).finish)(state, jnp.asarray(accepted), tally)
  for name, leaf in updates.items():
    ascending = np.sort(leaf[accepted], axis=0)
    trim = int(0.2 * count)
    expected = np.median(ascending, axis=0) if rule == 'median' else ascending[trim : count - trim].mean(axis=0)
    np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('rule', ['median', 'trimmed_mean'])
def test_two_of_ten_liars_move_the_mean_but_not_the_robust_rules(updates, rule):
  generator = np.random.default_rng(1)
  lies = {name: leaf.copy() for name, leaf in updates.items()}
  for leaf in lies.values():
    leaf[[2, 7]] = 100 * generator.normal(size=leaf[[2, 7]].shape)
  honest = np.ones(CLIENTS, bool)
  honest[[2, 7]] = False
  everybody = jnp.ones(CLIENTS, bool)
  tally = aggregation.tally_clients(jnp.full(CLIENTS, 0.1), everybody)
  robust = make_aggregator(rule).finish(jax.tree.map(jnp.asarray, lies), everybody, tally)
  mean = aggregation.weighted_sum(jnp.full(CLIENTS, 0.1), jax.tree.map(jnp.asarray, lies))
  for name, leaf in updates.items():
    low, high = leaf[honest].min(axis=0), leaf[honest].max(axis=0)
    assert ((robust[name] >= low) & (robust[name] <= high)).all()
    assert np.abs(mean[name] - leaf[honest].mean(axis=0)).max() > 5


def test_a_client_of_weight_zero_is_masked(updates):
  poisoned = {name: leaf.copy() for name, leaf in updates.items()}
  weights = np.full(CLIENTS, 1 / 8, np.float32)
  for client, value in ((3, np.nan), (4, np.inf)):
    weights[client] = 0
    for leaf in poisoned.values():
      leaf[client] = value
  found = aggregation.weighted_sum(jnp.asarray(weights), jax.tree.map(jnp.asarray, poisoned))
  kept = [client for client in range(CLIENTS) if client not in (3, 4)]
  for name, leaf in updates.items():
    np.testing.assert_allclose(found[name], leaf[kept].mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
  ('params', 'loss', 'valid'),
  [
    ([1.0, 2.0], 3.0, True),
    ([1.0, np.nan], 3.0, False),
    ([1.0, np.inf], 3.0, False),
    ([1.0, 2.0], np.nan, False),
    ([1.0, 2.0], np.inf, False),
    ([1.0, 2.0], 5.0, True),
    ([1.0, 2.0], 5.01, False),
    ([1.0, 2.0], -np.inf, False),
  ],
)
def test_valid_updates(params, loss, valid):
  tree = {'a': jnp.ones(3), 'b': jnp.array(params)}
  assert bool(aggregation.is_valid_update(tree, jnp.float32(loss), jnp.float32(5.0))) is valid


@pytest.mark.parametrize(('limit', 'length'), [(0.0, 5.0), (10.0, 5.0), (2.5, 2.5)])
def test_clipping_shortens_what_is_too_long(limit, length):
  received = {'a': jnp.array([1.0, 1.0]), 'b': jnp.array([2.0])}
  trained = {'a': jnp.array([4.0, 1.0]), 'b': jnp.array([6.0])}  # an update of length 5
  found = aggregation.clip_update(trained, received, limit)
  change = np.concatenate([found[name] - received[name] for name in 'ab'])
  np.testing.assert_allclose(change, np.array([3, 0, 4]) * length / 5, rtol=1e-6)


# In a round.


def leave_out(inputs, clients):
  returned = np.asarray(inputs.clients.returned).copy()
  returned[clients] = False
  return inputs._replace(clients=inputs.clients._replace(returned=jnp.asarray(returned)))


@pytest.fixture(scope='module')
def ran(tiny_round, tiny_inputs):
  tiny = tiny_round('layerwise', 'moco_v3')
  plan, inputs, params = tiny.plans[tiny.stage], tiny_inputs(), tiny.init(0)
  return tiny, plan, inputs, params, tiny.apply(params, plan, inputs)


def test_a_client_whose_loss_diverges_counts_as_dropped_out(ran):
  tiny, plan, inputs, params, (_, metrics) = ran
  assert metrics.accepted.tolist() == inputs.clients.returned.tolist() == [True, False, True, True]
  losses = np.where(metrics.accepted, metrics.client_losses, -np.inf)
  worst, limit = int(losses.argmax()), np.sort(losses)[-2:].mean()
  found, with_limit = tiny.apply(params, plan, inputs._replace(loss_limit=jnp.float32(limit)))
  expected, without = tiny.apply(params, plan, leave_out(inputs, [worst]))
  assert with_limit.accepted.tolist() == without.accepted.tolist()
  assert not with_limit.accepted[worst]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
  np.testing.assert_allclose(with_limit.client.total, without.client.total, rtol=1e-5)


def test_without_accepted_clients_parameters_keep_their_bits(ran):
  tiny, plan, inputs, params, _ = ran
  after, metrics = tiny.apply(params, plan, inputs._replace(loss_limit=jnp.float32(-1)))
  assert not metrics.accepted.any()
  jax.tree.map(np.testing.assert_array_equal, after, params)


def test_without_accepted_clients_nothing_is_calibrated(tiny_round, tiny_inputs):
  tiny = tiny_round('lw_fedssl', 'moco_v3')
  params = tiny.init(0)
  after, _ = tiny.apply(params, tiny.plans[2], tiny_inputs('lw_fedssl')._replace(loss_limit=jnp.float32(-1)))
  jax.tree.map(np.testing.assert_array_equal, after, params)


def test_median_of_clipped_updates(ran, tiny_round):
  """Against each client's update by itself: a round in which only that client returns."""
  tiny, plan, inputs, params, _ = ran

  def active(tree):
    return stages.split(tree, plan.shape, plan.start)[0]

  alone = [
    active(tiny.apply(params, plan, leave_out(inputs, [other for other in range(4) if other != client]))[0])
    for client in (0, 2, 3)
  ]
  received = active(params)

  def length(tree):
    return float(
      jnp.sqrt(sum(jnp.square(a - b).sum() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(received))))
    )

  lengths = [length(tree) for tree in alone]
  clip = float(np.median(lengths))
  expected = jax.tree.map(
    lambda start, *leaves: np.median(
      [start + min(1, clip / own) * (leaf - start) for leaf, own in zip(leaves, lengths)], axis=0
    ),
    received,
    *alone,
  )
  robust = tiny_round('layerwise', 'moco_v3', aggregation='median', client_update_clip=clip)
  found = active(robust.apply(params, plan, inputs)[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected)
  assert max(lengths) > 1.01 * clip
