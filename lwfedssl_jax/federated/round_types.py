"""What a round receives and returns besides the parameters."""

from typing import Any, NamedTuple

from lwfedssl_jax.base import Array, Bool, Float, Images, Int, Integer, Key, Number
from lwfedssl_jax.federated.client_state import ClientState
from lwfedssl_jax.federated.training_step import Losses


class ClientSlots(NamedTuple):
  """The sampled clients of a round in K client slots (see scheduling.py), at most M images each.

  Attributes:
    client_ids: any id in an empty slot.
    image_ids: into the images; a client's own first, padding after.
    num_images: 0 in an empty slot.
    returned: False for a client that dropped out; it is not aggregated.
    kept: with depth dropout, the numbers of the blocks that each keeps (`depth_dropout.select_inputs`).
    state: what each keeps from its last round, leaves (K, ...); None where clients keep nothing.
  """

  client_ids: Int[Array, ' K']
  image_ids: Int[Array, 'K M']
  num_images: Int[Array, ' K']
  returned: Bool[Array, ' K']
  kept: Int[Array, 'K n'] | None = None
  state: ClientState | None = None


class RoundInputs(NamedTuple):
  """All inputs of a round besides the parameters.

  Attributes:
    seed_key: typed key of the run's seed.
    round_num: int32, 0-based over the whole run.
    images: the training images; with a placement that streams, those of this round's clients, sharded.
    clients: who trains.
    server_images: the server's images; (0, ...) without calibration.
    loss_limit: float32; a client whose mean loss is above it is rejected.
    stage_round: int32, 0-based over the stage; only some aggregators need it.
    server_state: of the server's optimizer; None without one.
  """

  seed_key: Key
  round_num: Integer
  images: Images
  clients: ClientSlots
  server_images: Images
  loss_limit: Number
  stage_round: Integer = 0
  server_state: Any = None


class RoundMetrics(NamedTuple):
  """What a round reports of its clients and of its calibration.

  Attributes:
    client: mean losses over accepted clients, weighted by images.
    client_losses: of each client.
    accepted: clients that returned with a valid update (`aggregation.is_valid_update`).
    divergence: distance between the accepted clients' parameters (`divergence.py`), at least 0.
    calibration: mean losses of the server; None where it does not train.
    server_state: of the server's optimizer, for the next round.
    client_states: leaves (K, ...), what each client has after its training, accepted or not.
  """

  client: Losses
  client_losses: Float[Array, ' K']
  accepted: Bool[Array, ' K']
  divergence: Float[Array, '']
  calibration: Losses | None
  server_state: Any = None
  client_states: ClientState | None = None
