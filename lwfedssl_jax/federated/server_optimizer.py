"""Server optimizers: what the clients' aggregation changed is taken as a gradient.

FedAvgM (arXiv 1909.06335 v1), FedAdam and FedYogi (arXiv 2003.00295 v5, Algorithm 2), by optax. They follow any rule of
aggregation. Their state covers the active part, so it starts afresh with each stage.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import trees
from lwfedssl_jax.base import PyTree, Raveled, Scalar
from lwfedssl_jax.config_groups import MethodConfig
from lwfedssl_jax.federated import model as models
from lwfedssl_jax.federated.model import Model
from lwfedssl_jax.stages import StageShape

SECOND_MOMENT_DECAY = 0.99  # beta_2 of arXiv 2003.00295


def start_as_published(scale: optax.GradientTransformation, epsilon: float) -> optax.GradientTransformation:
  """Gives optax's Adam or Yogi the start of arXiv 2003.00295, Algorithm 2: m = 0, v = tau^2, no bias correction.

  optax starts Adam from v = 0 and Yogi from m = v = 1e-6, and divides both moments by 1 - decay^count. At the largest
  count, which optax does not exceed, that is a division by 1.
  """

  def init(params: Any) -> Any:
    count = jnp.full((), jnp.iinfo(jnp.int32).max, jnp.int32)
    second = jax.tree.map(lambda leaf: jnp.full_like(leaf, epsilon**2), params)
    return optax.ScaleByAdamState(count=count, mu=jax.tree.map(jnp.zeros_like, params), nu=second)

  return optax.GradientTransformation(init, scale.update)


def make_server_optimizer(config: MethodConfig) -> optax.GradientTransformation | None:
  """Builds the configured optimizer of the global active parameters, raveled; None: the aggregation is the result."""
  momentum, epsilon = config.server_momentum, config.server_epsilon
  builders = {
    'none': lambda: None,
    'fedavgm': lambda: optax.trace(momentum),
    'fedadam': lambda: start_as_published(optax.scale_by_adam(momentum, SECOND_MOMENT_DECAY, epsilon), epsilon),
    'fedyogi': lambda: start_as_published(optax.scale_by_yogi(momentum, SECOND_MOMENT_DECAY, epsilon), epsilon),
  }
  scale = builders[config.server_optimizer]()
  return scale and optax.chain(scale, optax.scale(-config.effective_server_learning_rate))


def init_state(config: MethodConfig, model: Model, shape: StageShape) -> Any:
  """Returns the optimizer's state at the start of a stage; None without an optimizer."""
  optimizer = make_server_optimizer(config)
  if optimizer is None:
    return None
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), models.trace_active(model, shape))
  return optimizer.init(trees.split_statistics(zeros)[0])


def take_step(
  optimizer: optax.GradientTransformation | None,
  state: PyTree,
  aggregated: Raveled,
  global_params: Raveled,
  num_accepted: Scalar,
) -> tuple[Raveled, PyTree]:
  """Takes a step along global - aggregated parameters; running statistics are aggregated alone.

  Args:
    optimizer: from `make_server_optimizer`; with None, the aggregated parameters and the state are returned.
    state: of the optimizer.
    aggregated: the clients' active parameters, aggregated and raveled.
    global_params: the same before the round.
    num_accepted: clients of the round; with 0, parameters and state are unchanged.

  Returns:
    The new global active parameters, raveled, and the new state.
  """
  if optimizer is None:
    return aggregated, state
  before, (mean, statistics) = trees.split_statistics(global_params)[0], trees.split_statistics(aggregated)
  gradient = jax.tree.map(jnp.subtract, before, mean)
  updates, new_state = optimizer.update(gradient, state, before)
  stepped = optax.apply_updates(before, updates) | statistics
  return optax.tree.where(num_accepted > 0, (stepped, new_state), (global_params, state))
