"""The Flower ServerApp: the driver over Flower's grid."""

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from lwfedssl_jax import config as configs
from lwfedssl_jax.deployment import server
from lwfedssl_jax.deployment.flower_messages import from_records, to_records
from lwfedssl_jax.deployment.messages import Envelope, MessageError, one_line
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.errors import StorageError, TrainingError, UsageError

CONFIG_KEY, OPTIONS_KEY = 'config', 'options'  # of the run's configuration: JSON
POLL_SECONDS = 0.2

app = ServerApp()


class FlowerTransport:
  """Flower's grid as a Transport."""

  def __init__(self, grid: Grid):
    self._grid = grid

  def node_ids(self) -> set[int]:
    """Returns the SuperNodes that are online."""
    return set(self._grid.get_node_ids())

  def exchange(self, requests: Mapping[int, Envelope], timeout_seconds: float) -> dict[int, Envelope]:
    """Sends each node its message and returns the answers that came in time."""
    end, replies = time.monotonic() + timeout_seconds, dict[int, Envelope]()
    waiting = {}
    for node, request in requests.items():
      message = Message(to_records(request), node, MessageType.TRAIN, ttl=timeout_seconds + 60)
      waiting.update(dict.fromkeys(self._grid.push_messages([message]), node))
    waiting.pop('', 0)  # of a message that was not taken: its node has gone
    while waiting and time.monotonic() < end:
      for reply in self._grid.pull_messages(list(waiting)):
        number = reply.metadata.reply_to_message_id
        if number in waiting:
          self._take(replies, waiting.pop(number), reply)
      time.sleep(POLL_SECONDS)
    return replies

  def _take(self, replies: dict[int, Envelope], node: int, reply: Message) -> None:
    if reply.has_error():
      print(f'node {node}: {one_line(reply.error.reason)}', flush=True)
      return
    try:
      replies[node] = from_records(reply.content)
    except MessageError as error:
      print(f'node {node}: {one_line(error)}', flush=True)


def _end_with_parent() -> None:
  """Ends this process when the one that started it is gone: it would hold the workdir, and no client answers it."""
  parent = os.getppid()

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # checkpoints are whole or absent

  threading.Thread(target=watch, daemon=True).start()


def main(grid: Grid, context: Context) -> None:
  """Runs the configured pretraining; its summary is in the workdir."""
  _end_with_parent()
  values: Mapping[str, Any] = context.run_config
  try:
    config = configs.from_flat(json.loads(str(values[CONFIG_KEY])))
    options = ServerOptions(**json.loads(str(values[OPTIONS_KEY])))
    server.serve(config, FlowerTransport(grid), options)
  except (StorageError, TrainingError, UsageError) as error:
    print(f'error: {error}', file=sys.stderr, flush=True)
    raise SystemExit(1) from error


app.main()(main)
