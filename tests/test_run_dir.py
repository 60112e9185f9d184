"""A run's folder: which revision it records, and who may use it."""

import shutil
import subprocess
import sys

import pytest

from lwfedssl_jax import UsageError, run_evaluation
from lwfedssl_jax import config as configs
from lwfedssl_jax.workdir import run_dir

NONE = {'git_revision': None, 'git_dirty': None}


def git(folder, *arguments):
  return subprocess.run(
      ['git', '-C', folder, '-c', 'user.name=test', '-c', 'user.email=test@localhost', *arguments],
      check=True, capture_output=True, text=True).stdout.strip()


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
  code = f'''
import time
from lwfedssl_jax import configure
from lwfedssl_jax.workdir import run_dir
with run_dir.claim_workdir(configure(workdir={config.run.workdir!r}, resume=True)):
  print('claimed', flush=True)
  time.sleep(300)
'''
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
  with pytest.raises(UsageError, match=r'^--seeds: expected at least one whole number$'):
    run_evaluation.evaluate_run('nowhere', 'knn', None, seeds=())


def test_check_writes_nothing(tmp_path):
  run_dir.check_workdir(configs.configure(workdir=str(tmp_path / 'run')))
  assert not any(tmp_path.iterdir())
