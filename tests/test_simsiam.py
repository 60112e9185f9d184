"""SimSiam: its loss on three numbers, its predictor's output without normalization, its costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import objectives
from lwfedssl_jax.config_groups import ObjectiveConfig
from lwfedssl_jax.objectives import losses
from lwfedssl_jax.resources import communication, costs

MASK = jnp.array([True, True, False])


def test_golden_example_on_three_numbers():
  """Cosines 0.6 and -1, and a padded row."""
  predictions = jnp.array([[3.0, 0, 0], [0, 2, 0], [1, 1, 1]])
  projections = jnp.array([[3.0, 4, 0], [0, -5, 0], [9, 9, 9]])
  loss, gradients = jax.value_and_grad(losses.negative_cosine, argnums=(0, 1))(predictions, projections, MASK)
  assert loss == pytest.approx((-0.6 + 1) / 2)
  # d(-cos)/dp = -(z - cos p) / |p| for unit vectors, half of it for a mean of two; no gradient reaches z.
  np.testing.assert_allclose(gradients[0], [[0, -0.8 / 3 / 2, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)
  np.testing.assert_array_equal(gradients[1], 0)


def test_both_views_predict_each_other():
  objective = objectives.make_objective(ObjectiveConfig(objective='simsiam'))
  heads = objective.init(jax.random.key(0), 5)
  assert heads.keys() == set(objective.head_names) == {'projector', 'predictor'}
  assert objective.update_target is None and objective.online_only == ('predictor',)
  assert heads['predictor'].keys() == {'linear1', 'norm1', 'linear2'}
  projections, mask = jax.random.normal(jax.random.key(1), (2, 8, 256)), jnp.ones(8, bool)

  def predict(z):
    hidden = z @ heads['predictor']['linear1']['kernel']
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
    return jnp.maximum(hidden, 0) @ heads['predictor']['linear2']['kernel']

  def cosine(p, z):
    return float((p * z).sum(1).dot(1 / jnp.linalg.norm(p, axis=1) / jnp.linalg.norm(z, axis=1)) / 8)

  z1, z2 = projections
  expected = -(cosine(predict(z1), z2) + cosine(predict(z2), z1)) / 2
  assert float(objective.loss(heads, projections, None, mask)) == pytest.approx(expected, abs=1e-5)


def test_it_costs_byol_s_bytes_and_both_views():
  """BYOL's last normalization has no parameters, so that the predictors are equal; both views count, as SimCLR's."""

  def cost(objective):
    values = {'encoder': 'vit_tiny', 'method': 'layerwise', 'objective': objective}
    return costs.method_cost(configs.with_values(configs.Config(), values), 32, 'paper_v4')

  assert cost('simsiam').total_bytes == cost('byol').total_bytes
  assert cost('simsiam').total_flops == 2 * cost('byol').total_flops
  payload = communication.make_payload(configs.configure(objective='simsiam'), 16)
  assert payload.head_names == ('projector', 'predictor')
