"""What a configured model is made of: its parameters, traced on abstract arrays, never computed or compiled."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import block_trees
from lwfedssl_jax.block_trees import adapter_name, block_name
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated.model import Model, make_model


def _count_matrices(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim == 2)


class Shapes(NamedTuple):
  """A model on abstract arrays.

  Attributes:
    model: encoder and objective.
    params: the tree of `Model.init_params`, of `jax.ShapeDtypeStruct`s.
    projection_size: P, of the objective's projections.
  """

  model: Model
  params: dict[str, Any]
  projection_size: int

  def count_products(self, head: str) -> int:
    """Multiply-adds of a head for one image and view: every entry of its matrices is used once."""
    return _count_matrices(self.params[head])

  def count_adapter(self, stop: int) -> int:
    """Multiply-adds of the temporary layer behind block `stop` - 1 for one image and view; 0 without one."""
    return _count_matrices(self.params.get('adapters', {}).get(adapter_name(stop - 1), {}))


def trace_shapes(config: Config, image_size: int) -> Shapes:
  """Traces the model of a run; `image_size` in pixels.

  Raises:
    UsageError: the encoder takes no images of that side.
    ValueError: the objective's heads are not those that it names.
  """
  return _trace(make_model(config.model, config.objective, image_size))


@functools.lru_cache(maxsize=16)
def _trace(model: Model) -> Shapes:
  objective = model.objective
  params = jax.eval_shape(model.init_params, jax.random.key(0))
  expected = {'embedding', 'blocks', 'norm', *objective.head_names}
  if set(params) - {'adapters'} != expected:
    raise ValueError(f'{objective.name}: expected parameters {sorted(expected)}, got {sorted(params)}')
  pooled, mask = jax.ShapeDtypeStruct((2, 2, model.encoder.width), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.bool_)
  return Shapes(model, params, jax.eval_shape(objective.project, params, pooled, mask).shape[-1])


def component_params(config: Config, image_size: int) -> dict[str, int]:
  """Counts the parameters of each component.

  Args:
    config: the run.
    image_size: side of the images, pixels.

  Returns:
    {component: parameters}: 'embedding', 'block_00' .. , 'norm', 'adapter_00' .. , and the heads.
  """
  model, params, _ = trace_shapes(config, image_size)
  blocks = [block_name(i) for i in range(model.encoder.depth)]
  names = ('embedding', *blocks, 'norm', *sorted(params.get('adapters', {})), *model.objective.head_names)
  parts = jax.eval_shape(block_trees.components, params)
  return {name: sum(leaf.size for leaf in jax.tree.leaves(parts[name])) for name in names}
