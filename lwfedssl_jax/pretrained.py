"""A trained encoder loaded from its run: one function and its parameters."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.base import Apply, Array, Encoder, Float, Params, Shaped
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import augment
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated.model import Model, make_model
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.workdir import checkpoint, run_dir


class LoadedEncoder(NamedTuple):
  """An encoder and its parameters.

  Attributes:
    apply: (params, images (B, S, S, 3) of the run's size, uint8 or float in [0, 1]) -> embeddings, float32. Pure: may
      be jitted and differentiated. Raises UsageError for images of another shape or type.
    params: `embedding`, `blocks` (stacked, those that the run had reached) and `norm`, float32.
    encoder: the functions `apply` is made of.
    config: the run's configuration.
    rounds_done: rounds of training; 0 for random weights.
  """

  apply: Apply
  params: Params
  encoder: Encoder
  config: Config
  rounds_done: int

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return jax.tree.leaves(self.params['blocks'])[0].shape[0]


def _check_images(images: Shaped[Array | np.ndarray, '...'], size: int) -> None:
  if images.ndim != 4 or images.shape[1:] != (size, size, 3):
    raise UsageError(f'images: expected the shape (B, {size}, {size}, 3), got {images.shape}')
  if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise UsageError(f'images: expected uint8, or floating point in [0, 1], got {images.dtype}')


def _apply(
  encoder: Encoder, image_size: int, params: Params, images: Shaped[Array | np.ndarray, '...']
) -> Float[Array, 'B D']:
  _check_images(images, image_size)
  inputs = augment.to_float(images) if images.dtype == 'uint8' else images
  tokens = encoder.embed(params['embedding'], augment.normalize(inputs))
  return encoder.pool(params['norm'], encoder.blocks(params['blocks'], tokens))


def _model(config: Config) -> Model:
  return make_model(config.model, config.objective, config.model.image_size)


def _of(params: Params, config: Config, depth: int, rounds_done: int) -> LoadedEncoder:
  encoder = _model(config).encoder
  kept = {name: params[name] for name in ('embedding', 'norm')}
  kept['blocks'] = jax.tree.map(lambda leaf: leaf[:depth], params['blocks'])
  return LoadedEncoder(functools.partial(_apply, encoder, config.model.image_size), kept, encoder, config, rounds_done)


def random_encoder(config: Config, seed: int) -> LoadedEncoder:
  """Returns the configured encoder with the random weights that a run of that seed starts from."""
  return _of(jax.jit(_model(config).init_params)(rng.key(seed, rng.Stream.INIT)), config, config.model.traits.depth, 0)


def load_encoder(workdir: str) -> LoadedEncoder:
  """Loads the encoder of a run's newest valid checkpoint; the run may still be in progress.

  Raises:
    UsageError: the folder holds no run, or no valid checkpoint.
  """
  config = run_dir.read_config(workdir)
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore_newest(jax.eval_shape(_model(config).init_params, jax.random.key(0)))
  if restored is None:
    raise UsageError(f'--workdir: expected a run with a checkpoint, {workdir} has none')
  plans = make_plans(config)
  reached = max(plan.stop for plan in plans if plan.first_round < restored.rounds_done)
  return _of(restored.params, config, reached, restored.rounds_done)
