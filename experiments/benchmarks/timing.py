"""Interleaved timing: a drift of the machine's speed affects all cases equally."""

import time
from collections.abc import Sequence
from typing import Any


def time_once(cases: Sequence[Any]) -> list[float]:
  """Calls `run` of every case once and returns the seconds of each."""
  seconds = []
  for case in cases:
    start = time.perf_counter()
    case.run()
    seconds.append(time.perf_counter() - start)
  return seconds


def time_interleaved(cases: Sequence[Any], repeats: int) -> list[list[float]]:
  """Returns the seconds of every case in each of `repeats`; call `time_once` before, as a warm-up."""
  return [list(measured) for measured in zip(*(time_once(cases) for _ in range(repeats)))]
