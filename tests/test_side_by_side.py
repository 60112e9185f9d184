"""Seeds in one program are the seeds' own runs."""

import json
import threading

import numpy as np
import pytest

from lwfedssl_jax import UsageError, interrupts, run_log, side_by_side, training
from lwfedssl_jax import config as configs
from lwfedssl_jax.base import FederatedRound

RUN = {
    'dataset': 'digits', 'image_size': 16, 'patch_size': 8, 'encoder': 'vit_micro', 'num_clients': 4, 'batch_size': 16,
    'max_train_images': 150, 'clients_per_round': 3, 'method': 'layerwise', 'objective': 'simclr',
    'blocks_per_stage': 4, 'rounds_per_stage': 2, 'local_epochs': 1, 'learning_rate': 1e-3, 'temperature': 0.5,
    'blur_probability': (0.0, 0.0), 'client_size_sigma': 0.3, 'knn_bank_images': 100, 'knn_test_images': 50}


def config_of(workdir, **values):
  return configs.configure(**RUN, workdir=str(workdir), **values)


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('together')
  return workdir, side_by_side.train(config_of(workdir, seed=3), 2)


def test_each_seed_is_its_own_run_to_rounding(together, tmp_path):
  workdir, found = together
  assert list(found['seeds']) == ['3', '4']
  for seed in (3, 4):
    alone = training.train(config_of(tmp_path / str(seed), seed=seed))
    summary = found['seeds'][str(seed)]
    assert json.loads((workdir / f'seed{seed}' / 'summary.json').read_text()) == summary
    assert summary['seed'] == seed
    own, other = (run_log.read_metrics(str(folder)) for folder in (workdir / f'seed{seed}', tmp_path / str(seed)))
    assert [row['round'] for row in own] == [0, 1]
    for row, expected in zip(own, other, strict=True):
      assert row['loss'] == pytest.approx(expected['loss'], rel=1e-4)
      assert row['padded_share'] == expected['padded_share']
      assert row['total_upload_bytes'] == expected['total_upload_bytes']
    assert summary['effective_rank'] == pytest.approx(alone['effective_rank'], rel=0.01)
  assert found['seeds']['3']['params_sha256'] != found['seeds']['4']['params_sha256']


def test_finished_seeds_are_a_no_op(together):
  workdir, found = together
  again = side_by_side.train(config_of(workdir, seed=3, resume=True), 2)
  assert again['seeds'] == found['seeds']


class Recorder:
  """Stands in for a round: counts, and computes something that tells members apart."""

  def __init__(self):
    self.alone = []
    self.built = FederatedRound(None, self.apply)

  def apply(self, params, plan, inputs):
    self.alone.append((params, plan))
    return params + 1


class Inputs:
  """What a gang looks at."""

  def __init__(self, round_num, room=8):
    self.round_num, self.images = np.int32(round_num), None
    self.clients = type('Clients', (), {'image_ids': np.zeros((2, room))})


def test_a_run_that_is_alone_in_its_round_gets_the_ordinary_one_and_nobody_waits_for_those_who_left():
  gang, recorder, results = side_by_side.Gang(3), Recorder(), {}

  def member(name, rounds):
    for round_num in rounds:
      results[name] = gang.apply(recorder.built, 10 * round_num, 'plan', Inputs(round_num))
    gang.leave()

  threads = [threading.Thread(target=member, args=args) for args in (('a', [1, 2]), ('b', [5]), ('c', []))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
    assert not thread.is_alive()
  assert results == {'a': 21, 'b': 51}
  assert sorted(recorder.alone) == [(10, 'plan'), (20, 'plan'), (50, 'plan')]


def test_an_error_reaches_the_run_it_belongs_to():
  gang = side_by_side.Gang(1)

  def fail(params, plan, inputs):
    raise ArithmeticError('broken')

  with pytest.raises(ArithmeticError, match='broken'):
    gang.apply(FederatedRound(None, fail), 0, 'plan', Inputs(0))


def test_threads_share_the_main_thread_s_request_to_stop():
  seen = []

  def other():
    with interrupts.catch() as request:
      seen.append(request)

  with interrupts.catch() as stop:
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
  assert seen == [stop]
  thread = threading.Thread(target=other)
  thread.start()
  thread.join()
  assert seen[1] is not stop


def test_a_missing_workdir_is_named():
  with pytest.raises(UsageError, match='--workdir'):
    side_by_side.train(config_of(''), 2)
