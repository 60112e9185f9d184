"""Trackers: what they receive, on resume too; a failing or hanging one leaves the run alone."""

import threading

import pytest

from lwfedssl_jax import UsageError, catalog, configure
from lwfedssl_jax.training import train
from lwfedssl_jax.workdir import metrics_writer, trackers

ROWS = [
  {'round': number, 'stage': 0, 'participants': 2, 'loss': 3.0 - number, 'images_per_second': 5.0, 'client_ids': [0, 1]}
  for number in range(3)
]
SCALARS = {'participants', 'loss', 'images_per_second'}


def log_rows(config, rows, rounds_done=0):
  with trackers.TrackerThread(config, rounds_done) as tracker:
    for row in rows:
      tracker.log(row)


@pytest.fixture
def warnings(monkeypatch):
  seen = []
  monkeypatch.setattr(trackers.logging, 'warning', lambda text, *values: seen.append(text % values))
  return seen


def test_every_choice_is_in_the_table():
  assert [*trackers.TRACKERS, 'none'] == list(catalog.TRACKERS)


def test_scalars_are_the_numbers_of_a_row():
  assert trackers.to_scalars(ROWS[0] | {'accepted': True, 'knn_accuracy': None}) == {
    'participants': 2,
    'loss': 3.0,
    'images_per_second': 5.0,
  }


def test_tensorboard_continues_where_a_run_resumes(tmp_path, warnings):
  accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
  config = configure(workdir=str(tmp_path))
  log_rows(config, ROWS)
  log_rows(config, [ROWS[2] | {'loss': 7.0}], rounds_done=2)
  events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard'))
  events.Reload()
  assert {(event.step, event.value) for event in events.Scalars('loss')} == {(0, 3.0), (1, 2.0), (2, 7.0)}
  assert set(events.Tags()['scalars']) == SCALARS and not warnings


def test_mlflow_has_one_run_with_settings_and_metrics(tmp_path, monkeypatch, warnings):
  tracking = pytest.importorskip('mlflow.tracking', reason='extra `mlflow` is not installed')
  monkeypatch.setenv('MLFLOW_TRACKING_URI', f'file://{tmp_path}/mlruns')
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  monkeypatch.setenv('MLFLOW_EXPERIMENT_NAME', 'birds')
  (tmp_path / 'first').mkdir()
  log_rows(configure(workdir=str(tmp_path / 'first'), tracker='mlflow', seed=7), ROWS[:2])
  log_rows(configure(workdir=str(tmp_path / 'first'), tracker='mlflow', seed=7, resume=True), ROWS[2:], rounds_done=2)
  assert warnings == []
  client = tracking.MlflowClient()
  (run,) = client.search_runs([client.get_experiment_by_name('birds').experiment_id])
  assert (run.info.run_name, run.info.status, run.data.params['seed']) == ('first', 'FINISHED', '7')
  losses = client.get_metric_history(run.info.run_id, 'loss')
  assert [(metric.step, metric.value) for metric in losses] == [(0, 3.0), (1, 2.0), (2, 1.0)]
  assert set(run.data.metrics) == SCALARS


def test_wandb_writes_an_offline_run_that_continues(tmp_path, monkeypatch, warnings):
  pytest.importorskip('wandb', reason='extra `wandb` is not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  config = configure(workdir=str(tmp_path), tracker='wandb')
  log_rows(config, ROWS[:2])
  log_rows(config, ROWS[2:], rounds_done=2)
  assert warnings == []
  files = sorted((tmp_path / 'wandb').glob('offline-run-*/run-*.wandb'))
  identifier = trackers._saved_id(config, 'wandb')
  assert files and {path.name for path in files} == {f'run-{identifier}.wandb'}
  written = b''.join(path.read_bytes() for path in files)
  assert b'images_per_second' in written and b'rounds_per_stage' in written


@pytest.mark.parametrize('place', ['open', 'log', 'close'])
@pytest.mark.parametrize('error', [OSError('no\nnetwork'), SystemExit('give up')], ids=repr)
def test_a_tracker_that_fails_is_one_warning(tmp_path, monkeypatch, warnings, place, error):
  logged = []

  def fail(*values):
    raise error

  def log(scalars, round_num):
    logged.append(round_num)
    if place == 'log':
      fail()

  def start(config, rounds_done):
    return fail() if place == 'open' else trackers.Tracker(log, fail if place == 'close' else lambda: None)

  monkeypatch.setitem(trackers.TRACKERS, 'wandb', trackers._Kind(start, 'wandb', ''))
  log_rows(configure(workdir=str(tmp_path), tracker='wandb'), ROWS)
  (warning,) = warnings
  assert warning.startswith('--tracker=wandb failed, the run continues without it: ') and '\n' not in warning
  assert logged == {'open': [], 'log': [0], 'close': [0, 1, 2]}[place]


def test_a_tracker_that_hangs_is_left_behind(tmp_path, monkeypatch, warnings):
  forever = threading.Event()
  hanging = trackers.Tracker(lambda scalars, round_num: bool(forever.wait()), lambda: None)
  monkeypatch.setitem(trackers.TRACKERS, 'mlflow', trackers._Kind(lambda config, rounds_done: hanging, 'mlflow', ''))
  monkeypatch.setattr(trackers, 'CLOSE_SECONDS', 0.05)
  log_rows(configure(workdir=str(tmp_path), tracker='mlflow'), ROWS)
  forever.set()
  assert warnings == ['--tracker=mlflow did not end in 0.05 seconds and is left behind']


def test_no_tracker_writes_nothing(tmp_path):
  log_rows(configure(workdir=str(tmp_path), tracker='none'), ROWS)
  assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
  monkeypatch.setattr(trackers.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UsageError, match=r"--tracker=wandb: cannot log without .*pip install 'lwfedssl-jax\[wandb\]'"):
    train.train(configure(workdir=str(tmp_path / 'run'), tracker='wandb'))
  assert not (tmp_path / 'run').exists()
  trackers.check_installed('none')


def test_rows_are_on_disk_before_listeners_get_a_copy(tmp_path):
  seen = []

  def listen(row):
    seen.append((row['round'], len(metrics_writer.read_metrics(str(tmp_path)))))
    row.clear()

  with metrics_writer.MetricsWriter(str(tmp_path), 0, 3, (listen,)) as log:
    for row in ROWS:
      log.write(dict(row))
    assert [row['round'] for row in log.rows] == [0, 1, 2]
  assert seen == [(0, 1), (1, 2), (2, 3)]
