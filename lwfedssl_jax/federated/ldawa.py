"""L-DAWA (Rehman et al. 2023, arXiv 2307.07393): every tensor of a client is scaled by its cosine to the received one.

w_new = (1 / K) sum_k cos(w_k, w) w_k, for each tensor, over the K accepted clients. In a stage's first rounds FedAvg
aggregates instead, as in the first rounds of the official code.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lwfedssl_jax import block_trees, trees
from lwfedssl_jax.base import Array, Int, Integer, Params
from lwfedssl_jax.config_groups import MethodConfig


def scale_tensors(client_params: Params, global_params: Params) -> Params:
  """Multiplies each tensor by its cosine to the received one, over all of its elements.

  Every stacked block (n, ...) is a tensor of its own. A tensor of zeros, such as an untrained bias, has no direction:
  it leaves the client's tensor as it is. So do running statistics, which the official code scales.
  """
  is_stacked = block_trees.is_stacked(client_params.get('blocks', {}))

  def scale(path: tuple[Any, ...], own: Array, received: Array) -> Array:
    if path[-1].key in trees.RUNNING:
      return own
    axes = tuple(range(is_stacked and path[0].key == 'blocks', own.ndim))

    def total(values: Array) -> Array:
      return values.sum(axis=axes, keepdims=True)

    norms = jnp.sqrt(total(jnp.square(own)) * total(jnp.square(received)))
    cosine = jnp.where(norms > 0, total(own * received) / jnp.where(norms > 0, norms, 1), 1)
    return own * jnp.minimum(cosine, 1)  # rounding may exceed 1

  return jax.tree_util.tree_map_with_path(scale, client_params, global_params)


def make_hooks(config: MethodConfig) -> dict[str, Any]:
  """Builds what makes FedAvg's mean, an Aggregator, L-DAWA after --ldawa_fedavg_rounds: `weigh` and `prepare`."""

  def is_fedavg(stage_round: Integer) -> Any:
    return jnp.asarray(stage_round) < config.ldawa_fedavg_rounds

  def weigh(num_images: Int[Array, ' K'], stage_round: Integer) -> Int[Array, ' K']:
    return jnp.where(is_fedavg(stage_round), num_images, jnp.minimum(num_images, 1))

  def prepare(client_params: Params, global_params: Params, stage_round: Integer) -> Params:
    scaled = scale_tensors(client_params, global_params)
    return jax.tree.map(lambda a, b: jnp.where(is_fedavg(stage_round), a, b), client_params, scaled)

  return {'weigh': weigh, 'prepare': prepare, 'returns_mean': False}
