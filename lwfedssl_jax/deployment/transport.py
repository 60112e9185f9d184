"""What the server needs of a transport; Flower's is in flower_server.py, the tests' is a function call."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from lwfedssl_jax.deployment.messages import Envelope


@runtime_checkable
class Transport(Protocol):
  """Nodes that can be reached, each known by a number."""

  def node_ids(self) -> set[int]:
    """Returns the nodes that are there now."""

  def exchange(self, requests: Mapping[int, Envelope], timeout_seconds: float) -> dict[int, Envelope]:
    """Sends each node its message and returns the answers that came in time: at most one a node, to this message."""
