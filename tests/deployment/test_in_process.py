"""Real clients, each on its own images, give the simulation's parameters to the bit and its bytes to the last one."""

import dataclasses

import numpy as np
import pytest

from lwfedssl_jax import catalog
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.deployment import members
from lwfedssl_jax.deployment.local_training import LocalTraining
from lwfedssl_jax.deployment.network import Network
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.federated import sampling
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.training import train
from tests import tiny
from tests.deployment import in_process

pytestmark = pytest.mark.usefixtures('cheap_views', 'two_blocks')


@pytest.fixture(scope='module')
def two_blocks(tiny_library):
  del tiny_library
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(catalog.ENCODERS, 'vit_micro', dataclasses.replace(tiny.TINY, depth=2))
    yield


@pytest.fixture(autouse=True)
def asked_again_at_once(monkeypatch):
  """A client that got lost is there again in the next round, as in the simulation, however short a round is."""
  monkeypatch.setattr(members, 'ASK_AGAIN_SECONDS', 0.0)


CASES = {
  'lw_fedssl': {'method': 'lw_fedssl'},
  'layerwise, partial, clipped, retried': {'method': 'layerwise', 'clients_per_round': 2, 'client_update_clip': 0.05},
  'prog_fedssl, simclr, warm-up, L-DAWA, lost, retried': {
    'method': 'prog_fedssl',
    'objective': 'simclr',
    'client_dropout': 0.3,
    'warmup_rounds': 1,
    'aggregation': 'ldawa',
    'ldawa_fedavg_rounds': 1,
  },
  'end_to_end, byol, median, unequal': {
    'method': 'end_to_end',
    'objective': 'byol',
    'aggregation': 'median',
    'client_size_sigma': 0.5,
    'num_clients': 3,  # each size is a program of its own
  },
  'layerwise, fedema, partial, lost, retried': {
    'method': 'layerwise',
    'objective': 'byol',
    'client_update': 'fedema',
    'clients_per_round': 3,
    'client_dropout': 0.3,
  },
  'prog_fedssl, moon, retried': {
    'method': 'prog_fedssl',
    'representation_alignment': True,
    'alignment_kind': 'moon',
  },
  'layerwise, fedyogi': {'method': 'layerwise', 'server_optimizer': 'fedyogi', 'server_learning_rate': 0.05},
}


def compare(tmp_path, values, fail_first=()):
  simulated = in_process.make_config(tmp_path / 'simulated', **values)
  expected = in_process.run(simulated, federated_dataset.load(simulated), fail_first=fail_first)
  config = in_process.make_config(tmp_path / 'real', **{**values, 'client_dropout': 0.0})
  total = len(expected[1])
  planned = sampling.plan_participation(
    0, total, config.effective_num_clients, config.effective_clients_per_round, simulated.client.client_dropout
  )

  def lose(client, request):
    if '"kind": "task"' not in request.header:
      return False
    round_num = int(request.header.split('"round_num": ')[1].split(',')[0])
    return not planned.returned[round_num][planned.client_ids[round_num] == client].item()

  transport = in_process.InProcess(in_process.make_clients(tmp_path, config), lose)
  found = in_process.run(
    config,
    federated_dataset.load_for_server(config),
    lambda setup: Network(setup, transport, ServerOptions()),
    fail_first,
  )
  return expected, found, transport


@pytest.mark.parametrize('values', CASES.values(), ids=CASES.keys())
def test_parameters_and_bytes_are_the_simulation_s(tmp_path, values):
  fail_first = {'layerwise': (1, 2), 'prog_fedssl': (2,)}.get(values['method'], ())
  (digests, rows, summary), found, transport = compare(tmp_path, values, fail_first)
  assert found[0] == digests
  assert found[1] == rows
  assert found[2] == summary
  assert len(digests) == 4 + len(fail_first)
  assert len(set(digests)) == 4
  assert transport.sent == sum(row['total_download_bytes'] for row in rows) > 0


def test_a_client_s_noise_is_known_to_no_one_else(tmp_path):
  """The server knows the seed. Two updates from one seed differ by their noise, and by nothing without it."""

  def train_twice(**values):
    config = in_process.make_config(tmp_path, method='layerwise', objective='simclr', **values)
    images = federated_dataset.load(config).dataset.train_images[:12]
    training = LocalTraining(config, images)
    plan = make_plans(config)[-1]
    return [training.train(training.empty_params(), plan, 0, 0, 0)[0] for _ in range(2)]

  first, second = train_twice()
  assert all(np.array_equal(first[name], second[name]) for name in first)
  first, second = train_twice(client_update_clip=1.0, dp_noise_multiplier=1.0)
  assert not any(np.array_equal(first[name], second[name]) for name in first)


def test_a_server_and_clients_that_start_again_take_up_their_states(tmp_path):
  """Stopped within a stage: the server knows which states count from metrics.jsonl, the clients have them on disk."""
  values = {'method': 'layerwise', 'objective': 'byol', 'client_update': 'fedema', 'rounds_per_stage': 4}
  values |= {'clients_per_round': 2, 'checkpoint_every': 2}
  simulated = in_process.make_config(tmp_path / 'simulated', **values)
  expected = in_process.run(simulated, federated_dataset.load(simulated))[2]['params_sha256']

  def serve(**more):
    config = in_process.make_config(tmp_path / 'real', **values, **more)
    transport = in_process.InProcess(in_process.make_clients(tmp_path, config))
    data = federated_dataset.load_for_server(config)
    return train.train(config, data, make_runner=lambda setup: Network(setup, transport, ServerOptions()))

  serve(stop_after_round=2)

  def fail(row):
    if row['round'] == 2:
      raise RuntimeError('killed after the clients kept their states, before the checkpoint')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, '_traffic_row', lambda *given: fail({'round': 2}))
    with pytest.raises(RuntimeError, match='killed'):
      serve(resume=True)
  assert serve(resume=True)['params_sha256'] == expected
