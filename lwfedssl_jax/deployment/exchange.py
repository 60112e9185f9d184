"""The messages of one attempt at a round: tasks go out, updates come in, and every byte of a component is counted."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from lwfedssl_jax import stages
from lwfedssl_jax.deployment import components, messages
from lwfedssl_jax.deployment.members import Members
from lwfedssl_jax.deployment.messages import Envelope, Lacking, MessageError, Refused, Task, Update
from lwfedssl_jax.deployment.transport import Transport
from lwfedssl_jax.resources.accounting import RoundTraffic
from lwfedssl_jax.resources.communication import Payload
from lwfedssl_jax.stages import StagePlan

LEAST_SECONDS = 1.0  # of the time for a second message, to a client that lacks something
Trained = tuple[dict[str, np.ndarray], np.ndarray]  # a client's active components, and its three losses


class Exchange:
  """Sends clients what they lack and collects their updates.

  A client whose answer is late or not valid is lost for this attempt: it has paid its download. It is greeted again
  before it takes part again.
  """

  def __init__(self, transport: Transport, members: Members, payload: Payload, log: Callable[[str], None]):
    self._transport, self._members, self._payload, self._log = transport, members, payload, log
    self.state_rounds = dict[int, int]()  # rounds done after each client's last accepted update of the stage
    self._column = {name: column for column, name in enumerate(payload.sizes_bytes)}

  def run(
    self, task: Task, plan: StagePlan, global_vectors: Mapping[str, np.ndarray], clients: Sequence[int], seconds: float
  ) -> tuple[dict[int, Trained], RoundTraffic]:
    """Runs an attempt.

    Args:
      task: what every client is to do; its id, digests and state_round are filled in here.
      plan: of the round's stage.
      global_vectors: the global model's components.
      clients: the K sampled ones; those that are not there any more are lost.
      seconds: time for all of it.

    Returns:
      The updates of the clients that returned one, and the traffic, rows as `clients`.
    """
    required = stages.required_components(plan, self._payload.head_names)
    data = {name: components.to_bytes(global_vectors[name]) for name in required}
    task = task._replace(digests={name: components.digest(data[name]) for name in required})
    there = {client: self._members.connected[client] for client in clients if client in self._members.connected}
    missing = {
      client: [name for name in required if each.held.get(name) != task.digests[name]] for client, each in there.items()
    }
    down, up = (np.zeros((len(clients), len(self._column)), np.int64) for _ in range(2))
    end, trained = time.monotonic() + seconds, dict[int, Trained]()
    for _ in range(2):  # a client that lacks what it is taken to hold is sent it
      requests = {}
      for client, names in missing.items():
        self._charge(down[clients.index(client)], names)
        own = task._replace(client_id=client, state_round=self.state_rounds.get(client, 0))
        requests[there[client].node_id] = messages.pack(own, {name: data[name] for name in names})
        there[client].held.update(task.digests)
      replies = self._transport.exchange(requests, max(end - time.monotonic(), LEAST_SECONDS)) if requests else {}
      answered = {client: replies[there[client].node_id] for client in missing if there[client].node_id in replies}
      missing = {}
      for client, outcome in self._read_all(answered, task, plan).items():
        if isinstance(outcome, list):
          missing[client] = outcome
        else:
          trained[client] = outcome
          self._charge(up[clients.index(client)], outcome[0])
    self._forget([client for client in clients if client not in trained], task.round_num)
    return trained, RoundTraffic(down, up)

  def _charge(self, row: np.ndarray, names: Iterable[str]) -> None:
    for name in names:
      row[self._column[name]] += self._payload.sizes_bytes[name]

  def _forget(self, lost: list[int], round_num: int) -> None:
    if lost:
      self._log(f'round {round_num + 1}: no update of clients {lost}')
    for client in lost:
      self._members.forget(client)

  def _read_all(self, answered: Mapping[int, Envelope], task: Task, plan: StagePlan) -> dict[int, Trained | list[str]]:
    """Returns what the valid answers hold; the others are reported, one line each."""
    outcomes: dict[int, Trained | list[str]] = {}
    for client, reply in answered.items():
      try:
        outcomes[client] = self._read(reply, task._replace(client_id=client), plan)
      except MessageError as error:
        self._log(f'round {task.round_num + 1}: client {client}: {error}')
    return outcomes

  def _read(self, reply: Envelope, task: Task, plan: StagePlan) -> Trained | list[str]:
    """Returns a client's update, or the components that it lacks. Raises MessageError."""
    record = messages.unpack(reply)
    if isinstance(record, Refused):
      raise MessageError(f'refused: {record.reason}')
    if isinstance(record, Lacking):
      messages.check_vectors(reply.vectors, {})
      if not record.names or not set(record.names) <= set(task.digests):
        raise MessageError('names: expected components of the task')
      return list(dict.fromkeys(record.names))
    if not isinstance(record, Update):
      raise MessageError(f'expected an update, got {type(record).__name__.lower()}')
    if (record.client_id, record.round_num, record.attempt) != (task.client_id, task.round_num, task.attempt):
      raise MessageError('expected the update of this attempt, got another one')
    uploaded = stages.uploaded_components(plan, self._payload.head_names)
    messages.check_vectors(reply.vectors, {name: self._payload.sizes_bytes[name] for name in uploaded})
    vectors = {name: components.from_bytes(reply.vectors[name]) for name in uploaded}
    return vectors, np.array(record.losses, np.float32)
