"""L-DAWA: a golden example, the same by tensors in NumPy, and a round in which it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import trees
from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.federated import aggregation, ldawa
from lwfedssl_jax.federated.aggregation import Uploads

pytestmark = pytest.mark.usefixtures('tiny_library')


def aggregate(clients, received, num_images, returned, stage_round, fedavg_rounds=0, raveler=trees.make_raveler()):
  """Aggregates one client after the other, as a round does."""
  config = MethodConfig(aggregation='ldawa', ldawa_fedavg_rounds=fedavg_rounds)
  rule = aggregation.make_aggregator(config)
  sizes = aggregation.weigh_clients(rule, jnp.array(num_images), stage_round)
  weights, accepted = aggregation.client_weights(sizes, jnp.array(returned)), jnp.array(returned)
  state = rule.init(raveler.ravel(received), len(clients))
  for index, client in enumerate(clients):
    own, one = jax.tree.map(lambda leaf: leaf[None], raveler.ravel(client)), slice(index, index + 1)
    uploads = Uploads(own, weights[one], accepted[one])
    state = rule.add(state, aggregation.prepare_uploads(rule, raveler, uploads, received, stage_round), index)
  return raveler.unravel(rule.finish(state, accepted, aggregation.tally_clients(weights, accepted)), received)


def test_golden_example_on_three_numbers():
  """Received (3, 4, 0). The clients' cosines to it are 1, 0.6 and -0.8; sizes do not count, a lost client neither."""
  received, clients = [3.0, 4.0, 0.0], [[6.0, 8.0, 0.0], [5.0, 0.0, 0.0], [0.0, -5.0, 0.0], [9.0, 9.0, 9.0]]
  trees_of = [{'norm': {'scale': jnp.array(row)}} for row in (received, *clients)]
  found = aggregate(trees_of[1:], trees_of[0], [1, 70, 5, 9], [True, True, True, False], stage_round=4)
  np.testing.assert_allclose(found['norm']['scale'], [(6 + 3) / 3, (8 + 4) / 3, 0], rtol=1e-6)


def test_it_begins_after_fedavg_s_rounds():
  received, clients = {'norm': {'scale': jnp.array([1.0, 0.0])}}, []
  for row in ([0.0, 2.0], [1.0, 1.0]):
    clients.append({'norm': {'scale': jnp.array(row)}})

  def at(stage_round):
    found = aggregate(clients, received, [3, 1], [True, True], stage_round, fedavg_rounds=2)
    return found['norm']['scale']

  np.testing.assert_allclose(at(1), [0.25, 1.75])
  np.testing.assert_allclose(at(2), [0.5**1.5, 0.5**1.5], rtol=1e-6)


def test_every_tensor_of_every_block_counts_for_itself():
  generator = np.random.default_rng(0)

  def draw():
    shapes = {'blocks': {'kernel': (3, 4, 5), 'bias': (3, 5)}, 'projector': {'kernel': (4, 2)}}
    return jax.tree.map(
      lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )

  received, clients = draw(), [draw() for _ in range(3)]
  received['blocks']['bias'] = received['blocks']['bias'].at[1].set(0)  # no direction: the plain mean
  found = aggregate(clients, received, [4, 2, 9], [True] * 3, stage_round=0)

  def expected(tensors, start):
    total = 0
    for tensor in tensors:
      norm = np.linalg.norm(tensor) * np.linalg.norm(start)
      total = total + (np.vdot(tensor, start) / norm if norm else 1) * tensor
    return total / len(tensors)

  for name in ('kernel', 'bias'):
    for block in range(3):
      wanted = expected(
        [np.float64(c['blocks'][name][block]) for c in clients], np.float64(received['blocks'][name][block])
      )
      np.testing.assert_allclose(found['blocks'][name][block], wanted, rtol=1e-5, atol=1e-6)
  wanted = expected(
    [np.float64(c['projector']['kernel']) for c in clients], np.float64(received['projector']['kernel'])
  )
  np.testing.assert_allclose(found['projector']['kernel'], wanted, rtol=1e-5, atol=1e-6)


def test_identical_parameters_stay():
  """A cosine of 1 changes nothing: the rule shrinks what has turned away, and nothing else."""
  params = {'norm': {'scale': jnp.array([0.3, -2.0, 7.0])}, 'blocks': {'bias': jnp.zeros((2, 3))}}
  scaled = ldawa.scale_tensors(params, params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, params)


def test_a_round_follows_its_number_within_the_stage(tiny_round, tiny_inputs):
  mean = tiny_round('layerwise', 'moco_v3', learning_rate=5.0)  # so that clients turn away
  rule = tiny_round('layerwise', 'moco_v3', learning_rate=5.0, aggregation='ldawa', ldawa_fedavg_rounds=1)
  plan, params = mean.plans[1], mean.init(0)

  def after(case, stage_round, returned=(True, False, True, True)):
    inputs = tiny_inputs()._replace(stage_round=jnp.int32(stage_round))
    inputs = inputs._replace(clients=inputs.clients._replace(returned=jnp.array(returned)))
    return case.apply(params, plan, inputs)[0]

  plain, first, second = after(mean, 0), after(rule, 0), after(rule, 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, plain)
  alone = [after(mean, 0, np.arange(4) == client) for client in (0, 2, 3)]  # the mean of one client is that client
  for name in ('blocks', 'projector'):
    trained = [jax.tree.map(np.float64, tree[name]) for tree in (params, second, *alone)]
    if name == 'blocks':
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[[0, 2, 3]], b[[0, 2, 3]]), *trained[:2])
      trained = [jax.tree.map(lambda leaf: leaf[1], tree) for tree in trained]

    def check(received, found, *clients):
      cosines = [np.vdot(own, received) / np.linalg.norm(own) / np.linalg.norm(received) for own in clients]
      assert min(cosines) < 0.99
      wanted = sum(cosine * own for cosine, own in zip(cosines, clients)) / 3
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    jax.tree.map(check, *trained)


def test_the_stage_s_rounds_are_counted_through_its_warm_up():
  from lwfedssl_jax import stages

  values = {'method': 'prog_fedssl', 'rounds_per_stage': 4, 'warmup_rounds': 2}
  plans = stages.make_plans(configs.with_values(configs.Config(), values))
  numbers = [stages.find_plan(plans, number).stage_round(number) for number in range(12)]
  assert numbers == [0, 1, 2, 3] * 3
