"""The driver on real digits at reduced scale: determinism, resume, damage, what a run leaves behind."""

import errno
import json
import os
import re
import signal

import numpy as np
import pytest

import lwfedssl_jax
from lwfedssl_jax import UsageError, run_evaluation
from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import StorageError, TrainingError
from lwfedssl_jax.resources import costs
from lwfedssl_jax.training import signals, simulation, train
from lwfedssl_jax.workdir import metrics_writer, run_dir

pytestmark = pytest.mark.usefixtures('cheap_views')

TINY = {
  'dataset': 'digits',
  'image_size': 16,
  'encoder': 'vit_micro',
  'num_clients': 3,
  'max_train_images': 150,
  'auxiliary_fraction': 0.2,
  'batch_size': 16,
  'rounds_per_stage': 2,
  'blocks_per_stage': 2,
  'local_epochs': 1,
  'learning_rate': 8e-3,
  'temperature': 0.2,
  'blur_probability': (0.0, 0.0),
  'client_size_sigma': 0.5,
  'method': 'lw_fedssl',
  'knn_bank_images': 300,
  'knn_test_images': 100,
}
TOTAL_ROUNDS = 4


def tiny(workdir, **values) -> Config:
  return configs.with_values(Config(), TINY | {'workdir': str(workdir)} | values)


PASSED = []  # rows that the finished run passed to its callback


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('finished')
  return workdir, train.train(tiny(workdir), on_row=PASSED.append)


def test_summary_and_rows_agree(finished):
  workdir, summary = finished
  rows = metrics_writer.read_metrics(str(workdir))
  assert summary == json.loads((workdir / 'summary.json').read_text())
  assert [row['round'] for row in rows] == list(range(TOTAL_ROUNDS))
  assert rows == PASSED
  assert [row['stage'] for row in rows] == [0, 0, 1, 1]
  assert [row.get('knn_accuracy') is not None for row in rows] == [False, True, False, True]
  assert summary['final_knn_accuracy'] == rows[-1]['knn_accuracy']
  assert summary['download_bytes'] == pytest.approx(sum(row['download_bytes'] for row in rows))
  assert summary['upload_bytes'] * 3 == sum(row['total_upload_bytes'] for row in rows)
  assert all(np.isfinite([row['loss'], row['alignment_loss'], row['calibration_loss']]).all() for row in rows)
  assert summary['raw_pixel_knn_accuracy'] > 0.5  # the labels and the test images belong together


def test_rows_list_the_clients(finished):
  workdir, _ = finished
  rows = metrics_writer.read_metrics(str(workdir))
  sizes = np.array([len(ids) for ids in json.loads((workdir / 'partition.json').read_text())['clients']])
  for row in rows:
    assert row['client_ids'] == [0, 1, 2]
    assert row['loss'] == pytest.approx(np.average(row['client_losses'], weights=sizes), rel=1e-5)
    assert sum(row['client_download_bytes']) == row['total_download_bytes']
    assert sum(row['client_upload_bytes']) == row['total_upload_bytes']
  assert len(set(rows[0]['client_losses'])) == len(set(sizes.tolist())) == 3


def test_bytes_are_those_that_the_cost_sheet_predicted(finished):
  workdir, summary = finished
  predicted = costs.to_json(costs.method_cost(tiny(workdir), 16, 'actual', with_memory=False))
  assert summary['download_bytes'] == pytest.approx(predicted['download_bytes'], rel=1e-12)
  assert summary['upload_bytes'] == pytest.approx(predicted['upload_bytes'], rel=1e-12)


def test_a_run_in_micro_batches_on_a_budget_has_the_full_batch_s_losses_and_resumes(finished, tmp_path, capsys):
  whole = metrics_writer.read_metrics(str(finished[0]))
  values = {'micro_batch_size': 8, 'client_memory_budget_mb': 1000.0}
  train.train(tiny(tmp_path, stop_after_round=1, **values))
  assert 'memory plan: micro_batch_size=8 of 16' in capsys.readouterr().out
  train.train(tiny(tmp_path, stop_after_round=2, resume=True, **values))
  rows = metrics_writer.read_metrics(str(tmp_path))
  assert [row['round'] for row in rows] == [0, 1]
  assert rows[0]['loss'] == pytest.approx(whole[0]['loss'], rel=1e-5)
  # AdamW divides by gradients' size: rounding of gradients near zero shows in the second round, as it must where the
  # pieces are really summed.
  assert rows[1]['loss'] == pytest.approx(whole[1]['loss'], rel=2e-3)
  assert rows[1]['loss'] != whole[1]['loss']
  loaded = lwfedssl_jax.load_encoder(str(tmp_path))  # of a run that has reached two blocks of four
  assert (loaded.depth, loaded.rounds_done) == (2, 2)


def test_workdir_holds_what_a_person_looks_at(finished):
  workdir, _ = finished
  for name in ('views.png', 'partition.png', 'partition.json', 'config.json', 'tensorboard', 'checkpoints'):
    assert (workdir / name).exists(), name
  partition = json.loads((workdir / 'partition.json').read_text())
  assigned = [i for ids in (*partition['clients'], partition['server']) for i in ids]
  assert len(assigned) == len(set(assigned)) == 150
  saved = json.loads((workdir / 'config.json').read_text())
  assert saved['config']['num_clients'] == 3
  assert {'jax', 'flax', 'python'} <= saved['versions'].keys()
  assert re.fullmatch(r'20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00', saved['started'])
  assert saved['command'].startswith('python ') and saved['host_kind'].endswith(f'{os.cpu_count()} CPUs')


def files_of(workdir):
  return {path: path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file() and path.name != '.lock'}


def test_encoder_is_loaded_in_one_line_and_gives_the_run_s_embeddings(finished):
  workdir, _summary = finished
  before = files_of(workdir)
  loaded = lwfedssl_jax.load_encoder(str(workdir))
  assert (loaded.depth, loaded.rounds_done) == (4, TOTAL_ROUNDS)
  dataset = lwfedssl_jax.load_dataset('digits', image_size=16)
  images = dataset.test_images[np.sort(_monitored_test_images(dataset))]
  with np.load(workdir / 'embeddings.npz') as kept:
    np.testing.assert_allclose(loaded.apply(loaded.params, images), kept['trained'], atol=1e-5)
    assert np.abs(kept['trained'] - kept['random']).max() > 0.01
    assert kept['class_names'].tolist() == list('0123456789')
  assert files_of(workdir) == before


def _monitored_test_images(dataset):
  """The monitor's choice: the second draw of its generator."""
  generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(0, spawn_key=(15,))))
  generator.permutation(len(dataset.train_images))
  return generator.permutation(len(dataset.test_images))[: TINY['knn_test_images']]


def test_evaluations_are_stored_with_the_run_under_a_descriptive_name(finished):
  workdir, _summary = finished
  dataset = lwfedssl_jax.load_dataset('digits', image_size=16)
  trained = lwfedssl_jax.evaluate_run(str(workdir), 'linear', dataset, label_fraction=0.1, seeds=(0, 1))
  scratch = lwfedssl_jax.evaluate_run(
    str(workdir), 'linear', dataset, label_fraction=0.1, seeds=(0, 1), from_scratch=True
  )
  assert trained['name'] == 'linear, digits, 10 % of labels'
  assert scratch['name'] == 'linear, digits, 10 % of labels, from scratch'
  assert trained['mean']['accuracy'] > 0.3  # of ten classes
  assert trained['mean'] != scratch['mean']
  accuracies = [run['accuracy'] for run in scratch['runs']]
  assert accuracies[0] != accuracies[1]  # other weights and other labels
  assert [kept['name'] for kept in run_evaluation.read_evaluations(str(workdir))] == [trained['name'], scratch['name']]
  assert (workdir / 'evaluations' / 'linear_digits_10_of_labels.png').stat().st_size > 5000


@pytest.mark.parametrize('content', ['nothing', 'no checkpoint', 'a size out of all bounds'])
def test_what_has_no_encoder_is_named(tmp_path, content):
  if content != 'nothing':
    with run_dir.claim_workdir(tiny(tmp_path)):
      pass
  if content == 'a size out of all bounds':
    config = tmp_path / 'config.json'
    config.write_text(config.read_text().replace('"image_size": 16', '"image_size": 1000000'))
  with pytest.raises(UsageError, match=str(tmp_path)):
    lwfedssl_jax.load_encoder(str(tmp_path))
  assert not (tmp_path / 'checkpoints').exists()


def test_tensorboard_events_hold_the_losses(finished):
  accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
  workdir, _ = finished
  events = accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  events.Reload()
  rows = metrics_writer.read_metrics(str(workdir))
  written = [(event.step, event.value) for event in events.Scalars('loss')]
  assert written == [(row['round'], pytest.approx(row['loss'], rel=1e-6)) for row in rows]


def test_same_seed_same_bits_and_other_seed_other_bits(finished, tmp_path):
  _, summary = finished
  again = train.train(tiny(tmp_path / 'again'))
  other = train.train(tiny(tmp_path / 'other', seed=1))
  assert again['params_sha256'] == summary['params_sha256']
  assert again['final_loss'] == summary['final_loss']
  assert other['params_sha256'] != summary['params_sha256']


@pytest.mark.parametrize('stop', range(1, TOTAL_ROUNDS))
def test_stopping_after_any_round_and_resuming_changes_nothing(finished, tmp_path, stop):
  whole_workdir, summary = finished
  stopped = train.train(tiny(tmp_path, stop_after_round=stop))
  assert stopped['finished'] is False
  assert stopped['rounds_done'] == stop
  assert not (tmp_path / 'summary.json').exists()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:  # a crash after a row was written and before its checkpoint
    file.write(f'{{"round": {stop}, "stage": 1, "loss": 1.0}}\n{{"round": {stop + 1}, "sta')
  resumed = train.train(tiny(tmp_path, resume=True))

  def untimed(rows):
    return [{k: v for k, v in row.items() if k not in metrics_writer.WALL_CLOCK} for row in rows]

  assert untimed([resumed]) == untimed([summary])
  assert untimed(metrics_writer.read_metrics(str(tmp_path))) == untimed(metrics_writer.read_metrics(str(whole_workdir)))


def test_resuming_a_finished_run_returns_its_summary_and_writes_nothing(finished):
  workdir, summary = finished
  before = files_of(workdir)
  assert train.train(tiny(workdir, resume=True)) == summary
  assert files_of(workdir) == before


def test_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_one_before(finished, tmp_path):
  _, summary = finished
  train.train(tiny(tmp_path, stop_after_round=3))
  files = sorted(
    (tmp_path / 'checkpoints' / '3' / 'params' / 'ocdbt.process_0' / 'd').iterdir(),
    key=lambda path: path.stat().st_size,
  )
  damaged = bytearray(files[-1].read_bytes())
  damaged[len(damaged) // 2] ^= 1
  files[-1].write_bytes(damaged)
  assert train.train(tiny(tmp_path, resume=True))['params_sha256'] == summary['params_sha256']


def test_only_damaged_checkpoints_are_an_error_and_stay_as_they_are(tmp_path):
  train.train(tiny(tmp_path, stop_after_round=2))
  for step in (tmp_path / 'checkpoints').iterdir():
    (step / 'meta' / 'metadata').write_text('')
  with pytest.raises(UsageError, match='expected a valid checkpoint'):
    train.train(tiny(tmp_path, resume=True))
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', '2']


def test_round_without_returning_clients_keeps_the_model_and_logs_it(tmp_path, capsys):
  summary = train.train(tiny(tmp_path / 'a', client_dropout=1.0))
  rows = metrics_writer.read_metrics(str(tmp_path / 'a'))
  assert {row['participants'] for row in rows} == {0}
  assert {row['loss'] for row in rows} == {None}
  assert [row['client_losses'] for row in rows] == [[None] * 3] * TOTAL_ROUNDS
  assert 'no client returned' in capsys.readouterr().out
  assert summary['upload_bytes'] == 0
  assert summary['download_bytes'] > 0  # paid before dropping out
  untouched = train.train(tiny(tmp_path / 'b', client_dropout=1.0, method='prog_fedssl'))
  assert untouched['params_sha256'] == summary['params_sha256']


def test_updates_that_cannot_be_used_end_the_run_with_the_last_good_state(tmp_path, capsys):
  with pytest.raises(TrainingError, match=r'round 2: no valid client update in two attempts'):
    train.train(tiny(tmp_path, client_loss_limit=0.5))  # no loss falls by half in a round
  said = capsys.readouterr().out
  assert said.count('rejected clients [0, 1, 2]') == 2 and said.count('retry with other randomness') == 1
  rows = metrics_writer.read_metrics(str(tmp_path))
  assert [(row['round'], row['accepted'], row['rejected_clients']) for row in rows] == [(0, 3, [])]
  assert lwfedssl_jax.load_encoder(str(tmp_path)).rounds_done == 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_round_and_resuming_changes_nothing(finished, tmp_path, monkeypatch, number):
  _, summary = finished
  write = metrics_writer.MetricsWriter.write

  def write_and_signal(log, row):
    write(log, row)
    if row['round'] == 1:
      signal.raise_signal(number)

  handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
  with monkeypatch.context() as patch:
    patch.setattr(metrics_writer.MetricsWriter, 'write', write_and_signal)
    stopped = train.train(tiny(tmp_path, checkpoint_every=100))
  assert (stopped['finished'], stopped['rounds_done'], stopped['stopped_by']) == (False, 2, number.name)
  assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
  assert train.train(tiny(tmp_path, resume=True))['params_sha256'] == summary['params_sha256']


def test_a_second_signal_drops_the_round(finished, tmp_path, monkeypatch):
  _, summary = finished
  monkeypatch.setattr(simulation, '_wait_for', lambda arrays: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
  with pytest.raises(signals.Interrupted, match='SIGINT'):
    train.train(tiny(tmp_path))
  monkeypatch.undo()
  assert metrics_writer.read_metrics(str(tmp_path)) == []
  assert train.train(tiny(tmp_path, resume=True))['params_sha256'] == summary['params_sha256']


def test_partial_participation_charges_only_participants(tmp_path):
  train.train(tiny(tmp_path, method='layerwise', clients_per_round=2, rounds_per_stage=1))
  for row in metrics_writer.read_metrics(str(tmp_path)):
    assert row['sampled'] == row['participants'] == 2
    assert row['total_upload_bytes'] == pytest.approx(3 * row['upload_bytes'])
  config = tiny(tmp_path, method='layerwise', clients_per_round=2, rounds_per_stage=1)
  for row, stage in zip(metrics_writer.read_metrics(str(tmp_path)), costs.method_cost(config, 16, 'actual').stages):
    assert row['total_download_bytes'] == round(3 * sum(stage.download_bytes.values()))
    assert row['total_upload_bytes'] == round(3 * sum(stage.upload_bytes.values()))


def test_workdir_of_a_run_is_not_entered_without_resume_or_with_another_config(finished):
  workdir, _ = finished
  with pytest.raises(UsageError, match='--workdir: expected a new folder'):
    train.train(tiny(workdir))
  with pytest.raises(UsageError, match=r'differs in batch_size \(run: 16, given: 32\)'):
    train.train(tiny(workdir, resume=True, batch_size=32))


def test_workdir_in_use_is_refused(tmp_path):
  config = tiny(tmp_path)
  with run_dir.claim_workdir(config), pytest.raises(UsageError, match='is in use'):
    with run_dir.claim_workdir(tiny(tmp_path, resume=True)):
      pass


def test_workdir_of_an_older_format_is_refused(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps({'format': 0, 'config': {}}))
  with pytest.raises(UsageError, match='expected a run of format 1, found format 0'):
    train.train(tiny(tmp_path, resume=True))


def test_nothing_is_written_for_a_mistake_about_the_data(tmp_path):
  with pytest.raises(UsageError, match='--batch_size'):
    train.train(tiny(tmp_path / 'run', batch_size=5000))
  assert os.listdir(tmp_path) == []


def test_a_full_disk_at_a_row_is_one_line_and_checkpoints_are_complete(finished, tmp_path, monkeypatch):
  _, summary = finished
  write = metrics_writer.MetricsWriter.write

  def fail(log, row):
    if row['round'] == 2:
      raise OSError(errno.ENOSPC, 'No space left on device')
    write(log, row)

  with monkeypatch.context() as patch:
    patch.setattr(metrics_writer.MetricsWriter, 'write', fail)
    expected = (
      f'cannot write {tmp_path}: no space left on device; the last saved round is 2, --resume continues from it'
    )
    with pytest.raises(StorageError, match=expected):
      train.train(tiny(tmp_path))
  assert train.train(tiny(tmp_path, resume=True))['params_sha256'] == summary['params_sha256']
