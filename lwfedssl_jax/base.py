"""Contracts between the layers: NamedTuples of pure functions, and the one user-facing error."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
  import jax

  Params: TypeAlias = 'dict[str, jax.Array | Params]'
else:
  Params = dict[str, Any]  # a pytree of arrays; jax is for type checkers only
PRNGKey = Any  # a typed key, jax.random.key


class UsageError(ValueError):
  """A user's mistake: the message is one line that names the flag or file and what was expected."""


class LostPeerError(RuntimeError):
  """Another process of the run is gone; what was saved is whole."""


class TrainingError(RuntimeError):
  """A run cannot go on; what was good is saved. The message is one line."""


class Encoder(NamedTuple):
  """An encoder that can be cut between blocks.

  Parameters are `{'embedding': ..., 'blocks': ..., 'norm': ...}`; every leaf of `blocks` carries
  the blocks stacked along a leading depth axis L.

  Attributes:
    init: key -> parameters, float32.
    embed: (embedding parameters, images float32 (B, H, W, C)) -> tokens (B, T, D).
    prefix: (stacked blocks (L, ...), tokens, count) -> tokens after blocks 0 .. count-1. `count` may
      be traced; not meant to be differentiated.
    blocks: (stacked blocks (n, ...), tokens, depth=None) -> tokens after all n blocks,
      differentiable. With `depth` (traced), blocks at or above it are left out.
    pool: (norm parameters, tokens) -> embeddings (B, D), float32.
    depth: number of blocks L.
    width: embedding width D.
  """

  init: Callable[..., Params]
  embed: Callable[..., Any]
  prefix: Callable[..., Any]
  blocks: Callable[..., Any]
  pool: Callable[..., Any]
  depth: int
  width: int


class Objective(NamedTuple):
  """A two-view self-supervised objective on pooled embeddings.

  Attributes:
    name: as on the command line.
    init: key -> heads, `{'projector': ...}` and, where there is one, `'predictor'`.
    project: (heads, embeddings (2, B, D), mask (B,)) -> projections (2, B, P).
    loss: (heads, projections (2, B, P), target projections (2, B, P) or None, mask (B,)) ->
      scalar float32, mean over the valid samples.
    update_target: (target, online) -> target, after a step; None where the objective has no target
      branch. Both are packed active parameters (`trees.pack`), the target without the predictor's.
    head_names: the heads that are trained and exchanged.
  """

  name: str
  init: Callable[..., Params]
  project: Callable[..., Any]
  loss: Callable[..., Any]
  update_target: Callable[..., Params] | None
  head_names: tuple[str, ...]


class FederatedRound(NamedTuple):
  """One round of training: `init(key) -> params`, `apply(params, plan, inputs) -> (params, metrics)`."""

  init: Callable[..., Params]
  apply: Callable[..., Any]
