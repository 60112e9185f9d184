"""Randomness as a pure function of (seed, stream, indices). No key is stored in any state.

`key` serves programs on a device, `host_generator` NumPy on the host. A stream has one purpose: two purposes that
shared one would draw the same numbers and depend on each other.

A resumed run therefore draws what an uninterrupted run draws, and a client's randomness does not depend on the other
sampled clients or their order.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.base import Key


@enum.unique
class Stream(enum.IntEnum):
  """Purposes of random numbers. Values are part of a run's identity: never renumber."""

  INIT = 0
  SERVER_SPLIT = 1  # which training images the server holds
  SAMPLING = 2  # which clients take part in a round
  DROPOUT = 3  # which of them do not return
  SHUFFLE = 4  # order of a client's images in an epoch
  AUGMENT = 5
  CALIBRATION_SHUFFLE = 6
  CALIBRATION_AUGMENT = 7
  CONTACT_SHEET = 8  # views drawn for the plot of augmented images
  FINETUNE_SHUFFLE = 9
  FINETUNE_AUGMENT = 10
  RETRY = 11  # of a round without any valid update
  PARTITION = 12  # which images each client holds
  LABEL_SUBSET = 13  # of a few-label evaluation
  TRAIN_SUBSET = 14  # of --max_train_images
  MONITOR_SUBSET = 15  # bank and test images of the kNN monitor
  EVALUATION_SUBSET = 16  # training images of an evaluation
  VALIDATION_SPLIT = 17  # training images held out for choosing settings
  PROBE_SPLIT = 18  # of a linear probe's rows, for choosing its penalty
  MEASUREMENT = 19  # parameters of a memory measurement
  FOLDER_HOLDOUT = 20  # test images of an image folder without test images
  PRIVACY = 21  # noise on a client's update
  DEPTH_DROPOUT = 22  # which earlier blocks a client keeps in a round


def key(seed: int | Any, stream: Stream | Any, *indices: int | Any) -> Key:
  """Returns the typed key of a stream, folded with each index in turn.

  Args:
    seed: the run's seed, int or traced integer scalar; or a typed key already made from it.
    stream: the purpose; may be traced.
    *indices: e.g. round, client, step; ints or traced integer scalars.
  """
  is_key = hasattr(seed, 'dtype') and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
  folded = jnp.stack([jnp.asarray(index, jnp.uint32) for index in (stream, *indices)])
  start: Any = seed if is_key else jax.random.key(seed)
  return jax.lax.scan(_fold_in, start, folded)[0]


def attempt_key(seed: int | Any, attempt: int) -> Key:
  """Returns the typed key from which an attempt at a round draws; a second one (1) draws other numbers.

  Args:
    seed: the run's seed, int or traced integer scalar.
    attempt: 0 or 1.
  """
  return key(seed, Stream.RETRY) if attempt else jax.random.key(seed)


def _fold_in(result: Key, index: jax.Array) -> tuple[Key, None]:
  return jax.random.fold_in(result, index), None


def host_generator(seed: int, stream: Stream) -> np.random.Generator:
  """Returns the NumPy generator of a stream: Philox, seeded by a `SeedSequence` that is spawned by the stream.

  Args:
    seed: the run's seed, or 0 for a choice that is the same in every run.
    stream: the purpose.
  """
  return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(stream,))))


def host_seed(seed: int, stream: Stream) -> int:
  """Returns a seed below 2^32 for a library that takes an integer; arguments as `host_generator`."""
  return int(np.random.SeedSequence(seed, spawn_key=(stream,)).generate_state(1)[0])
