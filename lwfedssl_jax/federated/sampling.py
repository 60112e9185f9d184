"""Client sampling and dropout: pure functions of (seed, round, client)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng


class Participation(NamedTuple):
  """The participants of R rounds with K clients each.

  Attributes:
    client_ids: (R, K) int32, each row sorted and without repetition.
    returned: (R, K) bool; False for a client that dropped out: it downloads and does not upload.
  """

  client_ids: np.ndarray
  returned: np.ndarray


def plan_participation(
    seed: int, num_rounds: int, num_clients: int, clients_per_round: int, client_dropout: float) -> Participation:
  """Draws the participants of every round of a run, uniformly without replacement, and their dropout."""

  def one_round(round_num):
    order = jax.random.permutation(rng.key(seed, rng.Stream.SAMPLING, round_num), num_clients)
    ids = jnp.sort(order[:clients_per_round])
    draw = jax.vmap(lambda client: jax.random.uniform(rng.key(seed, rng.Stream.DROPOUT, round_num, client)))
    return ids, draw(ids) >= client_dropout

  ids, returned = jax.jit(jax.vmap(one_round))(jnp.arange(num_rounds))
  return Participation(np.asarray(ids), np.asarray(returned))
