"""The batches of a client: a pure function of a key, on the device.

The last incomplete batch of an epoch is dropped; a client with fewer images than a batch trains on one masked
batch per epoch. All clients of a round have arrays for the same number of steps. A client's own steps come first,
without gaps; the others are masked, so that a loop may stop after the last step of any client of its chunk.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Array, Bool, Int, Key
from lwfedssl_jax.config_groups import ClientConfig


def steps_per_epoch(num_images: int, batch_size: int) -> int:
  """Steps that a client with `num_images` (>= 1) takes per epoch."""
  return max(1, num_images // batch_size)


def client_steps(num_images: Int[Array, '...'], epochs: int, batch_size: int) -> Int[Array, '...']:
  """Steps that clients with `num_images` take in a round; 0 for an empty slot."""
  return jnp.where(num_images > 0, epochs * jnp.maximum(1, num_images // batch_size), 0)


def images_trained(sizes: Int[np.ndarray, ' K'], client: ClientConfig) -> int:
  """Returns the images that clients of these sizes train on in a round, over all local epochs."""
  batch = client.batch_size
  return client.local_epochs * sum(min(int(n), steps_per_epoch(int(n), batch) * batch) for n in sizes)


def padded_capacity(num_images: int, batch_size: int) -> int:
  """Returns the padded number of images of a client's arrays: a batch times a power of two.

  Loops end at the last valid step, so padding costs next to nothing. Data sets of similar client sizes share a compiled
  round.
  """
  return batch_size * 2 ** max(0, math.ceil(math.log2(num_images / batch_size)))


def plan_epochs(
  key: Key, image_ids: Int[Array, ' M'], num_images: Int[Array, ''], epochs: int, steps: int, batch_size: int
) -> tuple[Int[Array, 'S B'], Bool[Array, 'S B']]:
  """Shuffles a client's images for each epoch and cuts them into batches.

  Args:
    key: the client's, in this round; the draw of an image depends on its position only, not on M.
    image_ids: (M,) int32, the client's images first, padding after.
    num_images: () int32, the number of the client's images.
    epochs: local epochs E.
    steps: steps per epoch, at least the client's own.
    batch_size: B.

  Returns:
    ids (E * S, B) int32 and mask (E * S, B) bool. The first E * max(1, num_images // B) steps are the client's (none if
    it has no image); the others are masked.
  """
  capacity = steps * batch_size
  position = jnp.arange(image_ids.shape[0])

  def epoch(draws):
    order = jnp.argsort(jnp.where(position < num_images, draws, 2.0))
    return jnp.resize(image_ids[order], (capacity,))

  def draw(epoch_num):
    return jax.random.uniform(jax.random.fold_in(key, epoch_num), position.shape)

  ids = jax.vmap(lambda epoch_num: epoch(draw(epoch_num)))(jnp.arange(epochs)).reshape(epochs, steps, batch_size)
  own_steps = jnp.maximum(1, num_images // batch_size)
  index = jnp.arange(epochs * steps)
  epoch_num, step = jnp.minimum(index // own_steps, epochs - 1), index % own_steps
  slot = step[:, None] * batch_size + jnp.arange(batch_size)
  return ids[epoch_num, step], (slot < num_images) & (index < epochs * own_steps)[:, None]
