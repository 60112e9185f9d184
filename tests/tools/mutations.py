"""The mutations, as data: the files beside this one list them by area."""

from typing import NamedTuple

from tests.tools import (
  mutations_augment,
  mutations_costs,
  mutations_evaluation,
  mutations_models,
  mutations_state,
  mutations_training,
)


class Mutation(NamedTuple):
  """A mistake: what it is, and the tests (pytest arguments below tests/) that must fail with it."""

  path: str  # below lwfedssl_jax/
  what: str
  old: str
  new: str
  tests: tuple[str, ...]


ROWS = (
  mutations_training.ROWS
  + mutations_augment.ROWS
  + mutations_models.ROWS
  + mutations_evaluation.ROWS
  + mutations_costs.ROWS
  + mutations_state.ROWS
)
MUTATIONS = tuple(Mutation(*row) for row in ROWS)
