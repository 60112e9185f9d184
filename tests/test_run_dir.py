"""A run's folder: which revision it records, who may use it, and disks that refuse to write."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from experiments import command
from lwfedssl_jax import UsageError, run_evaluation
from lwfedssl_jax import config as configs
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import StorageError
from lwfedssl_jax.workdir import metrics_writer, run_dir

NONE = {'git_revision': None, 'git_dirty': None}


def git(folder, *arguments):
  return subprocess.run(
    ['git', '-C', folder, '-c', 'user.name=test', '-c', 'user.email=test@localhost', *arguments],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
  """A repository whose top folder holds the package."""
  if shutil.which('git') is None:
    pytest.skip('git is not installed')
  package = tmp_path / 'project' / 'lwfedssl_jax'
  package.mkdir(parents=True)
  (package / '__init__.py').write_text('')
  git(package.parent, 'init', '--quiet')
  assert run_dir.describe_revision(str(package)) == NONE  # no commit yet
  git(package.parent, 'add', '.')
  git(package.parent, 'commit', '--quiet', '--message=first')
  return package


def test_revision_of_a_checkout_and_whether_it_was_changed(checkout):
  revision = git(checkout, 'rev-parse', 'HEAD')
  assert run_dir.describe_revision(str(checkout)) == {'git_revision': revision, 'git_dirty': False}
  (checkout.parent / 'notes.txt').write_text('not tracked')
  assert not run_dir.describe_revision(str(checkout))['git_dirty']
  (checkout / '__init__.py').write_text('changed = True\n')
  assert run_dir.describe_revision(str(checkout)) == {'git_revision': revision, 'git_dirty': True}


def test_no_revision_of_a_repository_that_only_surrounds_the_package(checkout, tmp_path):
  installed = checkout.parent / '.venv' / 'site-packages' / 'lwfedssl_jax'
  shutil.copytree(checkout, installed)
  assert run_dir.describe_revision(str(installed)) == NONE
  alone = tmp_path / 'elsewhere' / 'lwfedssl_jax'
  shutil.copytree(checkout, alone)
  assert run_dir.describe_revision(str(alone)) == NONE


def test_variables_of_a_git_hook_do_not_name_another_repository(checkout, tmp_path, monkeypatch):
  monkeypatch.setenv('GIT_DIR', str(tmp_path / 'other'))
  assert run_dir.describe_revision(str(checkout))['git_revision']


def test_folder_is_free_again_after_its_process_was_killed(tmp_path):
  config = configs.configure(workdir=str(tmp_path / 'run'), resume=True)
  code = f"""
import time
from lwfedssl_jax import configure
from lwfedssl_jax.errors import StorageError
from lwfedssl_jax.workdir import metrics_writer, run_dir
with run_dir.claim_workdir(configure(workdir={config.run.workdir!r}, resume=True)):
  print('claimed', flush=True)
  time.sleep(300)
"""
  with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True) as process:
    try:
      assert process.stdout.readline() == 'claimed\n'
      for enter in (run_dir.check_workdir, lambda config: run_dir.claim_workdir(config).__enter__()):
        with pytest.raises(UsageError, match=r'^--workdir: expected a folder that no other process uses, .* in use$'):
          enter(config)
    finally:
      process.kill()
  with run_dir.claim_workdir(config) as workdir:
    assert workdir == config.run.workdir


def test_evaluation_asks_for_a_seed_before_it_reads_the_run():
  pixels = np.zeros((1, 2, 2, 3), np.uint8)
  with pytest.raises(UsageError, match=r'^--seeds: expected at least one whole number$'):
    run_evaluation.evaluate_run('nowhere', 'knn', ImageDataset('', pixels, None, pixels, None, ()), seeds=())


def test_check_writes_nothing(tmp_path):
  run_dir.check_workdir(configs.configure(workdir=str(tmp_path / 'run')))
  assert not any(tmp_path.iterdir())


def test_check_takes_a_run_whose_settings_were_resolved_since(tmp_path):
  """`lwfedssl-server --resume` checks before the data and the device resolve what the run in the folder has."""
  given = configs.configure(workdir=str(tmp_path / 'run'), resume=True)
  with run_dir.claim_workdir(configs.with_values(given, {'rematerialize': 'all', 'client_chunk': 3})):
    pass
  run_dir.check_workdir(given)
  with pytest.raises(UsageError, match=r'differs in client_chunk .run: 3, given: 0., rematerialize'):
    run_dir.claim_workdir(given).__enter__()


def refuse(number):
  """A function of any arguments with which the system refuses to write."""

  def fail(*arguments, **options):
    raise OSError(number, os.strerror(number))

  return fail


@pytest.mark.parametrize(
  ('number', 'reason'),
  [(errno.ENOSPC, 'no space left on device'), (errno.EACCES, 'permission denied'), (errno.EIO, 'input/output error')],
)
@pytest.mark.parametrize('rounds', [(), (3, 12)])
def test_a_file_that_cannot_be_written_is_one_line_and_the_old_one_stays(tmp_path, monkeypatch, number, reason, rounds):
  path = tmp_path / run_dir.SUMMARY
  run_dir.write_json(str(path), {'old': 1})
  for name in (*rounds, '13.orbax-checkpoint-tmp'):
    (tmp_path / 'checkpoints' / str(name)).mkdir(parents=True)
  saved = '; the last saved round is 12, --resume continues from it' if rounds else ''
  log = metrics_writer.MetricsWriter(str(tmp_path), 0, 1)
  monkeypatch.setattr(os, 'fsync', refuse(number))
  for write in (lambda: run_dir.write_json(str(path), {}), lambda: run_dir.write_arrays(str(path), {})):
    with pytest.raises(StorageError, match=f'^cannot write {path}: {reason}{saved}$'):
      write()
  with pytest.raises(StorageError, match=f'^cannot write {tmp_path}/metrics.jsonl: {reason}{saved}$'):
    log.write({'round': 0, 'stage': 0, 'loss': None, 'participants': 0})
  log.close()
  assert run_dir.read_json(str(path)) == {'old': 1}


@pytest.mark.parametrize(
  'error',
  [FileNotFoundError(errno.ENOENT, 'gone'), PermissionError(errno.EACCES, 'of an image'), ValueError('a bug')],
  ids=repr,
)
def test_other_errors_of_a_run_stay_what_they_are(tmp_path, error):
  config = configs.configure(workdir=str(tmp_path / 'run'))
  with pytest.raises(type(error)) as raised, run_dir.claim_workdir(config):
    raise error
  assert raised.value is error


def test_no_room_for_the_configuration_is_not_the_user_s_mistake(tmp_path, monkeypatch):
  monkeypatch.setattr(os, 'makedirs', refuse(errno.ENOSPC))
  with (
    pytest.raises(StorageError, match=f'^cannot write {tmp_path}/run: no space left on device$'),
    run_dir.claim_workdir(configs.configure(workdir=str(tmp_path / 'run'))),
  ):
    pass
  monkeypatch.setattr(os, 'makedirs', refuse(errno.EACCES))
  with (
    pytest.raises(UsageError, match='--workdir: expected a folder that can be written'),
    run_dir.claim_workdir(configs.configure(workdir=str(tmp_path / 'run'))),
  ):
    pass


def test_a_full_disk_has_an_exit_code_of_its_own(monkeypatch, capsys):
  def main():
    raise StorageError('cannot write runs/a: no space left on device')

  full = command.Command('', flags.FlagValues(), main)
  assert command.execute(full, ['program']) == command.STORAGE_EXIT_CODE == 3
  assert capsys.readouterr().err == 'error: cannot write runs/a: no space left on device\n'
