"""What a client keeps between the rounds of a stage, and what it does with it: FedU, FedEMA, MOON's previous model.

FedU (arXiv 2108.06492 v1) and FedEMA (arXiv 2204.04385 v1) keep the target branch and mix the client's own parameters
into those that it received. MOON (arXiv 2103.16257 v1) aligns with the client's own parameters, see
objectives/alignment.py. The state covers the active part, so every client starts a stage without one. It is never sent.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import block_trees, trees
from lwfedssl_jax.base import Params, Raveled, Scalar
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated import model as models
from lwfedssl_jax.federated.model import Model
from lwfedssl_jax.stages import StageShape

ENCODER_PARTS = ('embedding', 'blocks')  # those with matrices
LEAST_DIVERGENCE = 1e-12


class ClientState(NamedTuple):
  """What a client keeps; float32, all zero before its first accepted update of the stage.

  Attributes:
    exists: 1 after that update.
    params: groups of its raveled active parameters, as its last training left them (`kept_groups`).
    target: its target branch then; {} where every round starts with a copy of the online branch.
    divergence: how far that training moved the encoder (`measure_divergence`).
    scale: FedEMA's lambda.
  """

  exists: Scalar
  params: Raveled
  target: Raveled
  divergence: Scalar
  scale: Scalar


def check(config: Config) -> None:
  """Raises UsageError where clients cannot keep what the configuration asks them to."""
  if config.uses_client_state and jax.process_count() > 1:
    raise UsageError(f'--{config.client_state_flag}: expected one process, clients keep a state on its disk')


def kept_groups(config: Config, params: Raveled) -> Raveled:
  """Returns what a client keeps of its parameters: FedEMA all, FedU the predictor, MOON what the target branch has."""
  rules = {'fedema': lambda name: True, 'fedu': lambda name: name.startswith(trees.ONLINE_ONLY)}
  keeps = rules.get(config.client.client_update, lambda name: False)
  moon = config.uses_previous_model
  return {
    name: leaf for name, leaf in params.items() if keeps(name) or (moon and not name.startswith(trees.ONLINE_ONLY))
  }


def init(config: Config, params: Mapping[str, Any]) -> ClientState:
  """Returns the state of a client without one; raveled parameters (or jax.ShapeDtypeStructs) give the shapes."""
  zero, zeros = jnp.float32(0), {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in params.items()}
  target = {} if config.client.client_update == 'global' else trees.without_online_only(zeros)
  return ClientState(zero, kept_groups(config, zeros), target, zero, zero)


def trace(config: Config, model: Model, shape: StageShape) -> Any:
  """Returns the shapes of a client's state in a stage; None where clients keep nothing."""
  if not config.uses_client_state:
    return None
  return jax.eval_shape(lambda: init(config, models.trace_active(model, shape)))


def start(config: Config, model: Model, shape: StageShape, num_clients: int) -> ClientState | None:
  """Returns the state of clients at the start of a stage, leaves (K, ...); None where clients keep nothing."""
  return jax.tree.map(lambda leaf: jnp.zeros((num_clients, *leaf.shape), leaf.dtype), trace(config, model, shape))


def begin(config: Config, state: ClientState, received: Raveled) -> tuple[Raveled, Raveled]:
  """Returns the online and the target branch with which a client's training starts.

  - Without a state: the received parameters, and a copy of them.
  - FedU: the received parameters; those of the predictor only if the last divergence is below `fedu_threshold`.
  - FedEMA: mu * local + (1 - mu) * received, of all parameters, mu = min(1, scale * divergence).

  Args:
    config: with `client_update` fedu or fedema.
    state: of the client.
    received: the global active parameters, raveled.
  """
  if config.client.client_update == 'fedema':
    weight = jnp.minimum(1, state.scale * state.divergence)
    params = trees.interpolate(weight, state.params, received)
  else:
    weight = jnp.where(state.divergence < config.client.fedu_threshold, 0, 1)
    params = {
      name: jnp.where(weight > 0, state.params[name], leaf) if name.startswith(trees.ONLINE_ONLY) else leaf
      for name, leaf in received.items()
    }
  return optax.tree.where(state.exists > 0, (params, state.target), (received, trees.without_online_only(received)))


def measure_divergence(before: Params, after: Params) -> Scalar:
  """Returns the mean over the encoder's matrices of the l2 norm of what training changed.

  The official code of FedU and FedEMA takes the weights that are named `conv`; a vision transformer has none.

  Args:
    before: active parameters at the start of a client's training, stacked blocks (n, ...) are a matrix each.
    after: the same at its end.
  """
  norms, is_stacked = [], block_trees.is_stacked(before['blocks'])
  parts = [{name: tree[name] for name in ENCODER_PARTS if name in tree} for tree in (before, after)]
  for path, delta in jax.tree_util.tree_leaves_with_path(jax.tree.map(jnp.subtract, *reversed(parts))):
    name = trees.path_name(path)
    if name.endswith('kernel'):
      rows = delta.reshape(delta.shape[0] if is_stacked and name.startswith('blocks') else 1, -1)
      norms.append(jnp.sqrt(jnp.square(rows).sum(axis=1)))
  return jnp.concatenate(norms).mean()


def finish(
  config: Config, state: ClientState, params: Raveled, target: Raveled | None, divergence: Scalar
) -> ClientState:
  """Returns what a client keeps after its training.

  Args:
    config: the run.
    state: what it kept before.
    params: its active parameters after training, raveled.
    target: its target branch after training.
    divergence: of this training.
  """
  scale = jnp.where(
    state.scale > 0, state.scale, config.client.fedema_share / jnp.maximum(divergence, LEAST_DIVERGENCE)
  )
  return ClientState(
    exists=jnp.ones_like(state.exists),
    params=kept_groups(config, params),
    target={name: (target or {})[name] for name in state.target},
    divergence=divergence,
    scale=scale,
  )
