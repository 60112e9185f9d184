"""Checkpoints: written by Orbax, verified by a SHA-256 digest of our own.

With several processes, each must call every save; one writes, synchronously, so that a lost process leaves nothing
pending. Threads other than the main one save synchronously too.
"""

import contextlib
import functools
import glob
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging

from lwfedssl_jax import devices, trees
from lwfedssl_jax.base import Params, PyTree
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.workdir import storage

FOLDER = storage.CHECKPOINTS
# What orbax, its JSON and tensorstore raise for damaged files: missing, cut, and well-formed JSON of a wrong kind.
_DAMAGE = (OSError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)
_ONE_AT_A_TIME = threading.Lock()  # Orbax's global state is not thread-safe


class Restored(NamedTuple):
  """A valid checkpoint: the state after `rounds_done` rounds.

  Attributes:
    params: of the global model.
    rounds_done: 1 or more.
    server: state of the server's optimizer; None without one.
  """

  params: Params
  rounds_done: int
  server: PyTree = None


class Checkpoints:
  """The newest checkpoints of a run, one per saved round, written in the background."""

  def __init__(
    self,
    workdir: str,
    keep: int | None = None,
    *,
    read_only: bool = False,
    sharding: jax.sharding.Sharding | None = None,
  ):
    """Opens a run's folder of checkpoints.

    Args:
      workdir: the run's folder.
      keep: number of newest checkpoints to keep; None: all.
      read_only: the folder is not changed.
      sharding: of restored parameters, independent of that at saving; None: the first device.

    Raises:
      UsageError: with `read_only`, there are none; or orbax cannot read the folder.
      StorageError: the folder cannot be written.
    """
    import orbax.checkpoint as ocp  # takes half a second to import

    self._ocp, self._sharding = ocp, sharding or devices.sharding(None)
    alone = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
    path = os.path.abspath(os.path.join(workdir, FOLDER))
    if read_only and not os.path.isdir(path):
      raise UsageError(f'--workdir: expected a run with checkpoints, {workdir} has none')
    self._read_only = read_only
    with _saying_only_errors() if read_only else contextlib.nullcontext():  # suppresses Orbax's read-only warning
      self._manager = self._open(
        path,
        max_to_keep=keep,
        enable_async_checkpointing=alone,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        create=not read_only,
      )
    self._last = 0  # the newest save that was started

  def _open(self, path: str, **options: Any) -> Any:
    """Opens orbax's manager, without the checkpoints' metadata if these are what it cannot read."""

    def manager() -> Any:
      with contextlib.nullcontext() if self._read_only else storage.writing(path):
        return self._ocp.CheckpointManager(path, options=self._ocp.CheckpointManagerOptions(**options))

    try:
      return manager()
    except _DAMAGE as error:
      refused = UsageError(
        f'{path}: expected a folder of readable checkpoints ({_one_line(error)}); _CHECKPOINT_METADATA may be '
        f'missing, not invalid'
      )
      metadata = [] if self._read_only else glob.glob(os.path.join(glob.escape(path), '*', '_CHECKPOINT_METADATA'))
      aside = [(name, os.path.join(path, f'.{index}_metadata')) for index, name in enumerate(metadata)]
      if not aside:
        raise refused from error
      try:
        for name, kept in aside:  # times and versions only; our digest verifies the parameters
          os.replace(name, kept)
        opened = manager()
      except _DAMAGE as again:  # the metadata are valid
        for name, kept in aside:
          if os.path.exists(kept):
            os.replace(kept, name)
        raise refused from again
      for _, kept in aside:
        with contextlib.suppress(FileNotFoundError):  # opening may have deleted it
          os.unlink(kept)
      logging.warning('%s: deleted the invalid metadata of a checkpoint: %s', path, _one_line(error)[:200])
      return opened

  def save(self, params: Params, rounds_done: int, server: PyTree = None) -> int:
    """Starts saving; returns once the parameters and the server's state may change.

    Returns:
      The rounds done of the oldest checkpoint that may be restored from now on, even if this save is interrupted; 0
      before the second save.

    Raises:
      StorageError: this save, or the one before it in the background, found no room or no permission.
    """
    args, self._last = self._ocp.args, rounds_done
    oldest = min(self._manager.all_steps(), default=0)  # this save ends before the next one deletes it
    items = {'params': args.StandardSave(params), 'meta': args.JsonSave(_describe(params, rounds_done, server))}
    if server is not None:
      items['server'] = args.StandardSave(_number_leaves(server))
    with self._writing(rounds_done), _ONE_AT_A_TIME:
      saved = self._manager.save(rounds_done, args=args.Composite(**items))
    if not saved:
      raise RuntimeError(f'checkpoint {rounds_done} was not written: one of that number or later exists')
    return oldest

  def restore_newest(
    self, like: PyTree, server_like: Callable[[int], PyTree] = lambda rounds_done: None
  ) -> Restored | None:
    """Returns the newest checkpoint whose digests are right, or None if none was ever saved.

    Args:
      like: a parameter tree of the same structure, shapes and dtypes (arrays or ShapeDtypeStructs).
      server_like: rounds done -> such a tree of the server's state; None: it is not read.

    Raises:
      UsageError: there are checkpoints, and none is valid.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    for step in steps:
      restored, reason = self._restore(step, like, server_like(step))
      if restored is not None:
        for damaged in (s for s in steps if s > step and not self._read_only):
          self._manager.delete(damaged)
        return restored
      logging.warning('checkpoint %d is damaged and skipped: %s', step, reason)
    if steps:
      raise UsageError(f'{self._manager.directory}: expected a valid checkpoint, all {len(steps)} are damaged')
    return None

  def _restore(self, step: int, like: PyTree, server_like: PyTree) -> tuple[Restored | None, str]:
    """Returns a checkpoint if it is valid, else None and the reason."""
    args, struct = self._ocp.args, jax.ShapeDtypeStruct
    place = functools.partial(jax.tree.map, lambda x: struct(x.shape, x.dtype, sharding=self._sharding))
    request = {'params': args.StandardRestore(place(like)), 'meta': args.JsonRestore()}
    if server_like is not None:
      request['server'] = args.StandardRestore(place(_number_leaves(server_like)))
    try:
      with _ONE_AT_A_TIME:
        saved = self._manager.restore(step, args=args.Composite(**request))
    except Exception as error:
      # Orbax has no exception type for unreadable arrays. Every other error is a bug, not damage.
      if not isinstance(error, _DAMAGE) and type(error) is not Exception:
        raise
      return None, _one_line(error)[:200]
    server = None
    if server_like is not None:
      leaves = [saved['server'][name] for name in sorted(saved['server'])]
      server = jax.tree.unflatten(jax.tree.structure(server_like), leaves)
    expected = _describe(saved['params'], step, server)
    if not isinstance(saved['meta'], dict) or {name: saved['meta'].get(name) for name in expected} != expected:
      return None, 'its digest does not match'
    return Restored(saved['params'], step, server), ''

  def _writing(self, rounds_done: int) -> contextlib.AbstractContextManager[None]:
    """Names a save that finds no room, this one or the one before it in the background."""
    folder = str(self._manager.directory)
    return storage.writing(f'checkpoint {rounds_done} to {folder}', os.path.dirname(folder))

  def close(self) -> None:
    """Waits for pending saves and stops the background threads."""
    try:
      with self._writing(self._last):
        self._manager.wait_until_finished()
    finally:
      with self._writing(self._last):
        self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


def _describe(params: Params, rounds_done: int, server: PyTree) -> dict[str, Any]:
  """Returns what the checkpoint's JSON says of its arrays."""
  described = {'rounds_done': rounds_done, 'params_sha256': trees.sha256(params)}
  return described if server is None else described | {'server_sha256': trees.sha256(_number_leaves(server))}


def _number_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves by number: orbax has no names for the fields of an optimizer's state."""
  return {f'{index:04d}': leaf for index, leaf in enumerate(jax.tree.leaves(tree))}


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
