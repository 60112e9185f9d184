"""Which images a client's steps see: a pure function of a key, on the device.

The last incomplete batch of an epoch is dropped; a client with fewer images than a batch trains on one masked
batch per epoch. All clients of a round share one step count; a step or sample that a client does not have is masked.
"""

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import PRNGKey


def steps_per_epoch(num_images: int, batch_size: int) -> int:
  """Steps that a client with `num_images` (>= 1) takes per epoch."""
  return max(1, num_images // batch_size)


def plan_epochs(
    key: PRNGKey, image_ids: jax.Array, num_images: jax.Array, epochs: int, steps: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
  """Shuffles a client's images anew for each epoch and cuts them into batches.

  Args:
    key: the client's, in this round.
    image_ids: (M,) int32, the client's images first, padding after.
    num_images: () int32, how many of them are the client's.
    epochs: local epochs E.
    steps: steps per epoch S, at least the client's own.
    batch_size: B.

  Returns:
    ids (E * S, B) int32 and mask (E * S, B) bool; a step the client does not take is masked throughout.
  """
  capacity = steps * batch_size
  position = jnp.arange(image_ids.shape[0])

  def epoch(draws):
    order = jnp.argsort(jnp.where(position < num_images, draws, 2.0))
    return jnp.resize(image_ids[order], (capacity,))

  ids = jax.vmap(epoch)(jax.random.uniform(key, (epochs, position.size))).reshape(epochs * steps, batch_size)
  slot = jnp.arange(capacity).reshape(steps, batch_size)
  own_steps = jnp.maximum(1, num_images // batch_size)
  mask = (slot < num_images) & (slot // batch_size < own_steps)
  return ids, jnp.tile(mask, (epochs, 1))
