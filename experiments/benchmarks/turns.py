"""Cases take turns, so that a machine whose speed drifts treats them alike."""

import time
from collections.abc import Sequence
from typing import Any


def take_turn(cases: Sequence[Any]) -> list[float]:
  """Calls `run` of every case and returns the seconds each took."""
  seconds = []
  for case in cases:
    begin = time.perf_counter()
    case.run()
    seconds.append(time.perf_counter() - begin)
  return seconds


def time_in_turns(cases: Sequence[Any], repeats: int) -> list[list[float]]:
  """Returns every case's seconds in so many turns; let them take one before, for what happens only once."""
  return [list(measured) for measured in zip(*(take_turn(cases) for _ in range(repeats)))]
