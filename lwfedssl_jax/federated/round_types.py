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
    state: what each keeps from its last round, leaves (K, ...); None where clients keep nothing.
  """

  client_ids: Int[Array, ' K']
  image_ids: Int[Array, 'K M']
  num_images: Int[Array, ' K']
  returned: Bool[Array, ' K']
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
    server_state: of the server's optimizer; None without one.
  """

  seed_key: Key
  round_num: Integer
  images: Images
  clients: ClientSlots
  server_images: Images
  loss_limit: Number
  server_state: Any = None


class RoundMetrics(NamedTuple):
  """Losses of a round: mean over accepted clients, weighted by images; per client; of calibration.

  A client is accepted if it returned and its update is valid (`aggregation.is_valid_update`). `server_state` is for the
  next round. `client_states`, leaves (K, ...), is what each client has after its training, accepted or not.
  """

  client: Losses
  client_losses: Float[Array, ' K']
  accepted: Bool[Array, ' K']
  calibration: Losses | None
  server_state: Any = None
  client_states: ClientState | None = None
