"""Checkpoints: orbax writes them, a digest of our own says whether what comes back is what was saved.

Of several processes each has to ask for every save; one writes, at once, so that a lost process leaves nothing pending.
Threads other than the main one save at once too.
"""

import contextlib
import glob
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from lwfedssl_jax import devices, trees
from lwfedssl_jax.base import AbstractParams, Params
from lwfedssl_jax.errors import UsageError

FOLDER = 'checkpoints'
_ONE_AT_A_TIME = threading.Lock()  # what several threads save or restore meets in orbax's global state


class Restored(NamedTuple):
  """A sound checkpoint: parameters after `rounds_done` rounds."""

  params: Params
  rounds_done: int


class Checkpoints:
  """The newest checkpoints of a run, one per saved round, written in the background."""

  def __init__(self, workdir: str, keep: int | None = None, *, read_only: bool = False,
               sharding: jax.sharding.Sharding | None = None):
    """Opens a run's folder of checkpoints.

    Args:
      workdir: the run's folder.
      keep: newest checkpoints kept; None: all.
      read_only: nothing in the folder is touched.
      sharding: of the parameters that are restored, whatever they were saved from; None: the first device.

    Raises:
      UsageError: with `read_only`, there are none.
    """
    import orbax.checkpoint as ocp  # half a second to import; only runs that save need it

    self._ocp, self._sharding = ocp, sharding or devices.sharding(None)
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    path = os.path.abspath(os.path.join(workdir, FOLDER))
    if read_only and not os.path.isdir(path):
      raise UsageError(f'--workdir: expected a run with checkpoints, {workdir} has none')
    self._read_only = read_only
    with _saying_only_errors() if read_only else contextlib.nullcontext():  # it warns that it is what it was told to be
      self._manager = self._open(path, max_to_keep=keep, enable_async_checkpointing=alone, read_only=read_only,
                                 cleanup_tmp_directories=not read_only, create=not read_only)
    self._last = 0  # the newest save that was started

  def _open(self, path: str, **options: Any) -> Any:
    """Opens orbax's manager, without the checkpoints' metadata if these are what it cannot bear."""
    manager = lambda: self._ocp.CheckpointManager(path, options=self._ocp.CheckpointManagerOptions(**options))
    try:
      return manager()
    except Exception as error:  # orbax raises many types for one damaged file
      refused = UsageError(
          f'{path}: expected a folder of checkpoints that can be read ({_one_line(error)}); a checkpoint may lack '
          f'its _CHECKPOINT_METADATA, but not have a wrong one')
      metadata = [] if self._read_only else glob.glob(os.path.join(glob.escape(path), '*', '_CHECKPOINT_METADATA'))
      aside = [(name, os.path.join(path, f'.{index}_metadata')) for index, name in enumerate(metadata)]
      if not aside:
        raise refused from error
      try:
        for name, kept in aside:  # times and versions, for people; what is restored is checked by our own digest
          os.replace(name, kept)
        opened = manager()
      except Exception as again:  # they are not to blame
        for name, kept in aside:
          if os.path.exists(kept):
            os.replace(kept, name)
        raise refused from again
      for _, kept in aside:
        with contextlib.suppress(FileNotFoundError):  # opening may have tidied up
          os.unlink(kept)
      logging.warning('%s: metadata of a checkpoint is damaged and done without: %s', path, _one_line(error)[:200])
      return opened

  def save(self, params: Params, rounds_done: int) -> None:
    """Starts saving; returns once the parameters may change."""
    args, self._last = self._ocp.args, rounds_done
    meta = {'rounds_done': rounds_done, 'params_sha256': trees.sha256(params)}
    with self._room_for(rounds_done), _ONE_AT_A_TIME:
      saved = self._manager.save(
          rounds_done, args=args.Composite(params=args.StandardSave(params), meta=args.JsonSave(meta)))
    if not saved:
      raise RuntimeError(f'checkpoint {rounds_done} was not written: one of that number or later exists')

  def restore_newest(self, like: AbstractParams) -> Restored | None:
    """Returns the newest checkpoint whose digest is right, or None if none was ever saved.

    Args:
      like: a parameter tree of the same structure, shapes and dtypes (arrays or ShapeDtypeStructs).

    Raises:
      UsageError: there are checkpoints, but none is sound.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      try:
        restored = self._restore(step, like)
      except Exception as error:  # orbax raises many types for damaged files, bare Exception among them
        restored, reason = None, _one_line(error)[:200]
      else:
        reason = 'its digest does not match'
      if restored is not None:
        for damaged in (s for s in steps if s > step and not self._read_only):
          self._manager.delete(damaged)
        return restored
      logging.warning('checkpoint %d is damaged and passed over: %s', step, reason)
    if steps:
      raise UsageError(f'{self._manager.directory}: expected a sound checkpoint, all {len(steps)} are damaged')
    return None

  def _restore(self, step: int, like: AbstractParams) -> Restored | None:
    args = self._ocp.args
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), like)
    with _ONE_AT_A_TIME:
      out = self._manager.restore(
          step, args=args.Composite(params=args.StandardRestore(abstract), meta=args.JsonRestore()))
    sound = trees.sha256(out['params']) == out['meta']['params_sha256'] and out['meta']['rounds_done'] == step
    return Restored(out['params'], step) if sound else None

  @contextlib.contextmanager
  def _room_for(self, rounds_done: int | str) -> Iterator[None]:
    """Says in one line that a save failed, this one or the one before it in the background."""
    try:
      yield
    except Exception as error:  # orbax passes on what its threads and tensorstore raise, of many types
      if devices.is_lost_peer(error):
        raise
      raise UsageError(
          f'{self._manager.directory}: expected room for checkpoint {rounds_done} in a folder that can be written; '
          f'earlier ones are whole ({_one_line(error)[:300]})') from error

  def close(self) -> None:
    """Waits for saves under way and stops the background threads."""
    try:
      with self._room_for(self._last):
        self._manager.wait_until_finished()
    finally:
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


@contextlib.contextmanager
def _saying_only_errors() -> Iterator[None]:
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__
