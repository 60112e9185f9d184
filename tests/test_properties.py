"""Whatever is thrown at configurations, federations and readers: it works, or one line says what was expected."""

import dataclasses
import pathlib
import tempfile
import typing

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import presets
from lwfedssl_jax import catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import federated_dataset, sources
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import sampling
from lwfedssl_jax.resources import accounting, communication
from lwfedssl_jax.stages import make_plans

FIELDS = {
  field.name: (field, typing.get_type_hints(group)[field.name])
  for group in configs.GROUPS.values()
  for field in dataclasses.fields(group)
}
ANYTHING = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 40),
  st.integers(),
  st.floats(),
  st.floats(0, 1),
  st.text(max_size=5),
  st.tuples(st.floats(0, 1), st.floats(0, 1)),
  st.lists(st.integers(), max_size=2),
)


def value_of(name):
  field, _ = FIELDS[name]
  choices = field.metadata['choices']
  return st.one_of(ANYTHING, st.sampled_from(sorted(choices))) if choices else ANYTHING


CONFIG_VALUES = st.lists(st.sampled_from(sorted(FIELDS)), max_size=6, unique=True).flatmap(
  lambda names: st.fixed_dictionaries({name: value_of(name) for name in names})
)


def check_one_line(error, start='--'):
  assert '\n' not in str(error) and str(error).startswith(start), error


@settings(max_examples=250, deadline=None)
@given(CONFIG_VALUES)
def test_a_configuration_is_valid_or_refused_in_one_line(values):
  try:
    config = configs.configure(**values)
  except UsageError as error:
    check_one_line(error)
    return
  assert configs.from_flat(configs.flatten(config)) == config
  plans = make_plans(config)
  assert sum(plan.num_rounds for plan in plans) == (
    config.model.traits.depth // config.method.blocks_per_stage * config.method.rounds_per_stage
  )
  assert plans[-1].stop == config.model.traits.depth
  trained = {block for plan in plans for block in range(plan.start, plan.stop)}
  assert trained == set(range(config.model.traits.depth))


DATASET = ImageDataset(
  'made',
  np.zeros((90, 8, 8, 3), np.uint8),
  np.arange(90, dtype=np.int32) % 4,
  np.zeros((0, 8, 8, 3), np.uint8),
  None,
  ('a', 'b', 'c', 'd'),
)


@settings(max_examples=80, deadline=None)
@given(
  st.fixed_dictionaries(
    {
      'num_clients': st.integers(1, 50),
      'partition': st.sampled_from(['iid', 'dirichlet', 'shards']),
      'dirichlet_beta': st.floats(1e-3, 1e3),
      'shards_per_client': st.integers(1, 6),
      'client_size_sigma': st.floats(0, 3),
      'auxiliary_fraction': st.floats(0, 0.9),
      'max_train_images': st.integers(0, 120),
      'batch_size': st.integers(2, 20),
      'seed': st.integers(0, 2**31 - 1),
      'method': st.sampled_from(sorted(catalog.METHODS)),
    }
  )
)
def test_every_image_belongs_to_one_client_or_to_the_server(values):
  try:
    config = configs.configure(**values)
    partitioned = federated_dataset.partition_dataset(DATASET, config)
  except UsageError as error:
    check_one_line(error)
    return
  held = np.concatenate([*partitioned.client_images, partitioned.server_ids])
  assert len(set(held.tolist())) == len(held) == min(values['max_train_images'] or 90, 90)
  assert len(partitioned.client_images) == config.effective_num_clients


@settings(max_examples=25, deadline=None)
@given(
  st.fixed_dictionaries(
    {
      'method': st.sampled_from(sorted(catalog.METHODS)),
      'objective': st.sampled_from(sorted(catalog.OBJECTIVES)),
      'num_clients': st.integers(1, 8),
      'client_dropout': st.floats(0, 1),
      'rounds_per_stage': st.integers(1, 4),
      'blocks_per_stage': st.sampled_from([1, 2, 4]),
      'server_calibration': st.booleans(),
      'seed': st.integers(0, 99),
    }
  ),
  st.integers(0, 8),
)
def test_payload_bytes_add_up(values, clients_per_round):
  config = configs.configure(
    **values,
    clients_per_round=min(clients_per_round, values['num_clients'], 1)
    if values['method'] == 'centralized'
    else min(clients_per_round, values['num_clients']),
  )
  plans, payload = make_plans(config), communication.make_payload(config, 8)
  num_rounds = sum(plan.num_rounds for plan in plans)
  participation = sampling.plan_participation(
    config.run.seed,
    num_rounds,
    config.effective_num_clients,
    config.effective_clients_per_round,
    config.client.client_dropout,
  )
  whole = accounting.charge_run(
    payload, plans, config.effective_num_clients, participation.client_ids, participation.returned
  )
  ledger, down, up = accounting.start_ledger(payload, config.effective_num_clients), 0, 0
  rounds = [plan for plan in plans for _ in range(plan.num_rounds)]
  for plan, ids, returned in zip(rounds, participation.client_ids, participation.returned):
    ledger, traffic = accounting.charge_round(ledger, payload, plan, ids, returned)
    down, up = down + traffic.download_bytes.sum(), up + traffic.upload_bytes.sum()
    assert traffic.download_bytes.shape[0] == len(ids)
    assert (traffic.upload_bytes[~returned] == 0).all()
    assert (traffic.download_bytes.sum(axis=1) <= sum(payload.sizes_bytes.values())).all()
  assert whole.ledger.held.tolist() == ledger.held.tolist()
  if config.is_federated and participation.returned.all():
    assert 0 < up <= participation.client_ids.size * sum(payload.sizes_bytes.values())
  if not config.is_federated:
    assert down == up == 0


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mangled_npz_is_read_or_refused_in_one_line(data):
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'images.npz'
    np.savez(path, train_images=np.zeros((4, 8, 8), np.uint8), train_labels=np.zeros(4, np.int64))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
      kind = data.draw(st.sampled_from(['flip', 'cut', 'insert']))
      where = data.draw(st.integers(0, max(0, len(content) - 1)))
      if kind == 'flip' and content:
        content[where] ^= data.draw(st.integers(1, 255))
      elif kind == 'cut':
        del content[where : where + data.draw(st.integers(1, 60))]
      else:
        content[where:where] = data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(bytes(content))
    try:
      loaded = sources.load(f'npz:{path}', image_size=8, cache_dir=f'{folder}/cache')
    except UsageError as error:
      check_one_line(error, start='')
      return
    assert loaded.train_images.dtype == np.uint8 and loaded.train_images.shape[1:] == (8, 8, 3)


@settings(max_examples=200, deadline=None)
@given(
  st.lists(
    st.one_of(
      st.text(max_size=12),
      st.sampled_from(['--flagfile', '--flagfile=a', '-flagfile=b', '--seed=1', '--', '--flagfile=', '--flagfile= ']),
    )
  )
)
def test_presets_move_to_the_front_and_nothing_is_lost(arguments):
  files, others = presets.split(arguments)

  def is_preset(argument):
    return argument.startswith('--flagfile=') or argument.startswith('-flagfile=')

  assert all(map(is_preset, files))
  kept = [argument for argument in arguments if not is_preset(argument)]
  if not {'--flagfile', '-flagfile'} & set(arguments):
    assert others == kept and len(files) == len(arguments) - len(kept)
