"""Metrics of a run: one JSON line per round in metrics.jsonl, listeners, and progress for the user."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.workdir import storage

METRICS = 'metrics.jsonl'
WALL_CLOCK = ('seconds', 'between_seconds', 'images_per_second')  # all else in a row follows from the seed
OnRow = Callable[[dict[str, Any]], None]


def read_metrics(workdir: str) -> list[dict[str, Any]]:
  """Returns the rows of metrics.jsonl, oldest first, without a last line that a crash truncated.

  Raises:
    UsageError: a complete line is not the row of a round, or the file cannot be read. It may be missing.
  """
  path, rows = os.path.join(workdir, METRICS), []
  try:
    with open(path, 'rb') as file:
      for line in file:
        if line.endswith(b'\n'):
          rows.append(_parse_row(line))
  except (FileNotFoundError, NotADirectoryError):
    return []
  except (OSError, ValueError, RecursionError) as error:
    raise UsageError(
      f'{path}: expected a line of JSON for each round, line {len(rows) + 1} is invalid ({error})'
    ) from error
  return rows


def _parse_row(line: bytes) -> dict[str, Any]:
  row = json.loads(line.decode())
  if not isinstance(row, dict) or not isinstance(row.get('round'), int):
    raise ValueError('not the row of a round')
  return row


class MetricsReader:
  """The rows of a run in memory, for a process that writes nothing."""

  def __init__(self, workdir: str, rounds_done: int, num_rounds: int):
    del num_rounds
    self.rows = [row for row in read_metrics(workdir) if row['round'] < rounds_done]

  def write(self, row: dict[str, Any]) -> None:
    """Adds the row of a round."""
    self.rows.append(row)

  def log(self, text: str) -> None:
    """Does nothing: the first process prints."""

  def close(self) -> None:
    """Does nothing."""

  def __enter__(self) -> 'MetricsReader':
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


class MetricsWriter(MetricsReader):
  """Writes one row per round to metrics.jsonl, passes it to listeners, and prints the progress of the run."""

  def __init__(self, workdir: str, rounds_done: int, num_rounds: int, listeners: Sequence[OnRow] = ()):
    super().__init__(workdir, rounds_done, num_rounds)
    self._listeners = listeners
    self._workdir, self._path = workdir, os.path.join(workdir, METRICS)
    temporary = f'{self._path}.tmp'
    with storage.writing(self._path, workdir):
      with open(temporary, 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(row) + '\n' for row in self.rows)
      os.replace(temporary, self._path)
      self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115 (closed in close)
    self._num_rounds = num_rounds
    self._bar = _progress_bar(rounds_done, num_rounds)

  def write(self, row: dict[str, Any]) -> None:
    """Appends a round's row; it is on disk before listeners see a copy of it. Raises StorageError."""
    super().write(row)
    with storage.writing(self._path, self._workdir):
      self._file.write(json.dumps(row) + '\n')
      self._file.flush()
      os.fsync(self._file.fileno())
    for listener in self._listeners:
      listener(dict(row))
    if self._bar is not None:
      self._bar.update(1)
      self._bar.set_postfix_str(_progress_text(row))
    else:
      print(f'round {row["round"] + 1}/{self._num_rounds} {_progress_text(row)}', flush=True)

  def log(self, text: str) -> None:
    """Prints a message without disturbing the progress bar."""
    (self._bar.write if self._bar is not None else print)(text)

  def close(self) -> None:
    """Closes the files and the bar. Raises StorageError."""
    with storage.writing(self._workdir, self._workdir), contextlib.ExitStack() as stack:
      for opened in filter(None, (self._bar, self._file)):
        stack.callback(opened.close)


def _progress_text(row: dict[str, Any]) -> str:
  text = f'stage {row["stage"] + 1}, {row["participants"]} clients'
  if row['loss'] is not None:
    text += f', loss {row["loss"]:.3f}, {row["images_per_second"]:.0f} images/s'
  if row.get('knn_accuracy') is not None:
    text += f', kNN {row["knn_accuracy"]:.3f} (random weights {row["random_knn_accuracy"]:.3f})'
  return text


def _progress_bar(rounds_done: int, num_rounds: int) -> Any:
  if not sys.stderr.isatty():
    return None
  try:
    from tqdm import tqdm
  except ImportError:
    return None
  return tqdm(total=num_rounds, initial=rounds_done, unit='round')
