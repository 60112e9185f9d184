"""The folder of a run: lock, config.json, atomic writes."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

import filelock
import jax
import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.version import __version__
from lwfedssl_jax.workdir import storage

FORMAT = 1
CONFIG, SUMMARY, LOCK = 'config.json', 'summary.json', '.lock'
EMBEDDINGS = 'embeddings.npz'
# Fields that do not affect a run's result; a resumed run may change them.
FREE_FIELDS = frozenset(
  {
    'workdir',
    'resume',
    'stop_after_round',
    'checkpoint_every',
    'keep_checkpoints',
    'tracker',
    'data_dir',
    'cache_dir',
    'num_devices',
    'attention',
    'device_data_budget_mb',
  }
)
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write_json(path: str, value: Any) -> None:
  """Writes a JSON file atomically. Raises StorageError."""
  with _whole_file(path, 'w', encoding='utf-8') as file:
    json.dump(value, file, indent=2)
    file.write('\n')


def write_arrays(path: str, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz file atomically. Raises StorageError."""
  with _whole_file(path, 'wb') as file:
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


@contextlib.contextmanager
def _whole_file(path: str, mode: str, **options: Any) -> Iterator[IO[Any]]:
  temporary = f'{path}.tmp'
  with storage.writing(path, os.path.dirname(path)):
    with open(temporary, mode, **options) as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: str) -> Any:
  """Reads a JSON file. Raises UsageError if it is missing or invalid."""
  try:
    with open(path, encoding='utf-8') as file:
      return json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(f'{path}: expected a JSON file of a run ({error})') from error


def describe_revision(package: str) -> dict[str, Any]:
  """Returns `git_revision` and `git_dirty` of the checkout whose top folder holds a package's folder.

  Args:
    package: path of the package's folder.

  Returns:
    The commit and whether tracked files differ from it; both None if the package is not in a checkout of its own, such
    as in a virtual environment inside another project's repository.
  """
  environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}

  def git(*arguments: str) -> str:
    return subprocess.run(
      ['git', '-C', package, *arguments], capture_output=True, text=True, timeout=10, check=True, env=environment
    ).stdout.strip()

  try:
    if os.path.samefile(git('rev-parse', '--show-toplevel'), os.path.dirname(package)):
      return {
        'git_revision': git('rev-parse', 'HEAD'),
        'git_dirty': bool(git('status', '--porcelain', '--untracked-files=no')),
      }
  except (OSError, subprocess.SubprocessError):
    pass
  return {'git_revision': None, 'git_dirty': None}


def _host_kind() -> str:
  model = platform.processor() or platform.machine()
  with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
    model = next((line.partition(':')[2].strip() for line in file if line.startswith('model name')), model)
  return f'{model}, {os.cpu_count()} CPUs'


def describe_environment() -> dict[str, Any]:
  """Returns start (UTC), command, host, devices, versions and git revision, as config.json keeps them."""
  versions = {'lwfedssl_jax': __version__, 'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {
    'started': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(['python', *sys.orig_argv[1:]]),
    'host_kind': _host_kind(),
    'versions': versions,
    'device_kind': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    **describe_revision(os.path.dirname(os.path.abspath(__file__))),
  }


def read_config(workdir: str) -> Config:
  """Returns the configuration of the run in a workdir. Raises UsageError."""
  path = os.path.join(workdir, CONFIG)
  if not os.path.isdir(workdir):
    raise UsageError(f'--workdir: expected the folder of a run, there is no {workdir}')
  if not os.path.exists(path):
    raise UsageError(f'--workdir: expected the folder of a run, {workdir} has no {CONFIG}')
  saved = read_json(path)
  if not isinstance(saved, dict) or saved.get('format') != FORMAT:
    found = saved.get('format') if isinstance(saved, dict) else None
    raise UsageError(f'{workdir}: expected a run of format {FORMAT}, found format {found!r}')
  if not isinstance(saved.get('config'), dict):
    raise UsageError(f'{path}: expected the fields of a configuration')
  try:
    return configs.from_flat(saved['config'])
  except UsageError as error:
    raise UsageError(f'{path}: {error}') from error


def saved_value(workdir: str, field: str) -> Any:
  """Returns a field of the configuration in a workdir; None if the folder holds no run. Raises UsageError."""
  exists = bool(workdir) and os.path.exists(os.path.join(workdir, CONFIG))
  return configs.flatten(read_config(workdir))[field] if exists else None


def check_workdir(config: Config) -> None:
  """Raises those errors of `claim_workdir` that need no resolved configuration, without writing.

  Raises:
    UsageError: --workdir is missing or not a folder; another process uses it; or it holds a run and --resume is not
      set.
  """
  workdir = config.run.workdir
  if not workdir:
    raise UsageError('--workdir: expected a folder to write the run to')
  if os.path.exists(workdir) and not os.path.isdir(workdir):
    raise UsageError(f'--workdir: expected a folder, {workdir} is a file')
  if os.path.exists(os.path.join(workdir, CONFIG)) and not config.run.resume:
    raise UsageError(f'--workdir: expected a new folder, {workdir} holds a run (--resume continues it)')
  if os.path.exists(os.path.join(workdir, LOCK)):
    with _locked(workdir):
      pass


@contextlib.contextmanager
def claim_workdir(config: Config) -> Iterator[str]:
  """Creates or reopens the folder of a run and holds its lock.

  Yields:
    The workdir, with config.json in it.

  Raises:
    UsageError: as `check_workdir`; the folder holds a run of another configuration, whose differing fields the message
      names; or it cannot be written.
    StorageError: no room, now or while the folder is held.
  """
  check_workdir(config)
  workdir = config.run.workdir
  path = os.path.join(workdir, CONFIG)
  if os.path.exists(path):
    _check_same(config, workdir)
  with _locked(workdir), storage.writing(workdir, workdir, storage.NO_ROOM):
    if not os.path.exists(path):
      write_json(path, {'format': FORMAT, 'config': configs.flatten(config), **describe_environment()})
    yield workdir


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
  """Holds a folder's lock, which the system takes back from a process that dies. Raises UsageError, StorageError."""
  lock = filelock.FileLock(os.path.join(workdir, LOCK))
  try:
    with storage.writing(workdir, kinds=storage.NO_ROOM):
      os.makedirs(workdir, exist_ok=True)
      lock.acquire(blocking=False)
  except filelock.Timeout as error:
    raise UsageError(f'--workdir: expected a folder that no other process uses, {workdir} is in use') from error
  except OSError as error:
    raise UsageError(f'--workdir: expected a folder that can be written, {workdir}: {error.strerror}') from error
  try:
    yield
  finally:
    lock.release()


def _check_same(config: Config, workdir: str) -> None:
  saved, given = configs.flatten(read_config(workdir)), configs.flatten(config)
  differing = [
    f'{name} (run: {saved[name]}, given: {given[name]})'
    for name in given
    if name not in FREE_FIELDS and saved[name] != given[name]
  ]
  if differing:
    raise UsageError(
      f'--workdir: expected the configuration of the run in {workdir}; it differs in ' + ', '.join(differing)
    )
