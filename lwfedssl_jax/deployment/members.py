"""Which clients are there: each has said who it is, how many images it has, and what it holds."""

import time
from collections.abc import Callable
from typing import NamedTuple

from lwfedssl_jax.deployment import messages
from lwfedssl_jax.deployment.messages import Envelope, Member, MessageError, Refused
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.deployment.transport import Transport
from lwfedssl_jax.errors import TrainingError
from lwfedssl_jax.resources.communication import Payload

POLL_SECONDS = 0.5
ASK_AGAIN_SECONDS = 30.0  # a node that did not answer, or whose client's number another node has


class Connected(NamedTuple):
  """A client that is there: its node, its number of images, and {component: digest} of what it holds."""

  node_id: int
  num_images: int
  held: dict[str, str]


class Members:
  """The clients that are there, by their numbers. The first node that claims a number keeps it while it is there."""

  def __init__(
    self,
    transport: Transport,
    options: ServerOptions,
    hello: Envelope,
    payload: Payload,
    num_clients: int,
    log: Callable[[str], None],
  ):
    self._transport, self._options, self._hello, self._log = transport, options, hello, log
    self._names, self._num_clients = set(payload.sizes_bytes), num_clients
    self._asked: dict[int, float] = {}
    self._refused: set[int] = set()
    self.connected: dict[int, Connected] = {}

  def gather(self, at_least: int) -> None:
    """Waits until enough clients are there.

    Raises:
      TrainingError: they are not after --join_timeout_seconds.
    """
    begin, said = time.monotonic(), False
    while True:
      self._refresh()
      if len(self.connected) >= at_least:
        return
      limit = self._options.join_timeout_seconds
      if limit and time.monotonic() - begin > limit:
        raise TrainingError(
          f'{len(self.connected)} of {at_least} clients after {limit:g} s (--join_timeout_seconds); --resume continues'
        )
      if not said:
        self._log(f'waiting for clients: {len(self.connected)} of {at_least} are there')
        said = True
      time.sleep(POLL_SECONDS)

  def forget(self, client_id: int) -> None:
    """Takes a client for gone until it answers again."""
    self.connected.pop(client_id, None)

  def _refresh(self) -> None:
    there, now = self._transport.node_ids(), time.monotonic()
    self.connected = {number: each for number, each in self.connected.items() if each.node_id in there}
    self._refused &= there
    known = {each.node_id for each in self.connected.values()} | self._refused
    due = {node for node in there - known if now - self._asked.get(node, -ASK_AGAIN_SECONDS) >= ASK_AGAIN_SECONDS}
    if not due:
      return
    replies = self._transport.exchange(dict.fromkeys(sorted(due), self._hello), self._options.hello_timeout_seconds)
    self._asked = {node: when for node, when in self._asked.items() if node in there} | dict.fromkeys(due, now)
    for node in sorted(due & set(replies)):
      try:
        self._admit(node, replies[node])
      except MessageError as error:
        self._refused.add(node)
        self._log(f'node {node}: {error}')

  def _admit(self, node: int, reply: Envelope) -> None:
    messages.check_vectors(reply.vectors, {})
    member = messages.unpack(reply)
    if isinstance(member, Refused):
      raise MessageError(f'refused: {member.reason}')
    if not isinstance(member, Member):
      raise MessageError(f'expected a member, got {type(member).__name__.lower()}')
    if member.client_id >= self._num_clients:
      raise MessageError(f'client_id: expected 0 to {self._num_clients - 1}, got {member.client_id}')
    if member.num_images > self._options.most_client_images:
      raise MessageError(
        f'num_images: expected at most {self._options.most_client_images} (--most_client_images), '
        f'got {member.num_images}'
      )
    if not set(member.held) <= self._names:
      raise MessageError('held: expected components of the run')
    if member.client_id in self.connected:
      self._log(f'node {node}: client {member.client_id} is there already, asked again later')
      return
    self.connected[member.client_id] = Connected(node, member.num_images, member.held)
    self._log(f'client {member.client_id}: there, {member.num_images} images')
