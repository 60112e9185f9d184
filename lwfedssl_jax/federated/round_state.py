"""The state before a stage's first round, for programs that run or compile a round by itself."""

from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import server_optimizer
from lwfedssl_jax.federated.model import Model
from lwfedssl_jax.federated.round_types import RoundState
from lwfedssl_jax.stages import StageShape


def start(config: Config, model: Model, shape: StageShape) -> RoundState:
  """Returns what the first round of a stage receives besides the parameters."""
  return RoundState(server=server_optimizer.init_state(config.method, model, shape))
