"""Errors of full, failing or read-only disks: one line instead of a traceback."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Set

from lwfedssl_jax.errors import StorageError

CHECKPOINTS = 'checkpoints'  # folder of a run; a saved round is a folder in it, named by its number
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # of writing only
REFUSALS = NO_ROOM | {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}  # of reading too
_TENSORSTORE_CODE = re.compile(r"os_error_code='(\d+)'")  # tensorstore has no exception of its own


def error_number(error: Exception) -> int | None:
  """Returns the system's error number, `errno`, of an error of Python or tensorstore; None for any other error."""
  if isinstance(error, OSError):
    return error.errno
  code = _TENSORSTORE_CODE.search(str(error))
  return int(code[1]) if code else None


@contextlib.contextmanager
def writing(path: str, workdir: str = '', kinds: Set[int] = REFUSALS) -> Iterator[None]:
  """Names what cannot be written, and the last saved round of the run in `workdir`, if there is one.

  Args:
    path: the file or folder, as in the message.
    workdir: of the run; empty: the message names no round.
    kinds: error numbers; NO_ROOM if other files are read in the block.

  Raises:
    StorageError: the system refused to write. Other errors are not changed.
  """
  try:
    yield
  except Exception as error:
    number = error_number(error)
    if number is None or number not in kinds:
      raise
    reason = os.strerror(number)
    raise StorageError(f'cannot write {path}: {reason[0].lower()}{reason[1:]}{_last_saved(workdir)}') from error


def _last_saved(workdir: str) -> str:
  folder = os.path.join(workdir, CHECKPOINTS)
  names = os.listdir(folder) if workdir and os.path.isdir(folder) else []
  rounds = [int(name) for name in names if name.isdecimal()]
  return f'; the last saved round is {max(rounds)}, --resume continues from it' if rounds else ''
