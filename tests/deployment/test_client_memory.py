"""A client keeps its own memory budget: it trains in smaller pieces, or refuses in one line."""

import re

import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.deployment import components, messages
from lwfedssl_jax.deployment.client import RESERVE_MB, Client
from lwfedssl_jax.deployment.messages import Refused, Task, Update
from lwfedssl_jax.deployment.node_options import NodeOptions
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.resources import communication, planner
from tests.deployment import in_process

pytestmark = pytest.mark.usefixtures('tiny_library', 'cheap_views')
BATCH = 61  # a prime: the planner has two sizes of pieces to compile


def ask(folder, budget_mb, **values):
  """Returns a new client, and its answer to the last stage's first task."""
  config = in_process.make_config(
    'unused', **({'batch_size': BATCH, 'num_clients': 1, 'local_epochs': 1, 'max_train_images': 80} | values)
  )
  payload, plan = communication.make_payload(config, 8), stages.make_plans(config)[-1]
  required = stages.required_components(plan, payload.head_names)
  data = {name: bytes(payload.sizes_bytes[name]) for name in required}
  digests = {name: components.digest(value) for name, value in data.items()}
  client = Client(NodeOptions(client_id=0, part_of='digits', state_dir=str(folder), memory_budget_mb=budget_mb))
  task = Task('run', messages.client_config(config), 0, plan.first_round, 0, digests)
  return client, task, messages.unpack(client.handle(messages.pack(task, data)))


@pytest.mark.parametrize(('method', 'in_pieces'), [('layerwise', False), ('end_to_end', True)])
def test_a_program_stays_within_the_budget(tmp_path, method, in_pieces):
  program_mb = 0.8  # without a budget: layer-wise 0.47 in the last stage, end to end 1.00
  client, task, reply = ask(tmp_path, RESERVE_MB + program_mb, method=method)
  training, config = client._prepare_from(task.config)
  assert isinstance(reply, Update)
  assert bool(config.client.micro_batch_size) == in_pieces
  assert config.client.batch_size == BATCH
  assert training.peak_bytes(stages.make_plans(config)[-1]) <= program_mb * planner.MEGABYTE


def test_what_fits_in_no_way_is_refused_in_one_line_and_keeps_nothing(tmp_path):
  _, _, reply = ask(tmp_path, RESERVE_MB + 0.2, method='end_to_end', rematerialize='all', compute_dtype='bfloat16')
  assert isinstance(reply, Refused)
  assert re.fullmatch(
    r'--memory_budget_mb: expected at least 0\.\d for --batch_size=61 of vit_micro and --method=end_to_end, '
    r'got 0\.\d+, besides 48\.0 for images and copies',
    reply.reason,
  )
  assert not any(tmp_path.iterdir())


def test_a_program_above_the_budget_is_not_run(tmp_path):
  """The plan is of a step; a round's program may need more."""
  client, task, _ = ask(tmp_path, 0, method='layerwise')
  training, config = client._prepare_from(task.config)
  tight = Client(NodeOptions(client_id=0, part_of='digits', state_dir=str(tmp_path), memory_budget_mb=48.3))
  with pytest.raises(UsageError, match=r'^--memory_budget_mb: expected at least 48\.5 for stage 4, got 48\.3$'):
    tight._check_memory(training, stages.make_plans(config)[-1])
