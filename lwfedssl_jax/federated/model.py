"""Encoder and objective of a configuration, and their initial parameters."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import stages, trees
from lwfedssl_jax.base import Encoder, Key, Objective, Params
from lwfedssl_jax.config_groups import ModelConfig, ObjectiveConfig
from lwfedssl_jax.models import make_encoder
from lwfedssl_jax.models.blocks import BlockExecution
from lwfedssl_jax.objectives import make_objective
from lwfedssl_jax.stages import StageShape


class Model(NamedTuple):
  """An encoder with the heads of an objective.

  Attributes:
    encoder: F.
    objective: the loss on its pooled embeddings, with projector H and predictor P.
    raveler: concatenates an active part into a few vectors (trees.py).
  """

  encoder: Encoder
  objective: Objective
  raveler: trees.Raveler

  def init_params(self, key: Key) -> Params:
    """Draws the full parameter tree, float32: embedding, blocks, norm, and each head by its name."""
    encoder_params = self.encoder.init(jax.random.fold_in(key, 0))
    return encoder_params | self.objective.init(jax.random.fold_in(key, 1), self.encoder.width)


@functools.lru_cache(maxsize=16)
def make_model(
  model: ModelConfig, objective: ObjectiveConfig, image_size: int, execution: BlockExecution = BlockExecution()
) -> Model:
  """Builds the configured model.

  Args:
    model: encoder and compute dtype.
    objective: objective and heads.
    image_size: side of the images, pixels.
    execution: of blocks that are differentiated.
  """
  built = make_objective(objective, model.compute_dtype)
  return Model(make_encoder(model, image_size, execution), built, trees.make_raveler(built.online_only))


def trace_active(model: Model, shape: StageShape) -> dict[str, Any]:
  """Returns the shapes of a stage's active parameters, raveled: {group: jax.ShapeDtypeStruct}."""

  def ravel(key, start):
    return model.raveler.ravel(stages.split(model.init_params(key), shape, start).active)

  return jax.eval_shape(ravel, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32))
