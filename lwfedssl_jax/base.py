"""Contracts between the layers: NamedTuples of pure functions, and array aliases.

Shapes use one alphabet: B batch, H W C image, T tokens, D width, P projection, K clients, L blocks, N images.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, UInt8

Params: TypeAlias = PyTree[Float[Array | np.ndarray, '...']]  # a tree of parameters, float32, on device or host
AbstractParams: TypeAlias = PyTree[Float[Array | np.ndarray | jax.ShapeDtypeStruct, '...']]  # or their shapes alone
Labels = PyTree[Int[Array, '...']]  # ABSENT, FROZEN or ACTIVE, see stages.py
Raveled = dict[str, Float[Array, ' _']]  # a tree as a few vectors, see trees.py
Stacked = dict[str, Float[Array, 'K _']]  # those of K clients
Images = UInt8[Array, 'N H W C']
Mask = Bool[Array, ' B']  # the valid samples of a batch
Scalar = Float[Array, '']
Integer = int | np.integer | Int[Array, '']  # may be traced
Key = PRNGKeyArray
Function = Callable[..., Any]

__all__ = [
    'AbstractParams', 'Array', 'Bool', 'Encoder', 'FederatedRound', 'Float', 'Function', 'Images', 'Int', 'Integer',
    'Key', 'Labels', 'Mask', 'Objective', 'Params', 'PyTree', 'Raveled', 'Scalar', 'Stacked', 'UInt8']


class Encoder(NamedTuple):
  """An encoder that can be cut between blocks.

  Parameters are `{'embedding': ..., 'blocks': ..., 'norm': ...}`; every leaf of `blocks` carries
  the blocks stacked along a leading depth axis L.

  Attributes:
    init: key -> parameters, float32.
    embed: (embedding parameters, images float32 (B, H, W, C)) -> tokens (B, T, D).
    prefix: (stacked blocks (L, ...), tokens, count) -> tokens after blocks 0 .. count-1. `count` may
      be traced; not meant to be differentiated.
    blocks: (stacked blocks (n, ...), tokens, stop=None) -> tokens after all n blocks,
      differentiable. With `stop` (traced), blocks at or above it are left out.
    pool: (norm parameters, tokens) -> embeddings (B, D), float32.
    depth: number of blocks L.
    width: embedding width D.
  """

  init: Callable[[Key], Params]
  embed: Callable[[Params, Array], Array]
  prefix: Callable[[Params, Array, Integer], Array]
  blocks: Callable[..., Array]
  pool: Callable[[Params, Array], Array]
  depth: int
  width: int


class Objective(NamedTuple):
  """A two-view self-supervised objective on pooled embeddings.

  Attributes:
    name: as on the command line.
    init: (key, width D) -> heads, a dictionary of parameter trees.
    project: (heads, embeddings (2, B, D), mask (B,)) -> projections (2, B, P).
    loss: (heads, projections (2, B, P), target projections (2, B, P) or None, mask (B,)) ->
      scalar float32, mean over the valid samples.
    update_target: (target, online) -> target, after a step; None where the objective has no target
      branch. Both are raveled active parameters, the target without the online-only heads'.
    head_names: the heads that are trained and exchanged.
    online_only: those of them that the target branch does not have.
  """

  name: str
  init: Callable[[Key, int], Params]
  project: Callable[[Params, Array, Mask], Array]
  loss: Callable[[Params, Array, Array | None, Mask], Array]
  update_target: Callable[[Raveled, Raveled], Raveled] | None
  head_names: tuple[str, ...]
  online_only: tuple[str, ...] = ()


class FederatedRound(NamedTuple):
  """One round of training, compiled once for all rounds whose stages have the same shape.

  Attributes:
    apply: (params, plan, inputs) -> (params, RoundMetrics). It donates the parameters' buffers: the ones passed in
      must not be used again.
    lower: (params, plan, inputs), arrays or `jax.ShapeDtypeStruct`s -> jax's `Lowered` program.
    body: (stage shape, params, start, stop, inputs) -> as `apply`; not compiled, for programs that contain a round.
  """

  apply: Function
  lower: Callable[..., jax.stages.Lowered]
  body: Function
