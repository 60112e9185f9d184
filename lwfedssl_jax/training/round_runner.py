"""The contract between the driver and whoever trains: simulated clients, or real ones over a network."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lwfedssl_jax.base import Bool, Float, Int, Params
from lwfedssl_jax.federated.training_step import Losses
from lwfedssl_jax.resources.accounting import RoundTraffic
from lwfedssl_jax.stages import StagePlan


class RoundResult(NamedTuple):
  """An attempt at a round. Rows follow the K sampled clients, in ascending order of their ids.

  Attributes:
    client_ids: the sampled clients.
    returned: whether each returned an update.
    accepted: whether it is valid too (`aggregation.is_valid_update`).
    client_losses: mean loss of each; any value for a client that did not return.
    losses: means over the accepted clients, weighted by images; None if no client returned.
    divergence: distance between the accepted clients' parameters (`federated/divergence.py`).
    calibration: the server's mean losses; None where it does not train.
    traffic: bytes of this attempt, per component.
    images_trained: by the sampled clients, over all local epochs.
    padding_fraction: of the computed client steps, 0 to 1.
  """

  client_ids: Int[np.ndarray, ' K']
  returned: Bool[np.ndarray, ' K']
  accepted: Bool[np.ndarray, ' K']
  client_losses: Float[np.ndarray, ' K']
  losses: Losses | None
  divergence: float
  calibration: Losses | None
  traffic: RoundTraffic
  images_trained: int
  padding_fraction: float = 0.0


@runtime_checkable
class RoundRunner(Protocol):
  """Runs rounds for the driver (`train.py`), which decides on stages, attempts, checkpoints and metrics.

  Attributes:
    server_state: of the server's optimizer after the last round; None without one. It is saved with the parameters.
  """

  server_state: Any

  def resume(self, rounds_done: int, server_state: Any) -> None:
    """Continues a run: called once, before `run`, with the rounds that parameters and state have behind them."""

  def run(
    self, params: Params, plan: StagePlan, round_num: int, attempt: int, loss_limit: float
  ) -> tuple[Params, RoundResult]:
    """Runs an attempt at a round.

    Args:
      params: the global parameters; the caller must not use their buffers again.
      plan: of the round's stage.
      round_num: 0-based over the run.
      attempt: 0, or 1 after an attempt in which no returned client was accepted: same clients, other randomness.
      loss_limit: a client whose mean loss is above it is rejected.

    Returns:
      The global parameters, unchanged if no client is accepted, and the result.
    """

  def keep_since(self, rounds_done: int) -> None:
    """Called after every save: no checkpoint of fewer rounds will be restored."""

  def close(self) -> None:
    """Releases what the runner holds."""
