"""A federation in one process: clients behind function calls, and runs whose parameters are recorded."""

from lwfedssl_jax import config as configs
from lwfedssl_jax import trees
from lwfedssl_jax.config import Config
from lwfedssl_jax.deployment.client import Client
from lwfedssl_jax.deployment.messages import Envelope
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.training import train
from lwfedssl_jax.training.simulation import Simulation
from lwfedssl_jax.workdir import metrics_writer

VALUES = {
  'dataset': 'digits',
  'image_size': 8,
  'num_clients': 4,
  'max_train_images': 90,
  'auxiliary_fraction': 0.2,
  'batch_size': 12,
  'client_chunk': 1,
  'local_epochs': 2,
  'rounds_per_stage': 2,
  'learning_rate': 8e-3,
  'calibration_epochs': 1,
  'calibration_batch_size': 8,
  'checkpoint_every': 4,  # at the ends of stages
  'knn_bank_images': 60,
  'knn_test_images': 40,
  'jitter_probability': 0.0,  # a third less to compile
  'grayscale_probability': 0.0,
  'blur_probability': (0.0, 0.0),
  'solarize_probability': (0.0, 0.0),
}
UNTIMED = (*metrics_writer.WALL_CLOCK, 'padding_fraction')


def make_config(workdir, **values) -> Config:
  return configs.with_values(Config(), VALUES | {'workdir': str(workdir)} | values)


class InProcess:
  """A transport to clients in this process; `lose` says whose answers do not arrive: (client, header) -> bool."""

  def __init__(self, clients, lose=lambda client, request: False):
    self.clients, self.lose = dict(clients), lose
    self.sent = self.received = 0  # bytes of components

  def node_ids(self):
    return set(self.clients)

  def exchange(self, requests, timeout_seconds):
    replies = {}
    for node, request in requests.items():
      self.sent += sum(map(len, request.vectors.values()))
      reply = self.clients[node].handle(Envelope(str(request.header), dict(request.vectors)))
      if not self.lose(node - 100, request):
        replies[node] = reply
        self.received += sum(map(len, reply.vectors.values()))
    return replies


def make_clients(folder, config, **options):
  """Clients 0 .. N-1, of nodes 100 .. , each with its part of the data set."""
  return {
    100 + i: Client(NodeOptions(client_id=i, part_of='digits', state_dir=str(folder / f'client{i}'), **options))
    for i in range(config.effective_num_clients)
  }


class Recorder:
  """A runner that records the parameters' digest after each attempt; in `fail_first`, nobody is accepted at first."""

  def __init__(self, runner, digests, fail_first=()):
    self._runner, self._digests, self._fail_first = runner, digests, fail_first

  @property
  def server_state(self):
    return self._runner.server_state

  def resume(self, rounds_done, server_state):
    self._runner.resume(rounds_done, server_state)

  def run(self, params, plan, round_num, attempt, loss_limit):
    if attempt == 0 and round_num in self._fail_first:
      loss_limit = -1e9
    params, result = self._runner.run(params, plan, round_num, attempt, loss_limit)
    self._digests.append(trees.sha256(params))
    return params, result

  def keep_since(self, rounds_done):
    self._runner.keep_since(rounds_done)

  def close(self):
    self._runner.close()


def run(config, data, make_runner=Simulation, fail_first=()):
  """Trains; returns the digests after each attempt, the rows without times, and the summary without times."""
  digests = []
  summary = train.train(config, data, make_runner=lambda setup: Recorder(make_runner(setup), digests, fail_first))
  rows = [{k: v for k, v in row.items() if k not in UNTIMED} for row in metrics_writer.read_metrics(config.run.workdir)]
  return digests, rows, {k: v for k, v in summary.items() if k not in UNTIMED}
