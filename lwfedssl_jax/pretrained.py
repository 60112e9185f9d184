"""A trained encoder loaded from its run or from a published folder: one function and its parameters."""

import dataclasses
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import block_trees, rng, trees
from lwfedssl_jax import config as configs
from lwfedssl_jax.base import Apply, Array, Encoder, Float, Params, Shaped
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import augment
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.federated.model import Model, make_model
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.workdir import checkpoint, run_dir

# Of a published folder (hub.py), beside timm's keys in its config.json.
WEIGHTS, DESCRIPTION, OWN_KEY = 'model.safetensors', 'config.json', 'lwfedssl_jax'


class LoadedEncoder(NamedTuple):
  """An encoder and its parameters.

  Attributes:
    apply: (params, images (B, S, S, 3) of the run's size, uint8 or float in [0, 1]) -> embeddings, float32. Pure: may
      be jitted and differentiated. Raises UsageError for images of another shape or type. Its `train` runs the encoder
      as in training, see EncoderFunction.
    params: `embedding`, `blocks` (those that the run had reached) and `norm`, float32.
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
    return block_trees.count(self.params['blocks'])


def _check_images(images: Shaped[Array | np.ndarray, '...'], size: int) -> None:
  if images.ndim != 4 or images.shape[1:] != (size, size, 3):
    raise UsageError(f'images: expected the shape (B, {size}, {size}, 3), got {images.shape}')
  if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
    raise UsageError(f'images: expected uint8, or floating point in [0, 1], got {images.dtype}')


@dataclasses.dataclass(frozen=True)
class EncoderFunction:
  """Images to embeddings: called, as in evaluation; `train`, as in training."""

  encoder: Encoder
  image_size: int

  def __call__(self, params: Params, images: Shaped[Array | np.ndarray, '...']) -> Float[Array, 'B D']:
    """Returns embeddings, by the running statistics where there are any."""
    tokens = self.encoder.embed(params['embedding'], self._normalize(images))
    return self.encoder.pool(params['norm'], self.encoder.blocks(params['blocks'], tokens))

  def train(self, params: Params, images: Shaped[Array | np.ndarray, '...']) -> tuple[Float[Array, 'B D'], Params]:
    """Returns embeddings, by statistics of the batch where there are any, and a tree of the new running statistics."""
    run: Any = self.encoder.train
    return run(params, self._normalize(images), jnp.ones(len(images), bool))

  def _normalize(self, images: Shaped[Array | np.ndarray, '...']) -> Float[Array, 'B H W C']:
    _check_images(images, self.image_size)
    return augment.normalize(augment.to_float(images) if images.dtype == 'uint8' else images)


def _model(config: Config) -> Model:
  return make_model(config.model, config.objective, config.model.image_size)


def _of(params: Params, config: Config, depth: int, rounds_done: int) -> LoadedEncoder:
  encoder = _model(config).encoder
  kept = {name: params[name] for name in ('embedding', 'norm')}
  kept['blocks'] = block_trees.first(params['blocks'], depth)
  return LoadedEncoder(EncoderFunction(encoder, config.model.image_size), kept, encoder, config, rounds_done)


def random_encoder(config: Config, seed: int) -> LoadedEncoder:
  """Returns the configured encoder with the random weights that a run of that seed starts from."""
  return _of(jax.jit(_model(config).init_params)(rng.key(seed, rng.Stream.INIT)), config, config.model.traits.depth, 0)


def _check_shapes(params: Params, expected: Any) -> None:
  """Raises ValueError unless the shapes are those of an encoder, of which `params` may hold the first blocks."""
  number = block_trees.count(params['blocks'])
  blocks = jax.eval_shape(lambda blocks: block_trees.first(blocks, number), expected['blocks'])

  def check(path, leaf, like):
    if leaf.shape != like.shape:
      raise ValueError(f'{trees.path_name(path)} has the shape {leaf.shape}, expected {like.shape}')

  jax.tree_util.tree_map_with_path(check, params, dict(expected, blocks=blocks))


def _load_published(folder: str) -> LoadedEncoder:
  """Loads the encoder of a folder that hub.py wrote. Raises UsageError."""
  from safetensors.numpy import load_file

  path = os.path.join(folder, DESCRIPTION)
  try:
    own = run_dir.read_json(path)[OWN_KEY]
    config, rounds_done = configs.from_flat(own['config']), int(own['rounds_done'])
  except (KeyError, TypeError, ValueError) as error:
    raise UsageError(f'{path}: expected what experiments.export --layout=hf writes ({error})') from error
  encoder, path = _model(config).encoder, os.path.join(folder, WEIGHTS)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0))
  try:
    assert encoder.restore is not None
    params = jax.tree.map(jnp.asarray, encoder.restore(load_file(path)))
    _check_shapes(params, shapes)
  except Exception as error:  # a damaged file raises nearly anything
    reason = ' '.join(str(error).split())
    raise UsageError(f'{path}: expected the weights of {config.model.encoder} ({reason})') from error
  return _of(params, config, config.model.traits.depth, rounds_done)


def load_encoder(workdir: str) -> LoadedEncoder:
  """Loads the encoder of a run's newest valid checkpoint, or of a folder that was exported with `--layout=hf`.

  The run may still be in progress.

  Raises:
    UsageError: the folder holds neither a run with a valid checkpoint nor an exported encoder.
  """
  if os.path.isfile(os.path.join(workdir, WEIGHTS)):
    return _load_published(workdir)
  config = run_dir.read_config(workdir)
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore_newest(jax.eval_shape(_model(config).init_params, jax.random.key(0)))
  if restored is None:
    raise UsageError(f'--workdir: expected a run with a checkpoint, {workdir} has none')
  plans = make_plans(config)
  reached = max(plan.stop for plan in plans if plan.first_round < restored.rounds_done)
  return _of(restored.params, config, reached, restored.rounds_done)
