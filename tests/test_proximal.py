"""FedProx's proximal term: a golden example, and what it does to a client's parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.federated import calibration, client_update, training_step
from lwfedssl_jax.federated.client_update import ClientData
from lwfedssl_jax.federated.training_step import Losses
from tests.tiny import IMAGE_SIZE, make_parts

pytestmark = pytest.mark.usefixtures('tiny_library')


def with_weight(config, weight):
  return configs.with_values(config, {'proximal_weight': weight})


def test_golden_example_on_three_numbers():
  """mu = 0.5, w - w_global = (1, 0, 2): the term is 0.25 * 5, its gradient (0.5, 0, 1), towards the global model."""
  losses = Losses(*map(jnp.float32, (3.0, 2.0, 1.0)))
  params, start = {'kernel': jnp.array([1.0, 2.0, 3.0])}, {'kernel': jnp.array([0.0, 2.0, 1.0])}
  gradients, found = training_step.add_proximal_term(0.5, params, start, {'kernel': jnp.array([0.1, 0.2, 0.3])}, losses)
  np.testing.assert_allclose(gradients['kernel'], [0.6, 0.2, 1.3], rtol=1e-6)
  np.testing.assert_allclose(found, (4.25, 2.0, 1.0), rtol=1e-6)


def test_a_client_stays_nearer_to_the_global_model(tiny_round, tiny_inputs):
  case, inputs = tiny_round('layerwise', 'simclr'), tiny_inputs()
  plan = case.plans[case.stage]
  global_params = stages.split(case.init(0), plan.shape, plan.start)
  keys = client_update.draw_keys(inputs.seed_key, 0, 0)
  data = ClientData(inputs.images, inputs.clients.image_ids[0], inputs.clients.num_images[0])
  config = case.config

  def distance(weight):
    update = make_parts(with_weight(config, weight)).client_update
    start = update.options.model.raveler.ravel(global_params.active)
    params, losses, _ = jax.jit(update.apply)(global_params, data, keys)
    squares = jax.tree.map(lambda a, b: float(jnp.square(a - b).sum()), params, start)
    return sum(squares.values()), losses

  (free, without), (held, with_term) = distance(0.0), distance(100.0)
  assert 0 < held < 0.5 * free
  terms = [losses.objective + config.objective.alignment_weight * losses.alignment for losses in (without, with_term)]
  np.testing.assert_allclose(without.total, terms[0], rtol=1e-5)
  assert float(with_term.total) > 1.01 * float(terms[1])


def test_the_server_s_calibration_has_no_such_term(tiny_round):
  config = with_weight(tiny_round('lw_fedssl', 'moco_v3').config, 7.0)
  assert client_update.make_step_options(config, IMAGE_SIZE).proximal_weight == 7.0
  assert calibration.make_step_options(config, IMAGE_SIZE, 4).proximal_weight == 0
