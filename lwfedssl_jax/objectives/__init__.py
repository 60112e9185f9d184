"""Self-supervised objectives: two augmented views in, one scalar out."""

from collections.abc import Callable

import jax.numpy as jnp

from lwfedssl_jax.base import Objective
from lwfedssl_jax.catalog import HEAD_HIDDEN, OBJECTIVES, PROJECTION_SIZE, ObjectiveTraits
from lwfedssl_jax.config_groups import ObjectiveConfig
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives.byol import make_byol
from lwfedssl_jax.objectives.moco_v3 import make_moco_v3
from lwfedssl_jax.objectives.simclr import make_simclr
from lwfedssl_jax.objectives.simsiam import make_simsiam

# (configuration, projector, predictor) -> objective
BUILDERS: dict[str, Callable[[ObjectiveConfig, Head, Head], Objective]] = {
  'moco_v3': lambda config, projector, predictor: make_moco_v3(
    projector, predictor, config.temperature, config.target_decay
  ),
  'byol': lambda config, projector, predictor: make_byol(projector, predictor, config.target_decay),
  'simclr': lambda config, projector, predictor: make_simclr(projector, config.temperature),
  'simsiam': lambda config, projector, predictor: make_simsiam(projector, predictor.clone(norm_output=False)),
}


def register_objective(
  name: str, traits: ObjectiveTraits, builder: Callable[[ObjectiveConfig, Head, Head], Objective]
) -> None:
  """Adds an objective under a new name, before a configuration or flags name it (docs/extending.md).

  Raises:
    UsageError: the name is taken.
  """
  if name in OBJECTIVES:
    raise UsageError(f'--objective: expected a new name, {name!r} is taken')
  OBJECTIVES[name], BUILDERS[name] = traits, builder


def make_objective(config: ObjectiveConfig, compute_dtype: str = 'float32') -> Objective:
  """Builds the configured objective with LW-FedSSL's heads (D-512-512-256 and 256-512-256)."""
  dtype = jnp.dtype(compute_dtype)
  projector = Head((HEAD_HIDDEN, HEAD_HIDDEN), PROJECTION_SIZE, dtype)
  predictor = Head((HEAD_HIDDEN,), PROJECTION_SIZE, dtype)
  return BUILDERS[config.objective](config, projector, predictor)
