"""Decoded images on disk: a second start maps files instead of decoding again.

An entry is a folder of plain .npy files and `entry.json`, named by a digest of everything that decides its content.
It is written beside its final path and renamed, so that a reader sees all of it or nothing and two writers do not
conflict.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from lwfedssl_jax.data.images import Decoded, one_line

FORMAT_VERSION = 2  # increment it when decoding gives other pixels or arrays
MIN_BYTES = 4 << 20  # smaller data sets are decoded faster than cached
_STALE_SECONDS = 24 * 3600  # a temporary folder this old was left by a writer that died
_TEMPORARY = '.writing-'


def cache_root(cache_dir: str) -> str:
  """Returns the absolute cache folder; the user's ($XDG_CACHE_HOME or ~/.cache) when `cache_dir` is empty."""
  if cache_dir:
    return os.path.abspath(os.path.expanduser(cache_dir))
  return os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'lwfedssl_jax')


def entry_path(root: str, identity: Sequence[Any], files: Sequence[str]) -> str:
  """Returns the folder of an entry, named by its identity and its source files' names, sizes and times."""
  fingerprint = [(path, (s := os.stat(path)).st_size, s.st_mtime_ns) for path in files]
  text = json.dumps([FORMAT_VERSION, *identity, fingerprint])
  return os.path.join(root, hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32])


def _load_array(folder: str, name: str, entry: dict[str, Any]) -> np.ndarray | None:
  saved = entry['arrays'].get(name)
  if saved is None:
    return None
  path = os.path.join(folder, f'{name}.npy')
  if os.path.getsize(path) != saved['file_bytes']:
    raise ValueError(f'{path} has another size')
  array = np.load(path, mmap_mode='r' if name.endswith('images') else None, allow_pickle=False)
  # The file may have more rows than are used: unreadable images leave unused rows at its end.
  if list(array.shape[1:]) != saved['shape'][1:] or len(array) < saved['shape'][0] or array.dtype != saved['dtype']:
    raise ValueError(f'{path} has another shape')
  return array[: saved['shape'][0]]


def load(path: str) -> tuple[Decoded, tuple[str, ...]] | None:
  """Returns (decoded images mapped read-only, class names), or None where the entry is absent or damaged."""
  try:
    with open(os.path.join(path, 'entry.json'), encoding='utf-8') as f:
      entry = json.load(f)
    decoded = Decoded(*(_load_array(path, name, entry) for name in Decoded._fields))  # type: ignore[arg-type]
    if decoded.train_images is None or decoded.test_images is None:
      raise ValueError('no images')
    return decoded, tuple(entry['class_names'])
  except FileNotFoundError:
    return None
  except Exception as e:  # a damaged entry is only a copy and is ignored
    logging.warning('ignored a damaged cache entry: %s', one_line(e))
    return None


def _allocate_file(path: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Maps a new .npy file and reserves its space: a disk that fills up later would kill the process (SIGBUS)."""
  array = np.lib.format.open_memmap(path, mode='w+', dtype=dtype, shape=shape)
  if hasattr(os, 'posix_fallocate'):
    with open(path, 'r+b') as f:
      os.posix_fallocate(f.fileno(), 0, max(1, os.path.getsize(path)))
  return array


def _remove_stale(root: str) -> None:
  for entry in os.scandir(root):
    if entry.name.startswith(_TEMPORARY) and time.time() - entry.stat().st_mtime > _STALE_SECONDS:
      shutil.rmtree(entry.path, ignore_errors=True)


def _write_entry(folder: str, decoded: Decoded, class_names: Sequence[str]) -> None:
  arrays = {}
  for name, array in decoded._asdict().items():
    if array is None:
      continue
    path = os.path.join(folder, f'{name}.npy')
    if isinstance(array, np.memmap):
      array.flush()
    else:
      np.save(path, array, allow_pickle=False)
    arrays[name] = {'shape': list(array.shape), 'dtype': array.dtype.name, 'file_bytes': os.path.getsize(path)}
  with open(os.path.join(folder, 'entry.json'), 'w', encoding='utf-8') as f:
    json.dump({'arrays': arrays, 'class_names': list(class_names)}, f)


def _install(folder: str, path: str) -> None:
  """Renames a finished folder to its final path, unless a valid entry exists there; a damaged one is replaced."""
  try:
    os.rename(folder, path)
  except OSError:
    if load(path) is not None:
      return
    if os.path.lexists(path):
      os.rename(path, os.path.join(folder, 'damaged'))  # into the temporary folder, away from other readers
      shutil.rmtree(os.path.join(folder, 'damaged'), ignore_errors=True)
    os.rename(folder, path)


def decode_into(path: str, decode: Callable[[Any], Decoded], class_names: Sequence[str], num_bytes: int) -> Decoded:
  """Decodes straight into a new entry, or into memory where no entry can be written.

  Args:
    path: the entry's folder; '' for memory. Also memory when `num_bytes` is below MIN_BYTES.
    decode: takes an `images.Allocate` and returns what it filled.
    class_names: stored beside the arrays.
    num_bytes: size of all images.

  Raises:
    UsageError: from `decode`; then nothing remains on the disk.
  """

  def in_memory(name, shape, dtype):
    return np.zeros(shape, dtype)

  if not path or num_bytes < MIN_BYTES:
    return decode(in_memory)
  root, folder, full = os.path.dirname(path), '', False

  def allocate(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    nonlocal full
    if not full:
      try:
        return _allocate_file(os.path.join(folder, f'{name}.npy'), shape, dtype)
      except (OSError, ValueError) as e:
        full = True
        logging.warning('decoded images are not cached in %s: %s', root, one_line(e))
    return in_memory(name, shape, dtype)

  try:
    os.makedirs(root, exist_ok=True)
    _remove_stale(root)
    folder = os.path.join(root, f'{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}')
    os.mkdir(folder)  # not mkdtemp: other users may read a shared cache, as far as the umask allows
  except OSError as e:
    logging.warning('decoded images are not cached in %s: %s', root, one_line(e))
    return decode(in_memory)
  try:
    decoded = decode(allocate)
    if full:
      return decoded
    try:
      _write_entry(folder, decoded, class_names)
      _install(folder, path)
    except OSError as e:
      logging.warning('decoded images are not cached in %s: %s', root, one_line(e))
      return decoded
    loaded = load(path)
    return loaded[0] if loaded else decoded
  finally:
    shutil.rmtree(folder, ignore_errors=True)  # already renamed on success; mapped files remain valid
