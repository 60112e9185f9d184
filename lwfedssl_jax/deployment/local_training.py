"""A client's training between download and upload, compiled: the simulator's own operations on one client."""

import dataclasses
import functools
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng, stages
from lwfedssl_jax.base import Float, Params, PyTree, UInt8
from lwfedssl_jax.config import Config
from lwfedssl_jax.config_groups import RunConfig
from lwfedssl_jax.data import batching
from lwfedssl_jax.deployment import components
from lwfedssl_jax.federated import client_state, client_update
from lwfedssl_jax.federated.client_update import ClientData
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.resources import memory
from lwfedssl_jax.stages import StagePlan, StageShape

_make_key = jax.jit(rng.attempt_key, static_argnums=1)


class LocalTraining:
  """The training of one configuration on all images of one client."""

  def __init__(self, config: Config, images: UInt8[np.ndarray, 'N H W C']):
    self._config, self._images, self.num_images = config, jnp.asarray(images), len(images)

  def empty_params(self) -> Params:
    """Returns a parameter tree of zeros."""
    return _empty_params(self._config, self._images.shape[1])

  def peak_bytes(self, plan: StagePlan) -> int:
    """Returns the memory of a stage's program, images and parameters included."""
    return memory.read_analysis(self._program(plan)).peak_bytes

  def train(
    self, params: Params, plan: StagePlan, client_id: int, round_num: int, attempt: int, state: PyTree = None
  ) -> tuple[dict[str, np.ndarray], Float[np.ndarray, '3'], PyTree]:
    """Trains the active part.

    Args:
      params: the global parameters; of the absent blocks, any values.
      plan: of the round's stage.
      client_id: the client's number, on which its random numbers depend.
      round_num: 0-based over the run.
      attempt: 0, or 1 for other random numbers.
      state: what the client keeps, leaves (1, ...); None where it keeps nothing.

    Returns:
      The active components; the mean losses: total, objective, alignment; and what the client keeps, leaves (1, ...).
    """
    key = _make_key(self._config.run.seed, attempt)
    arguments = _arguments(self._config, params, self._images, plan.start, client_id, key, round_num)
    active, losses, kept = self._program(plan)(*arguments, _secret_key(), state)
    return components.cut(active, plan.start), np.concatenate([np.asarray(loss) for loss in losses]), kept

  def trace_state(self, plan: StagePlan) -> PyTree:
    """Returns the shapes of what the client keeps in a stage; None where it keeps nothing."""
    size = self._images.shape[1]
    return client_state.trace(self._config, make_model(self._config.model, self._config.objective, size), plan.shape)

  def _program(self, plan: StagePlan) -> Any:
    """Returns the compiled program; stages of one shape, and runs that differ only in RunConfig, share it."""
    return _compile(dataclasses.replace(self._config, run=RunConfig()), self._images.shape, plan.shape)


def _empty_params(config: Config, image_size: int) -> Params:
  shapes = jax.eval_shape(make_model(config.model, config.objective, image_size).init_params, jax.random.key(0))
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _secret_key() -> Any:
  """Returns a key for the noise of an update, from this machine's entropy: the server knows the seed, but not this."""
  return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(secrets.token_bytes(8), np.uint32)))


def _arguments(
  config: Config, params: Params, images: Any, start: int, client_id: int, seed_key: Any, round_num: int
) -> tuple[Any, ...]:
  """Returns the arguments of the compiled program, with a leading axis of one client where the simulator has K."""
  num_images, client = images.shape[0], config.client
  position = np.arange(batching.padded_capacity(num_images, client.batch_size), dtype=np.int32)
  image_ids = np.where(position < num_images, position, 0)[None]
  slots = (np.full(1, client_id, np.int32), image_ids, np.full(1, num_images, np.int32))
  steps = client.local_epochs * batching.steps_per_epoch(num_images, client.batch_size)
  return params, np.int32(start), images, slots, seed_key, np.int32(round_num), np.int32(steps)


@functools.lru_cache(maxsize=8)
def _compile(config: Config, images_shape: tuple[int, ...], shape: StageShape) -> Any:
  update = client_update.make_client_update(config, images_shape[1])

  def train(params, start, images, slots, seed_key, round_num, num_steps, noise_key, states):
    """Trains on an axis of one client, as `federated.round` does: the same operations round alike."""
    client_ids, image_ids, num_images = slots
    global_params = stages.split(params, shape, start)
    keys = jax.vmap(lambda client_id: client_update.draw_keys(seed_key, round_num, client_id))(client_ids)

    def one(image_ids, num_images, keys, state):
      if config.client.dp_noise_multiplier:
        keys = keys._replace(noise=noise_key)
      return update.apply(global_params, ClientData(images, image_ids, num_images), keys, num_steps, state)

    trained, losses, kept = jax.vmap(one)(image_ids, num_images, keys, states)
    first = jax.tree.map(lambda leaf: leaf[0], trained)
    return update.options.model.raveler.unravel(first, global_params.active), losses, kept

  images = jax.ShapeDtypeStruct(images_shape, np.uint8)
  arguments = _arguments(config, _empty_params(config, images_shape[1]), images, 0, 0, jax.random.key(0), 0)
  states = jax.eval_shape(lambda: client_state.start(config, update.options.model, shape, 1))
  return jax.jit(train, keep_unused=True).lower(*arguments, jax.random.key(0), states).compile()
