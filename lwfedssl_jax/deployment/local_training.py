"""A client's training between download and upload, compiled: the simulator's own operations on one client."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng, stages
from lwfedssl_jax.base import Float, Params, UInt8
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import batching
from lwfedssl_jax.deployment import components
from lwfedssl_jax.federated import client_update
from lwfedssl_jax.federated.client_update import ClientData
from lwfedssl_jax.resources import memory
from lwfedssl_jax.stages import StagePlan, StageShape


class LocalTraining:
  """The training of one configuration on one client's images; a program is compiled once for each stage shape."""

  def __init__(self, config: Config, images: UInt8[np.ndarray, 'N H W C']):
    """Prepares the training on all images of the client."""
    self._update, client = client_update.make_client_update(config, images.shape[1]), config.client
    self.num_images = num_images = len(images)
    position = np.arange(batching.padded_capacity(num_images, client.batch_size), dtype=np.int32)
    self._images = jnp.asarray(images)
    self._image_ids = jnp.asarray(np.where(position < num_images, position, 0)[None])
    self._num_steps = np.int32(client.local_epochs * batching.steps_per_epoch(num_images, client.batch_size))
    self._seed = config.run.seed
    self._make_key = jax.jit(rng.attempt_key, static_argnums=1)
    self._jitted = jax.jit(self._train, static_argnums=0)
    self._programs: dict[StageShape, Any] = {}

  def empty_params(self) -> Params:
    """Returns a parameter tree of zeros."""
    shapes = jax.eval_shape(self._update.options.model.init_params, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

  def peak_bytes(self, plan: StagePlan) -> int:
    """Returns the memory of a stage's program, images and parameters included."""
    return memory.read_analysis(self._program(plan)).peak_bytes

  def train(
    self, params: Params, plan: StagePlan, client_id: int, round_num: int, attempt: int
  ) -> tuple[dict[str, np.ndarray], Float[np.ndarray, '3']]:
    """Trains the active part.

    Args:
      params: the global parameters; of the absent blocks, any values.
      plan: of the round's stage.
      client_id: the client's number, on which its random numbers depend.
      round_num: 0-based over the run.
      attempt: 0, or 1 for other random numbers.

    Returns:
      The active components, and the mean losses: total, objective, alignment.
    """
    program = self._program(plan)
    active, losses = program(*self._arguments(params, plan, client_id, round_num, attempt))
    return components.cut(active, plan.start), np.concatenate([np.asarray(loss) for loss in losses])

  def _program(self, plan: StagePlan) -> Any:
    if plan.shape not in self._programs:
      arguments = self._arguments(self.empty_params(), plan, 0, 0, 0)
      self._programs[plan.shape] = self._jitted.lower(plan.shape, *arguments).compile()
    return self._programs[plan.shape]

  def _arguments(
    self, params: Params, plan: StagePlan, client_id: int, round_num: int, attempt: int
  ) -> tuple[Any, ...]:
    slots = (np.full(1, client_id, np.int32), self._image_ids, np.full(1, self.num_images, np.int32))
    draw = (self._make_key(self._seed, attempt), np.int32(round_num))
    return params, np.int32(plan.start), self._images, slots, draw, self._num_steps

  def _train(
    self, shape: StageShape, params: Params, start: Any, images: Any, slots: Any, draw: Any, num_steps: Any
  ) -> Any:
    """Trains on an axis of one client, as `federated.round` does: the same operations round alike."""
    client_ids, image_ids, num_images = slots
    global_params = stages.split(params, shape, start)
    seed_key, round_num = draw
    keys = jax.vmap(lambda client_id: client_update.draw_keys(seed_key, round_num, client_id))(client_ids)

    def one(image_ids: Any, num_images: Any, keys: Any) -> Any:
      return self._update.apply(global_params, ClientData(images, image_ids, num_images), keys, num_steps)

    trained, losses = jax.vmap(one)(image_ids, num_images, keys)
    first = jax.tree.map(lambda leaf: leaf[0], trained)
    return self._update.options.model.raveler.unravel(first, global_params.active), losses
