"""A federation of plain Python loops over the library's client update, aggregation and calibration.

What a deployment does: each client by itself, on its own images alone, and a server that holds none of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.data import batching
from lwfedssl_jax.federated import aggregation, calibration, client_update
from lwfedssl_jax.federated.client_update import ClientData
from tests.tiny import make_parts

pytestmark = pytest.mark.usefixtures('tiny_library')


def round_by_hand(config, parts, params, plan, inputs):
  """Returns the parameters after a round; `inputs` are the simulator's, of which a client sees its own images only."""
  global_params = stages.split(params, plan.shape, plan.start)
  raveler = parts.client_update.options.model.raveler
  received = raveler.ravel(global_params.active)
  update = jax.jit(parts.client_update.apply)
  client_ids, image_ids, num_images, returned = map(np.asarray, inputs.clients[:4])
  weights = aggregation.client_weights(jnp.asarray(num_images), jnp.asarray(returned))
  state, accepted = parts.aggregator.init(received, len(client_ids)), []
  for position, client in enumerate(client_ids):
    own_images = inputs.images[image_ids[position, : num_images[position]]]  # on the client
    keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, client)
    capacity = batching.padded_capacity(len(own_images), config.client.batch_size)
    data = ClientData(own_images, jnp.arange(capacity) % len(own_images), jnp.int32(len(own_images)))
    steps = batching.client_steps(data.num_images, config.client.local_epochs, config.client.batch_size)
    client_params, losses, _ = update(global_params, data, keys, steps)

    client_params = aggregation.clip_update(client_params, received, config.method.client_update_clip)
    valid = aggregation.is_valid_update(client_params, losses.total, inputs.loss_limit)
    accepted.append(bool(returned[position] and valid))
    upload = aggregation.Uploads(
      jax.tree.map(lambda leaf: leaf[None], client_params), weights[position][None], jnp.array(accepted[-1:])
    )
    state = parts.aggregator.add(state, upload, position)
  tally = aggregation.tally_clients(weights, jnp.array(accepted))
  aggregated = aggregation.aggregate_or_keep(parts.aggregator, state, jnp.array(accepted), tally, received)
  params = stages.merge(params, raveler.unravel(aggregated, global_params.active), plan.start)
  if parts.calibrate is not None:
    keys = calibration.draw_keys(inputs.seed_key, inputs.round_num)
    params, _ = jax.jit(parts.calibrate)(params, plan.stop, inputs.server_images, keys)
  return params


@pytest.mark.parametrize(
  ('method', 'objective', 'values'),
  [
    ('lw_fedssl', 'moco_v3', {}),
    ('layerwise', 'simclr', {'aggregation': 'median', 'client_update_clip': 0.05}),
  ],
  ids=['lw_fedssl', 'median'],
)
def test_loops_over_the_parts_give_the_simulator_s_parameters(tiny_round, tiny_inputs, method, objective, values):
  tiny = tiny_round(method, objective, **values)
  plan, inputs, params = tiny.plans[tiny.stage], tiny_inputs(), tiny.init(0)
  expected, metrics = tiny.apply(params, plan, inputs)
  assert metrics.accepted.sum() == 3
  found = round_by_hand(tiny.config, make_parts(tiny.config), params, plan, inputs)
  largest_move = max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (expected, params))))
  assert largest_move > 1e-3
  # Two programs round differently, and batch normalization over three samples amplifies it to 7e-5 of the move.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * largest_move, rtol=0), found, expected)
