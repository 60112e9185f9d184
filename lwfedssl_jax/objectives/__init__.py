"""Self-supervised objectives: two augmented views in, one scalar out."""

import jax.numpy as jnp

from lwfedssl_jax.base import Objective
from lwfedssl_jax.config import HEAD_HIDDEN, PROJECTION_SIZE, ObjectiveConfig
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives.byol import make_byol
from lwfedssl_jax.objectives.moco_v3 import make_moco_v3
from lwfedssl_jax.objectives.simclr import make_simclr


def make_objective(config: ObjectiveConfig, compute_dtype: str = 'float32') -> Objective:
  """Builds the configured objective with LW-FedSSL's heads (D-512-512-256 and 256-512-256)."""
  dtype = jnp.dtype(compute_dtype)
  projector = Head((HEAD_HIDDEN, HEAD_HIDDEN), PROJECTION_SIZE, dtype)
  predictor = Head((HEAD_HIDDEN,), PROJECTION_SIZE, dtype)
  builders = {
      'moco_v3': lambda: make_moco_v3(projector, predictor, config.temperature, config.target_decay),
      'byol': lambda: make_byol(projector, predictor, config.target_decay),
      'simclr': lambda: make_simclr(projector, config.temperature),
  }
  return builders[config.objective]()
