"""Sweeps: what is planned, skipped, resumed and reported; the runs themselves are stood in for, but for one test."""

import os

import pytest

from lwfedssl_jax import UsageError
from lwfedssl_jax import config as configs
from lwfedssl_jax.training import simulation, sweep, train
from lwfedssl_jax.workdir import metrics_writer, run_dir
from tests.test_training import TINY

BASE = configs.with_values(configs.Config(), TINY)


def plan(tmp_path, methods=('layerwise', 'lw_fedssl'), seeds=(0, 1), vary=None):
  return sweep.plan(BASE, methods, seeds, sweep.parse_variations(vary or ''), str(tmp_path))


def test_every_combination_has_its_folder(tmp_path):
  runs = plan(tmp_path, vary='learning_rate=1e-3,2e-3')
  names = [os.path.basename(run.workdir) for run in runs]
  assert names[:4] == [f'layerwise-learning_rate={rate}-seed{seed}' for rate in (0.001, 0.002) for seed in (0, 1)]
  assert len(set(names)) == 8
  assert [run.config.client.learning_rate for run in runs] == [1e-3, 1e-3, 2e-3, 2e-3] * 2
  assert all(run.config.run.resume for run in runs)


@pytest.mark.parametrize(
  ('text', 'values'),
  [
    ('server_calibration=true,false', (True, False)),
    ('crop_area=0.2:1,0.5:1', ((0.2, 1.0), (0.5, 1.0))),
    ('objective=byol', ('byol',)),
    ('num_clients=2,4', (2, 4)),
  ],
)
def test_values_have_their_field_s_type(text, values):
  [variation] = sweep.parse_variations(text)
  assert variation.values == tuple((value,) for value in values)


def test_variations_are_combined_and_joined_flags_vary_together(tmp_path):
  runs = plan(tmp_path, ('layerwise',), (0,), 'client_dropout=0.25,0.5; image_size+patch_size=16+4,32+8')
  assert [os.path.basename(run.workdir) for run in runs] == [
    f'layerwise-client_dropout={dropout}-image_size={size}-patch_size={size // 4}-seed0'
    for dropout in (0.25, 0.5)
    for size in (16, 32)
  ]
  found = [(run.config.client.client_dropout, run.config.model.image_size, run.config.model.patch_size) for run in runs]
  assert found == [(0.25, 16, 4), (0.25, 32, 8), (0.5, 16, 4), (0.5, 32, 8)]


@pytest.mark.parametrize(
  'text',
  [
    'learning_rate',
    'nonsense=1',
    ';',
    'num_clients=2;',
    'image_size+patch_size=16+4,32',
    'image_size+seed=16+4',
    'seed=1,2',
    'num_clients=many',
    'server_calibration=perhaps',
    'num_clients=',
  ],
)
def test_what_cannot_vary(text):
  with pytest.raises(UsageError, match='--vary: expected'):
    sweep.parse_variations(text)


def test_finished_runs_are_skipped_and_failures_do_not_stop_the_rest(tmp_path, monkeypatch, capsys):
  trained = []

  def stand_in(config, data):
    trained.append(os.path.basename(config.run.workdir))
    assert data.image_size == 16
    if config.method.method == 'lw_fedssl' and config.run.seed == 0:
      raise UsageError('--workdir: expected something else')
    if config.method.method == 'lw_fedssl':
      raise ZeroDivisionError('by zero')
    return {'finished': True}

  monkeypatch.setattr(train, 'train', stand_in)
  done = plan(tmp_path)[0].workdir
  os.makedirs(done)
  run_dir.write_json(os.path.join(done, run_dir.SUMMARY), {})
  outcome = sweep.run_all(plan(tmp_path, methods=('lw_fedssl', 'layerwise')))
  assert trained == ['lw_fedssl-seed0', 'lw_fedssl-seed1', 'layerwise-seed1']
  assert outcome.finished == [done, str(tmp_path / 'layerwise-seed1')]
  assert outcome.failed == {
    str(tmp_path / 'lw_fedssl-seed0'): '--workdir: expected something else',
    str(tmp_path / 'lw_fedssl-seed1'): 'ZeroDivisionError: by zero',
  }
  assert 'failed: ' in capsys.readouterr().out


def test_a_signal_ends_the_whole_sweep(tmp_path, monkeypatch):
  monkeypatch.setattr(train, 'train', lambda config, data: {'finished': False, 'stopped_by': 'SIGTERM'})
  assert sweep.run_all(plan(tmp_path)) == sweep.Outcome([], {}, 'SIGTERM')


def test_estimate_counts_what_is_left(tmp_path):
  run = plan(tmp_path)[0]
  data = sweep.load_data(run.config)
  whole, half = (sweep.count_flops(run.config, data, first) for first in (0, 2))
  second_stage = whole - sweep.count_flops(run.config, data, 2)
  assert 0 < half < whole and second_stage < half  # the later stage runs a longer prefix
  assert sweep.count_flops(run.config, data, 4) == 0
  calibrated = configs.with_values(run.config, {'server_calibration': True})
  assert sweep.count_flops(calibrated, data) > whole
  text = sweep.describe(plan(tmp_path), 6e11 * sweep.FIRST_GUESS_SHARE, 1e9)
  assert text.startswith('4 runs, 4 to do:') and 'about 10 minutes' in text


def test_estimate_follows_who_takes_part_and_how_often_the_server_trains(tmp_path):
  """Clients that do not return count as work not done, as little as those not sampled."""

  def count(method='layerwise', **values):
    config = configs.with_values(BASE, {'method': method, 'client_size_sigma': 0.0, **values})
    return sweep.count_flops(config, sweep.load_data(config))

  assert count(client_dropout=0.25) == pytest.approx(0.75 * count())
  assert count(clients_per_round=1) == pytest.approx(count() / 3)
  assert count(local_epochs=2) == pytest.approx(2 * count())
  clients = count(server_calibration=False, method='lw_fedssl')
  server = [count('lw_fedssl', calibration_epochs=epochs) - clients for epochs in (1, 2)]
  assert server[0] > 0 and server[1] == pytest.approx(2 * server[0])


def test_what_is_done_is_read_from_the_folders(tmp_path):
  finished, begun = plan(tmp_path, methods=('layerwise',))
  for run, rounds in ((finished, 4), (begun, 3)):
    os.makedirs(run.workdir)
    rows = ''.join(f'{{"round": {index}}}\n' for index in range(rounds))
    with open(os.path.join(run.workdir, metrics_writer.METRICS), 'w', encoding='utf-8') as file:
      file.write(rows)
  run_dir.write_json(os.path.join(finished.workdir, run_dir.SUMMARY), {})
  runs = plan(tmp_path, methods=('layerwise',), seeds=(0, 1, 2))
  assert [(run.rounds_done, run.finished) for run in runs] == [(4, True), (3, False), (0, False)]
  lines = sweep.describe(runs, 1e9, 1e9).splitlines()
  assert lines[0] == '3 runs, 2 to do:'
  assert [line.split(':')[0].strip() for line in lines[1:4]] == ['finished', 'from round 4', 'new']


def test_time_to_go_is_that_of_the_runs_not_yet_done(tmp_path, monkeypatch, capsys):
  """Three equal runs of two minutes each."""
  clock = iter(range(0, 10_000, 120))
  monkeypatch.setattr(sweep.time, 'perf_counter', lambda: next(clock))
  monkeypatch.setattr(sweep, 'count_flops', lambda config, data, first_round: 7.0)
  monkeypatch.setattr(train, 'train', lambda config, data: {'finished': True})
  sweep.run_all(plan(tmp_path, methods=('layerwise',), seeds=(0, 1, 2)))
  said = [line for line in capsys.readouterr().out.splitlines() if 'minutes left' in line]
  assert [line.split()[1] for line in said] == ['4', '2']


def test_runs_that_differ_in_seed_share_the_compiled_round(tmp_path):
  """And a seed trained in a sweep ends with the same bits as one trained alone."""
  values = {'rounds_per_stage': 1, 'blocks_per_stage': 4, 'client_size_sigma': 0.0}
  base = configs.with_values(BASE, values)
  runs = sweep.plan(base, ['layerwise'], [0, 1], (), str(tmp_path))
  simulation._shared_round.cache_clear()
  assert sorted(sweep.run_all(runs).finished) == sorted(run.workdir for run in runs)
  assert simulation._shared_round.cache_info().misses == 1
  assert simulation._shared_round.cache_info().hits == 1
  summaries = [run_dir.read_json(os.path.join(run.workdir, run_dir.SUMMARY)) for run in runs]
  assert summaries[0]['params_sha256'] != summaries[1]['params_sha256']
  simulation._shared_round.cache_clear()
  alone = train.train(configs.with_values(runs[1].config, {'workdir': str(tmp_path / 'alone')}))
  assert alone['params_sha256'] == summaries[1]['params_sha256']
