"""Randomness as a pure function of (seed, stream, indices). No key is stored in any state.

So a resumed run draws what an uninterrupted one would have drawn, and a client's randomness does
not depend on which other clients were sampled, nor on their order.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp

from lwfedssl_jax.base import PRNGKey


class Stream(enum.IntEnum):
  """What a random number is for. Values are part of a run's identity: never renumber."""

  INIT = 0
  PARTITION = 1
  SAMPLING = 2  # which clients take part in a round
  DROPOUT = 3  # which of them do not return
  SHUFFLE = 4  # order of a client's images in an epoch
  AUGMENT = 5
  CALIBRATION_SHUFFLE = 6
  CALIBRATION_AUGMENT = 7
  MONITOR = 8  # evaluation subsets and pictures
  FINETUNE_SHUFFLE = 9
  FINETUNE_AUGMENT = 10
  SECOND_ATTEMPT = 11  # of a round in which no client's update could be used


def key(seed: int | Any, stream: Stream | Any, *indices: int | Any) -> PRNGKey:
  """Returns the typed key of a stream, folded with each index in turn.

  Args:
    seed: the run's seed, int or traced integer scalar; or a typed key already made from it.
    stream: what it is for; may be traced.
    *indices: e.g. round, client, step; ints or traced integer scalars.
  """
  is_key = hasattr(seed, 'dtype') and jax.dtypes.issubdtype(seed.dtype, jax.dtypes.prng_key)
  folded = jnp.stack([jnp.asarray(index, jnp.uint32) for index in (stream, *indices)])
  return jax.lax.scan(_fold_in, seed if is_key else jax.random.key(seed), folded)[0]


def _fold_in(result: PRNGKey, index: jax.Array) -> tuple[PRNGKey, None]:
  return jax.random.fold_in(result, index), None
