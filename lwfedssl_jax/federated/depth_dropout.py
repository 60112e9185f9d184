"""Depth dropout: which blocks a client keeps in a round (Guo et al. 2023, arXiv 2309.05213).

A client keeps the blocks that the stage adds and a random subset of the earlier ones, at most `keep` in all. The
numbers of the blocks are inputs of a round's program, their count is part of its shape.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import rng, stages
from lwfedssl_jax.base import Array, Bool, Int, Integer
from lwfedssl_jax.config import Config
from lwfedssl_jax.stages import StagePlan


def _draw(
  depth: int, seed: Integer, round_num: Integer, client_id: Integer, numbers: Int[Array, '3']
) -> Bool[Array, ' L']:
  """Marks the blocks that a client keeps; `numbers` are the plan's stop, num_new and num_kept."""
  block, (stop, num_new, num_kept) = jnp.arange(depth), numbers
  drawn = jax.random.uniform(rng.key(seed, rng.Stream.DEPTH_DROPOUT, round_num, client_id), (depth,))
  order = jnp.where(block >= stop, 2, jnp.where(block >= stop - num_new, -1, drawn))  # new, earlier, absent
  rank = jnp.zeros(depth, jnp.int32).at[jnp.argsort(order)].set(block)
  return rank < num_kept


@functools.partial(jax.jit, static_argnums=0)
def _draw_all(depth, seed, round_nums, client_ids, numbers):
  of_clients = jax.vmap(functools.partial(_draw, depth), in_axes=(None, None, 0, None))
  return jax.vmap(of_clients, in_axes=(None, 0, 0, 0))(seed, round_nums, client_ids, numbers)


def draw_kept(
  seed: int, plans: Sequence[StagePlan], round_nums: Sequence[int], client_ids: Int[np.ndarray, 'R K']
) -> Bool[np.ndarray, 'R K L']:
  """Draws the blocks that the clients of R rounds keep, of all L; both attempts at a round have the same.

  Args:
    seed: the run's.
    plans: of each round's stage.
    round_nums: 0-based over the run.
    client_ids: of each round's K clients.
  """
  numbers = np.array([(plan.stop, plan.num_new, plan.num_kept) for plan in plans], np.int32).reshape(-1, 3)
  return np.asarray(
    _draw_all(plans[0].depth, seed, np.asarray(round_nums, np.int32), np.asarray(client_ids, np.int32), numbers)
  )


def plan_kept(config: Config, client_ids: Int[np.ndarray, 'R K']) -> Bool[np.ndarray, 'R K L'] | None:
  """Draws the blocks that the clients of a run's first R rounds keep; None without depth dropout."""
  if not config.effective_depth_dropout_keep or not len(client_ids):
    return None
  plans = [plan for plan in stages.make_plans(config) for _ in range(plan.num_rounds)][: len(client_ids)]
  return draw_kept(config.run.seed, plans, range(len(client_ids)), client_ids)


def num_inputs(plan: StagePlan) -> int:
  """Returns how many block numbers a client's program takes: as many in every later stage that freezes blocks."""
  return plan.keep - plan.num_new if plan.start else plan.num_kept


def select_inputs(plan: StagePlan, keeps: Bool[np.ndarray, 'K L']) -> Int[np.ndarray, 'K n']:
  """Returns the block numbers that the programs of K clients take (`stages.keep_blocks`), ascending.

  Where the client trains all that it keeps, those blocks. Else the frozen ones that it runs, and padding where there
  are fewer than in later stages.
  """
  earlier = np.arange(plan.depth) < plan.start
  rows = [np.flatnonzero(row & earlier if plan.start else row) for row in keeps]
  width = num_inputs(plan)
  return np.array([np.pad(row, (0, width - len(row))) for row in rows], np.int32).reshape(len(rows), width)
