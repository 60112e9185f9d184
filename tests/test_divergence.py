"""The distance between client models, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.federated import aggregation, divergence
from lwfedssl_jax.federated.aggregation import Uploads

RECEIVED = {'kernel': jnp.array([2.0, 2.0]), 'other': jnp.array([2.0])}
UPLOADED = {'kernel': jnp.array([[1.0, 0], [np.nan, 7], [5, 4]]), 'other': jnp.array([[0.0], [np.inf], [8]])}
WEIGHTS = jnp.array([0.2, 0.2, 0.6])


def measure(rule, accepted, chunk):
  """The divergence of the three clients above, added `chunk` at a time."""
  aggregator, accepted = aggregation.make_aggregator(MethodConfig(aggregation=rule)), jnp.array(accepted)
  state, sums = aggregator.init(RECEIVED, 3), divergence.init(aggregator, RECEIVED)
  for first in range(0, 3, chunk):
    part = slice(first, first + chunk)
    uploads = Uploads({name: leaf[part] for name, leaf in UPLOADED.items()}, WEIGHTS[part], accepted[part])
    state, sums = aggregator.add(state, uploads, first), divergence.add(sums, uploads, RECEIVED)
  tally = aggregation.tally_clients(WEIGHTS, accepted)
  aggregated = aggregation.aggregate_or_keep(aggregator, state, accepted, tally, RECEIVED)
  return float(divergence.finish(sums, tally, aggregated, RECEIVED))


@pytest.mark.parametrize('chunk', [1, 3])
@pytest.mark.parametrize('rule', ['mean', 'median'])
def test_three_numbers_by_hand(rule, chunk):
  """Clients (1, 0, 0) and (5, 4, 8) with weights 1/4 and 3/4; the third is rejected, and is not finite.

  Their mean is (4, 3, 6), of squared length 61. Squared distances from it are 9 + 9 + 36 = 54 and 1 + 1 + 4 = 6, so
  54 / 4 + 3 * 6 / 4 = 18. The median, (3, 2, 4), has no part in it.
  """
  assert measure(rule, [True, False, True], chunk) == pytest.approx((18 / 61) ** 0.5, rel=1e-6)


@pytest.mark.parametrize('accepted', [[True, False, False], [False] * 3])
def test_one_client_or_none_has_no_distance(accepted):
  assert measure('mean', accepted, 3) == 0


def test_equal_clients_have_no_distance():
  aggregator = aggregation.make_aggregator(MethodConfig())
  same = {'kernel': jnp.full((4, 2), 1.1), 'other': jnp.full((4, 1), -0.3)}
  uploads = Uploads(same, jnp.full(4, 0.25), jnp.ones(4, bool))
  sums = divergence.add(divergence.init(aggregator, RECEIVED), uploads, RECEIVED)
  mean = {name: leaf[0] for name, leaf in same.items()}
  assert divergence.finish(sums, aggregation.tally_clients(uploads.weights, uploads.accepted), mean, RECEIVED) < 1e-3
