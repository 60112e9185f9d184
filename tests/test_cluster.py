"""Two processes on one machine: one run, a lost process, and going on with another number of them."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from lwfedssl_jax import devices
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.workdir import metrics_writer
from tests.tiny import PLAIN_VIEWS

RUN = [
  '--dataset=digits',
  '--image_size=16',
  '--patch_size=8',
  '--encoder=vit_micro',
  '--num_clients=5',
  '--max_train_images=150',
  '--batch_size=16',
  '--method=layerwise',
  '--objective=simclr',
  '--blocks_per_stage=4',
  '--rounds_per_stage=4',
  '--local_epochs=1',
  '--learning_rate=1e-3',
  '--temperature=0.5',
  *PLAIN_VIEWS,
  '--knn_bank_images=100',
  '--knn_test_images=50',
]
UNTIMED = (*metrics_writer.WALL_CLOCK, 'padding_fraction')


def start(workdir, *more):
  command = [sys.executable, '-m', 'experiments.pretrain', *RUN, f'--workdir={workdir}', '--resume', *more]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)


def start_two(workdir, *more):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'--coordinator_address=127.0.0.1:{free.getsockname()[1]}'
  return [start(workdir, address, '--num_processes=2', f'--process_id={i}', *more) for i in range(2)]


def finish(*processes):
  outputs = [process.communicate(timeout=300)[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-3000:]
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def read_rows(workdir):
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows]


def test_a_lost_process_is_named_and_the_run_goes_on_with_one_and_with_two_again(tmp_path):
  first, second = start_two(tmp_path / 'run')
  for line in first.stdout:
    if line.startswith('round 2/'):  # the first round is saved by then
      second.send_signal(signal.SIGKILL)
      break
  said, _ = first.communicate(timeout=300)
  second.communicate(timeout=60)
  assert first.returncode == 1, said[:4000]
  assert 'error: another process of the run died; --resume continues from the last checkpoint' in said
  assert 'Traceback' not in said
  assert not (tmp_path / 'run' / 'summary.json').exists()
  rows = read_rows(tmp_path / 'run')
  assert rows

  [stopped] = finish(start(tmp_path / 'run', '--stop_after_round=3'))
  assert stopped['rounds_done'] == 3
  assert read_rows(tmp_path / 'run')[:1] == rows[:1]
  summaries = finish(*start_two(tmp_path / 'run'))
  assert summaries[0]['params_sha256'] == summaries[1]['params_sha256']

  [alone] = finish(start(tmp_path / 'alone'))
  rows, expected = read_rows(tmp_path / 'run'), read_rows(tmp_path / 'alone')
  assert [row['round'] for row in rows] == [0, 1, 2, 3]
  for row, other in zip(rows, expected, strict=True):
    assert row['loss'] == pytest.approx(other['loss'], rel=1e-4)
    assert row['total_download_bytes'] == other['total_download_bytes']
  assert summaries[0]['final_loss'] == pytest.approx(alone['final_loss'], rel=1e-4)
  assert summaries[0]['effective_rank'] == pytest.approx(alone['effective_rank'], rel=0.01)


def test_a_workdir_that_is_refused_is_refused_in_every_process(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text('{"format": 0}')
  for process in start_two(tmp_path / 'run'):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert 'error: ' in said
    assert 'Traceback' not in said


@pytest.mark.parametrize(
  ('values', 'named'),
  [
    (('nowhere', 2, 0), '--coordinator_address: expected HOST:PORT or auto'),
    (('a:1', 1, 0), '--num_processes: expected at least 2'),
    (('a:1', 2, 2), '--process_id: expected 0 to 1'),
  ],
)
def test_wrong_addresses_and_numbers_are_named(values, named):
  with pytest.raises(UsageError, match=named):
    devices.connect(*values)


def test_without_an_address_there_is_one_process():
  devices.connect('', 1, 0)
  assert devices.is_first_process()
  assert devices.any_process(True)
  assert not devices.any_process(False)
  with pytest.raises(UsageError, match='--num_devices: expected at most 1'):
    devices.make_mesh(2)
