"""Client sampling and dropout: pure functions of (seed, round, client)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng
from lwfedssl_jax.base import Array, Bool, Int, Integer
from lwfedssl_jax.config import Config
from lwfedssl_jax.federated import depth_dropout
from lwfedssl_jax.stages import make_plans


class Participation(NamedTuple):
  """The participants of R rounds with K clients each.

  Attributes:
    client_ids: each row sorted and without repetition.
    returned: a client that did not return has paid its download, not its upload.
    keeps: with depth dropout, which of the L blocks each keeps (`depth_dropout.draw_kept`).
  """

  client_ids: Int[np.ndarray, 'R K']
  returned: Bool[np.ndarray, 'R K']
  keeps: Bool[np.ndarray, 'R K L'] | None = None


def _draw_order(seed: Integer, round_num: Integer, num_clients: int) -> Int[Array, ' N']:
  return jax.random.permutation(rng.key(seed, rng.Stream.SAMPLING, round_num), num_clients)


def plan_order(seed: int, num_rounds: int, num_clients: int) -> Int[np.ndarray, 'R N']:
  """Draws the order in which clients are chosen for every round: of those that are there, the first K take part."""
  order = jax.jit(jax.vmap(lambda round_num: _draw_order(seed, round_num, num_clients)))
  return np.asarray(order(jnp.arange(num_rounds)))


def plan_participation(
  seed: int, num_rounds: int, num_clients: int, clients_per_round: int, client_dropout: float
) -> Participation:
  """Draws the participants of every round of a run, uniformly without replacement, and their dropout."""

  def one_round(round_num: Int[Array, '']) -> tuple[Int[Array, ' K'], Bool[Array, ' K']]:
    ids = jnp.sort(_draw_order(seed, round_num, num_clients)[:clients_per_round])
    draw = jax.vmap(lambda client: jax.random.uniform(rng.key(seed, rng.Stream.DROPOUT, round_num, client)))
    return ids, draw(ids) >= client_dropout

  ids, returned = jax.jit(jax.vmap(one_round))(jnp.arange(num_rounds))
  return Participation(np.asarray(ids), np.asarray(returned))


def plan_run(config: Config) -> Participation:
  """Draws the participants of every round of a run, their dropout, and the blocks that they keep."""
  planned = plan_participation(
    config.run.seed,
    sum(plan.num_rounds for plan in make_plans(config)),
    config.effective_num_clients,
    config.effective_clients_per_round,
    config.client.client_dropout,
  )
  return planned._replace(keeps=depth_dropout.plan_kept(config, planned.client_ids))
