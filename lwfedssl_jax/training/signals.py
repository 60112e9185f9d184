"""SIGTERM and Ctrl-C: the first signal stops a run after the current round, the second drops that round."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
  """The second signal: the current round is dropped; saved checkpoints are complete."""


class StopRequest:
  """Whether a signal has requested a stop, and which."""

  def __init__(self) -> None:
    self.name: str | None = None

  def receive(self, number: int, frame: Any) -> None:
    """Handles a signal."""
    del frame
    if self.name is not None:
      raise Interrupted(signal.Signals(number).name)
    self.name = signal.Signals(number).name
    print(f'{self.name}: stopping after this round; a second signal drops it', file=sys.stderr, flush=True)


@contextlib.contextmanager
def handle() -> Iterator[StopRequest]:
  """Handles the two signals while the block runs; only the main thread receives signals."""
  if threading.current_thread() is not threading.main_thread():
    yield StopRequest()
    return
  request = StopRequest()
  before = {number: signal.signal(number, request.receive) for number in SIGNALS}
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
