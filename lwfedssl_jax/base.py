"""Contracts between the layers: NamedTuples of pure functions, and array aliases.

Shapes use one alphabet: B batch, H W C image, T tokens, D width, P projection, K clients, L blocks, N images.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt8

if TYPE_CHECKING:
  Params = dict[str, Any]
  Labels = dict[str, Any]
else:

  class _Leaves(type):
    """The type of trees whose leaves are arrays of a kind. jaxtyping's PyTree[...] takes milliseconds a check."""

    def __instancecheck__(cls, tree) -> bool:
      leaves = jax.tree.leaves(tree)
      return all(isinstance(x, Array | np.ndarray) and jnp.issubdtype(x.dtype, cls.kind) for x in leaves)

  class Params(metaclass=_Leaves):
    """A tree of parameters, float32."""

    kind = jnp.floating

  class Labels(metaclass=_Leaves):
    """A tree of ABSENT, FROZEN or ACTIVE, see stages.py."""

    kind = jnp.integer


Raveled = dict[str, Float[Array, ' _']]  # a tree as a few vectors, see trees.py
Stacked = dict[str, Float[Array, 'K _']]  # those of K clients
Images = UInt8[Array, 'N *pixels']  # (N, H, W, 3), or flat, (N, H*W*3)
Projections = Float[Array, '2 B P']  # of both views
Mask = Bool[Array, ' B']  # the valid samples of a batch
Scalar = Float[Array, '']
Number = float | np.floating | Scalar  # may be traced
Integer = int | np.integer | Int[Array, '']  # may be traced
Key = PRNGKeyArray
Function = Callable[..., Any]
Apply = Callable[[Params, Any], Float[Array, 'B D']]  # parameters, images (B, H, W, C) -> embeddings

__all__ = [
  'Apply',
  'Array',
  'Bool',
  'Encoder',
  'EncoderFlops',
  'ExportedEncoder',
  'FederatedRound',
  'Float',
  'Function',
  'Images',
  'Int',
  'Integer',
  'Key',
  'Labels',
  'Mask',
  'Number',
  'Objective',
  'Params',
  'PartFlops',
  'Projections',
  'PyTree',
  'Raveled',
  'Scalar',
  'Shaped',
  'Stacked',
  'UInt8',
]


class PartFlops(NamedTuple):
  """What a part of an encoder computes in one image's forward pass.

  Attributes:
    products: multiply-adds of its matrix products, each counted once.
    norm_elements: elements that its layer norms normalize; only the paper's convention counts them.
    input_products: of the products those that take the part's input as it comes. In the lowest block that is trained
      they have no gradient of the input.
  """

  products: int
  norm_elements: int = 0
  input_products: int = 0


class EncoderFlops(NamedTuple):
  """What the parts of an encoder compute for one image: embedding, each block, pool.

  The embedding's product takes the image, whose gradient is not needed; it is counted as its only one. All
  other products have two products in the backward pass.
  """

  embedding: PartFlops
  blocks: tuple[PartFlops, ...]
  pool: PartFlops


class ExportedEncoder(NamedTuple):
  """An encoder for another library.

  Attributes:
    tensors: {that library's name: float32 array}.
    description: what builds the model there: at least `model` and `arguments`; JSON. `timm_architecture`, if there is
      one, names a registered model of timm that takes these arguments.
  """

  tensors: dict[str, np.ndarray]
  description: dict[str, Any]


class Encoder(NamedTuple):
  """An encoder that can be cut between blocks.

  Parameters are `{'embedding': ..., 'blocks': ..., 'norm': ...}`. Equal blocks are stacked: every leaf of `blocks`
  carries them along a leading depth axis L. Unlike blocks are `{'block_00': ..., 'block_01': ..., ...}`
  (block_trees.py). Blocks whose embeddings are not D wide have a temporary layer `{'adapters': {'adapter_00': ...}}`,
  the first `EncoderTraits.num_adapters` of them; `train` maps by it while its block is the last one.

  Attributes:
    init: key -> parameters, float32.
    embed: (embedding parameters, images float32 (B, H, W, C)) -> tokens (B, T, D).
    prefix: (`block_trees.readable` blocks, tokens, count) -> tokens after blocks 0 .. count-1. `count` may
      be traced if the blocks are equal; not differentiated.
    blocks: (n blocks, tokens, stop=None) -> tokens after all n blocks,
      differentiable. With `stop` (traced; equal blocks only), blocks at or above it are skipped.
    pool: (norm parameters, tokens) -> embeddings (B, D), float32; of less than D numbers without an adapter.
    depth: number of blocks L.
    width: embedding width D.
    flops: what each part computes, for images of the side that the encoder is built for.
    export: parameters, of which `blocks` may hold the first few -> ExportedEncoder. None: parameters are exported
      under the names of this tree.
    restore: the tensors of `export` -> parameters.
    train: (active parameters of the encoder, images or tokens (V * B, ...) of V views, mask (B,), stop=None) ->
      embeddings (V * B, D) as in training, and a tree of the running statistics after it, which holds nothing else.
      None: embed, blocks and pool in turn, without statistics. The other functions use the running statistics.
  """

  init: Callable[[Key], Params]
  embed: Callable[[Params, Array], Array]
  prefix: Callable[[Params, Array, Integer], Array]
  blocks: Callable[..., Array]
  pool: Callable[[Params, Array], Array]
  depth: int
  width: int
  flops: EncoderFlops
  export: Callable[[Params], ExportedEncoder] | None = None
  restore: Callable[[dict[str, np.ndarray]], Params] | None = None
  train: Function | None = None


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
    head_names: the heads that are trained and exchanged. Every matrix in them is used once per image and view.
    online_only: those of them that run in the online branch alone; the target branch does not have them.
  """

  name: str
  init: Callable[[Key, int], Params]
  project: Callable[[Params, Float[Array, '2 B D'], Mask], Projections]
  loss: Callable[[Params, Projections, Projections | None, Mask], Scalar]
  update_target: Callable[[Raveled, Raveled], Raveled] | None
  head_names: tuple[str, ...]
  online_only: tuple[str, ...] = ()


class FederatedRound(NamedTuple):
  """One round of training, compiled once for all rounds whose stages have the same shape.

  Attributes:
    apply: (params, plan, inputs) -> (params, RoundMetrics). It donates the parameters' buffers: the caller
      must not use them again.
    lower: (params, plan, inputs), arrays or `jax.ShapeDtypeStruct`s -> jax's `Lowered` program.
    body: (stage shape, params, start, stop, inputs) -> as `apply`; not compiled, for programs that contain a round.
  """

  apply: Function
  lower: Callable[..., jax.stages.Lowered]
  body: Function
