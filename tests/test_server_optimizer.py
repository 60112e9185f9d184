"""Server optimizers: golden examples on three numbers, in a round, and over a run that stops and resumes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, catalog, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.federated import server_optimizer
from lwfedssl_jax.training import train
from lwfedssl_jax.workdir import checkpoint, metrics_writer
from tests import tiny
from tests.deployment import in_process

pytestmark = pytest.mark.usefixtures('cheap_views', 'tiny_library')

STEPS = 2 * (np.array([0.1, -0.2, 0.0]), np.array([0.3, 0.1, -0.5]))  # what the aggregation changes in four rounds


def by_hand(name, start, learning_rate=0.5, momentum=0.8, tau=1e-2):
  """FedAvgM (arXiv 1909.06335) and Algorithm 2 of arXiv 2003.00295 in NumPy, float64; beta_2 = 0.99."""
  w, m, v = start.astype(float), np.zeros(3), np.full(3, tau**2)
  for delta in STEPS:
    square = delta**2
    if name == 'fedavgm':
      m = momentum * m + delta
      w = w + learning_rate * m
      continue
    m = momentum * m + (1 - momentum) * delta
    v = 0.99 * v + 0.01 * square if name == 'fedadam' else v - 0.01 * square * np.sign(v - square)
    w = w + learning_rate * m / (np.sqrt(v) + tau)
  return w


@pytest.mark.parametrize('name', ['fedavgm', 'fedadam', 'fedyogi'])
def test_golden_example_on_three_numbers(name):
  config = configs.configure(
    server_optimizer=name, server_learning_rate=0.5, server_momentum=0.8, server_epsilon=1e-2
  ).method
  optimizer = server_optimizer.make_server_optimizer(config)
  start = np.array([1.0, 2.0, 3.0])
  params = {'kernel': jnp.asarray(start, jnp.float32)}
  state = optimizer.init(params)
  for delta in STEPS:
    aggregated = {'kernel': params['kernel'] + jnp.asarray(delta, jnp.float32)}
    params, state = server_optimizer.take_step(optimizer, state, aggregated, params, jnp.float32(2))
  np.testing.assert_allclose(params['kernel'], by_hand(name, start), rtol=2e-6)


def test_two_rounds_of_fedavgm_written_out():
  """Changes of 1 and then 2 with momentum 0.5 and rate 1: 0 + 1 = 1, then 1 + (0.5 + 2) = 3.5."""
  optimizer = server_optimizer.make_server_optimizer(
    configs.configure(server_optimizer='fedavgm', server_momentum=0.5).method
  )
  params = {'kernel': jnp.zeros(3)}
  state = optimizer.init(params)
  for change, expected in ((1.0, 1.0), (2.0, 3.5)):
    aggregated = jax.tree.map(lambda w, change=change: w + change, params)
    params, state = server_optimizer.take_step(optimizer, state, aggregated, params, jnp.float32(1))
    np.testing.assert_array_equal(params['kernel'], np.full(3, expected))


def test_none_is_no_operation_and_an_unknown_name_is_refused():
  assert server_optimizer.make_server_optimizer(configs.configure().method) is None
  aggregated, kept = {'kernel': jnp.ones(3)}, {'anything': jnp.ones(3)}
  found = server_optimizer.take_step(None, kept, aggregated, {'kernel': jnp.zeros(3)}, jnp.float32(0))
  assert found[0] is aggregated and found[1] is kept
  with pytest.raises(UsageError, match='--server_optimizer: expected one of none, fedavgm'):
    configs.configure(server_optimizer='adam')


def test_each_optimizer_has_a_learning_rate_of_its_own():
  rates = {
    name: configs.configure(server_optimizer=name).method.effective_server_learning_rate
    for name in catalog.SERVER_OPTIMIZERS
  }
  assert rates == {'none': 1.0, 'fedavgm': 1.0, 'fedadam': 0.01, 'fedyogi': 0.01}
  assert configs.configure(server_learning_rate=0.3).method.effective_server_learning_rate == 0.3


def test_a_round_steps_from_the_global_model_and_keeps_the_state_if_no_client_is_accepted(tiny_round, tiny_inputs):
  plain = tiny_round('layerwise', 'moco_v3')
  stepped = tiny_round('layerwise', 'moco_v3', server_optimizer='fedavgm', server_learning_rate=0.5)
  plan, inputs = plain.plans[1], tiny_inputs()
  params = plain.init(0)
  optimizer, raveler = server_optimizer.make_server_optimizer(stepped.config.method), parts_raveler(plain.config)

  def active(tree):
    return raveler.ravel(stages.split(tree, plan.shape, plan.start).active)

  zeros = optimizer.init(jax.tree.map(jnp.zeros_like, active(params)))
  inputs = inputs._replace(server_state=zeros)

  aggregated, before = active(plain.apply(params, plan, inputs._replace(server_state=None))[0]), active(params)
  after, metrics = stepped.apply(params, plan, inputs)
  for name, found in active(after).items():
    np.testing.assert_allclose(found - before[name], 0.5 * (aggregated[name] - before[name]), rtol=1e-4, atol=1e-7)
    assert float(jnp.abs(found - before[name]).max()) > 1e-3
  momentum = metrics.server_state[0].trace
  jax.tree.map(lambda m, a, b: np.testing.assert_array_equal(m, b - a), momentum, aggregated, before)

  kept = inputs._replace(loss_limit=jnp.float32(-1), server_state=metrics.server_state)
  unchanged, again = stepped.apply(after, plan, kept)
  jax.tree.map(np.testing.assert_array_equal, (unchanged, again.server_state), (after, metrics.server_state))


def parts_raveler(config):
  return tiny.make_parts(config).client_update.options.model.raveler


VALUES = {'method': 'layerwise', 'blocks_per_stage': 2, 'rounds_per_stage': 3}
VALUES |= {'server_optimizer': 'fedadam', 'server_learning_rate': 0.05}


def digest_of(tmp_path, **values):
  return train.train(in_process.make_config(tmp_path, **VALUES | values))


def test_a_run_that_stops_within_a_stage_resumes_to_the_bit(tmp_path):
  undisturbed = digest_of(tmp_path / 'whole')
  for rounds in (1, 3, 5):  # within both stages, and between them
    digest_of(tmp_path / 'parts', stop_after_round=rounds, resume=True)
  resumed = digest_of(tmp_path / 'parts', resume=True)
  assert resumed['params_sha256'] == undisturbed['params_sha256']
  forgetful = train_without_state(tmp_path / 'forgetful')
  assert forgetful != undisturbed['params_sha256']
  assert digest_of(tmp_path / 'plain', server_optimizer='none')['params_sha256'] != undisturbed['params_sha256']
  rows = [metrics_writer.read_metrics(str(tmp_path / name)) for name in ('whole', 'plain')]
  traffic = [[(row['total_download_bytes'], row['total_upload_bytes']) for row in run] for run in rows]
  assert traffic[0] == traffic[1]


def train_without_state(workdir):
  """Resumes after the second round with the state of the stage's start, as a run that does not save it would."""
  digest_of(workdir, stop_after_round=2)
  with pytest.MonkeyPatch.context() as patch:
    restore = checkpoint.Checkpoints.restore_newest

    def restore_params(self, like, server_like):
      found = restore(self, like, server_like)
      fresh = found.server[0]._replace(mu=jax.tree.map(jnp.zeros_like, found.server[0].mu))
      return found._replace(server=(fresh, *found.server[1:]))

    patch.setattr(checkpoint.Checkpoints, 'restore_newest', restore_params)
    return digest_of(workdir, resume=True)['params_sha256']


def test_a_stage_starts_with_a_fresh_state(tmp_path):
  """The first round of the second stage alone, from its checkpoint, gives what the whole run gives."""
  states = []

  class Watched(in_process.Simulation):
    def run(self, params, plan, round_num, attempt, loss_limit):
      result = super().run(params, plan, round_num, attempt, loss_limit)
      states.append(jax.tree.map(np.asarray, self.server_state))
      return result

  train.train(in_process.make_config(tmp_path, **VALUES), make_runner=Watched)
  momenta = [state[0].mu['kernel'] for state in states]
  assert len(momenta) == 6 and momenta[0].shape != momenta[3].shape  # the first stage trains the embedding too
  tau = 1e-3
  for first in (0, 3):
    second = states[first][0].nu['kernel']
    delta = momenta[first] / (1 - 0.9)
    np.testing.assert_allclose(second, 0.99 * tau**2 + 0.01 * delta**2, rtol=1e-3)
