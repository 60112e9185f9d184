"""Damaged checkpoints: noticed, said, passed over; never half-believed."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lwfedssl_jax import UsageError, trees
from lwfedssl_jax.errors import StorageError
from lwfedssl_jax.workdir import checkpoint

DAMAGES = ('truncated', 'emptied', 'deleted', 'bit flipped')


def tree(step):
  generator = np.random.default_rng(step)
  return {
    'embedding': {'kernel': jnp.asarray(generator.normal(size=(40, 30)), jnp.float32)},
    'norm': {'scale': jnp.asarray(generator.normal(size=7), jnp.float32)},
  }


def save_two(folder):
  with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(tree(step), step)


def restore(folder, **options):
  with checkpoint.Checkpoints(str(folder), keep=2, **options) as checkpoints:
    return checkpoints.restore_newest(jax.eval_shape(lambda: tree(0)))


def files_of(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def damage(path, how):
  content = path.read_bytes()
  if how == 'deleted':
    path.unlink()
  elif how == 'bit flipped':
    if content:
      flipped = bytearray(content)
      flipped[len(content) // 2] ^= 4
      path.write_bytes(flipped)
  else:
    path.write_bytes(b'' if how == 'emptied' else content[: len(content) // 2])


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sound')
  save_two(folder)
  return folder


@pytest.mark.parametrize('how', DAMAGES)
def test_any_damaged_file_of_the_newest_step_is_noticed_or_harmless(sound, tmp_path, how, caplog):
  """What comes back is always exactly what was saved, of the newest step or of the one before."""
  names = [path.relative_to(sound) for path in files_of(sound / 'checkpoints' / '2')]
  assert len(names) > 5
  fell_back = set()
  for index, name in enumerate(names):
    folder = tmp_path / str(index)
    shutil.copytree(sound, folder)
    damage(folder / name, how)
    caplog.clear()
    restored = restore(folder)
    assert trees.sha256(restored.params) == trees.sha256(tree(restored.rounds_done)), (name, how)
    if restored.rounds_done == 1:
      fell_back.add(str(name))
      assert 'checkpoint 2 is damaged and skipped' in caplog.text
      assert not (folder / 'checkpoints' / '2').exists()
  assert any('/d/' in name for name in fell_back)  # the arrays themselves
  assert any('meta' in name for name in fell_back)


def test_a_wrong_array_under_a_right_looking_file_is_noticed(sound, tmp_path):
  """The parameters of step 1 in the place of step 2's: every file is whole, only our digest tells."""
  folder = tmp_path / 'swapped'
  shutil.copytree(sound, folder)
  shutil.rmtree(folder / 'checkpoints' / '2' / 'params')
  shutil.copytree(folder / 'checkpoints' / '1' / 'params', folder / 'checkpoints' / '2' / 'params')
  assert restore(folder).rounds_done == 1


def test_reading_alone_deletes_nothing_and_warns_of_nothing_but_damage(sound, tmp_path, caplog):
  folder = tmp_path / 'read'
  shutil.copytree(sound, folder)
  assert restore(folder, read_only=True).rounds_done == 2
  assert not caplog.records
  damage(folder / 'checkpoints' / '2' / 'meta' / 'metadata', 'emptied')
  before = files_of(folder)
  assert restore(folder, read_only=True).rounds_done == 1
  assert files_of(folder) == before


def fail_to_restore(monkeypatch, error):
  """Has orbax raise an error for step 2."""
  restore_step = ocp.CheckpointManager.restore

  def fail(manager, step, **options):
    if step == 2:
      raise error
    return restore_step(manager, step, **options)

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', fail)


@pytest.mark.parametrize('error', [ValueError(), Exception(), KeyError(), OSError()], ids=repr)
def test_an_error_without_words_is_passed_over_too(sound, monkeypatch, caplog, error):
  fail_to_restore(monkeypatch, error)
  assert restore(sound, read_only=True).rounds_done == 1
  assert f'checkpoint 2 is damaged and skipped: {type(error).__name__}' in caplog.text


@pytest.mark.parametrize('error', [AssertionError('ours'), RuntimeError('ours'), NotImplementedError('ours')], ids=repr)
def test_a_bug_is_not_damage(sound, monkeypatch, error):
  fail_to_restore(monkeypatch, error)
  with pytest.raises(type(error), match='ours'):
    restore(sound, read_only=True)


@pytest.mark.parametrize('content', ['[]', '{"commit_timestamp_nsecs": "soon"}', '{"commit_timestamp_nsecs": 1e99}'])
def test_metadata_that_orbax_rejects_is_deleted_or_one_line(sound, tmp_path, content, caplog):
  folder = tmp_path / 'metadata'
  shutil.copytree(sound, folder)
  metadata = folder / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  metadata.write_text(content)
  with pytest.raises(UsageError, match='_CHECKPOINT_METADATA may be missing, not invalid') as raised:
    restore(folder, read_only=True)
  assert '\n' not in str(raised.value) and str(folder) in str(raised.value)
  assert metadata.read_text() == content
  assert restore(folder).rounds_done == 2
  assert 'deleted the invalid metadata of a checkpoint' in caplog.text
  assert restore(folder, read_only=True).rounds_done == 2
  assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['1', '2']


def test_metadata_stays_where_it_is_not_to_blame(sound, tmp_path, monkeypatch):
  folder = tmp_path / 'other'
  shutil.copytree(sound, folder)
  before = {path: path.read_bytes() for path in files_of(folder)}

  def fail(*arguments, **options):
    raise ValueError('something\nelse')

  with monkeypatch.context() as patch:
    patch.setattr(ocp, 'CheckpointManager', fail)
    with pytest.raises(UsageError, match=r'readable checkpoints \(something else\)') as raised:
      restore(folder)
  assert '\n' not in str(raised.value)
  assert {path: path.read_bytes() for path in files_of(folder)} == before
  assert restore(folder).rounds_done == 2


def test_a_step_that_was_not_finished_is_not_there(sound, tmp_path):
  folder = tmp_path / 'half'
  shutil.copytree(sound, folder)
  half = folder / 'checkpoints' / '3.orbax-checkpoint-tmp-1'
  shutil.copytree(folder / 'checkpoints' / '2', half)
  with checkpoint.Checkpoints(str(folder), keep=2) as checkpoints:
    assert checkpoints.restore_newest(jax.eval_shape(lambda: tree(0))).rounds_done == 2
    checkpoints.save(tree(3), 3)  # until a save orbax may still be tidying up in the background
    assert not half.exists()
  assert restore(folder).rounds_done == 3


FULL_DISK = """
import resource, signal, sys
import jax.numpy as jnp
from lwfedssl_jax.errors import StorageError
from lwfedssl_jax.workdir import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
  with checkpoint.Checkpoints(sys.argv[1], keep=5) as checkpoints:
    checkpoints.save({'embedding': {'kernel': jnp.arange(100_000.0) ** 1.5}}, 3)
except StorageError as error:
  print('STORAGE', error)
"""


def test_a_full_disk_is_one_line_and_earlier_checkpoints_stay(sound, tmp_path):
  """A limit on file sizes stands in for the full disk."""
  folder = tmp_path / 'full'
  shutil.copytree(sound, folder)
  result = subprocess.run(
    [sys.executable, '-c', FULL_DISK, str(folder)],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  expected = (
    f'STORAGE cannot write checkpoint 3 to {folder}/checkpoints: file too large; the last saved round is 2, '
    '--resume continues from it\n'
  )
  assert expected in result.stdout, result.stderr[-2000:]
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000
  assert restore(folder).rounds_done == 2


@pytest.mark.parametrize('error', [TypeError('ours'), ValueError('ours'), FileNotFoundError('ours')], ids=repr)
def test_a_bug_in_saving_is_not_a_full_disk(tmp_path, monkeypatch, error):
  def fail(*arguments, **options):
    raise error

  with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
    monkeypatch.setattr(ocp.CheckpointManager, 'save', fail)
    with pytest.raises(type(error), match='ours'):
      checkpoints.save(tree(1), 1)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
  def fail(*arguments, **options):
    raise PermissionError(errno.EACCES, 'Permission denied')

  monkeypatch.setattr(ocp, 'CheckpointManager', fail)
  with pytest.raises(StorageError, match=f'cannot write {tmp_path}/checkpoints: permission denied'):
    checkpoint.Checkpoints(str(tmp_path))


def test_none_is_left(sound, tmp_path):
  folder = tmp_path / 'none'
  shutil.copytree(sound, folder)
  for step in ('1', '2'):
    damage(folder / 'checkpoints' / step / 'meta' / 'metadata', 'emptied')
  before = files_of(folder)
  with pytest.raises(UsageError, match='expected a valid checkpoint, all 2 are damaged'):
    restore(folder)
  assert files_of(folder) == before
