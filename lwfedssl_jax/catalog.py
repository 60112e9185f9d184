"""The choices, as data: methods, objectives, encoders, protocols, conventions. Imports no jax."""

import typing
from collections.abc import Callable

from lwfedssl_jax.errors import UsageError


class MethodTraits(typing.NamedTuple):
  """Traits of a method (arXiv 2401.11647).

  Attributes:
    staged: the encoder grows by `blocks_per_stage` blocks a stage; else all blocks exist from the start.
    first_trained: (stop, step) -> first block that a client trains when blocks 0 .. stop - 1 exist and a stage adds
      `step`; the blocks below are frozen on the client.
    federated: False for one client that holds all the data and exchanges nothing.
    mechanisms: server calibration and representation alignment are on by default.
  """

  staged: bool
  first_trained: Callable[[int, int], int]
  federated: bool = True
  mechanisms: bool = False


class ObjectiveTraits(typing.NamedTuple):
  """Traits of an objective on which costs and memory depend.

  Attributes:
    has_predictor: a predictor P is trained and exchanged.
    has_target: a target branch runs beside the online one.
    similarity_products: (B, P) by (P, B) matrix products that a step executes, forward and backward.
    paper_views: views that the paper's FLOP count includes.
  """

  has_predictor: bool
  has_target: bool
  similarity_products: int
  paper_views: int = 1


_everything = lambda stop, step: 0
_newest = lambda stop, step: stop - step

METHODS = {
    'end_to_end': MethodTraits(staged=False, first_trained=_everything),
    'layerwise': MethodTraits(staged=True, first_trained=_newest),
    'lw_fedssl': MethodTraits(staged=True, first_trained=_newest, mechanisms=True),
    'prog_fedssl': MethodTraits(staged=True, first_trained=_everything),
    'centralized': MethodTraits(staged=False, first_trained=_everything, federated=False),
}

# info_nce has constant keys: per view one product forward and one in the gradient. NT-Xent compares all 2B projections
# with each other, four times the entries, and has both gradients. BYOL's distance is row-wise: no such product.
OBJECTIVES = {
    'moco_v3': ObjectiveTraits(has_predictor=True, has_target=True, similarity_products=4),
    'byol': ObjectiveTraits(has_predictor=True, has_target=True, similarity_products=0),
    'simclr': ObjectiveTraits(has_predictor=False, has_target=False, similarity_products=12, paper_views=2),
}
AGGREGATIONS = ('mean', 'median', 'trimmed_mean')
REMATERIALIZE = ('none', 'elementwise', 'all')  # in descending order of what is stored


class EncoderSize(typing.NamedTuple):
  """Sizes of a vision transformer: token width, blocks, attention heads, MLP expansion."""

  width: int
  depth: int
  num_heads: int
  mlp_ratio: int


# vit_tiny: the paper's encoder (arXiv 2401.11647). vit_micro: ours, for CPUs and tests.
ENCODER_SIZES = {
    'vit_tiny': EncoderSize(width=192, depth=12, num_heads=3, mlp_ratio=4),
    'vit_micro': EncoderSize(width=64, depth=4, num_heads=2, mlp_ratio=4),
}

# How costs are counted (resources/costs.py): as in versions 4 and 1 of the paper, or as executed.
PAPER_CONVENTIONS = ('paper_v4', 'paper_v1')
OWN_CONVENTIONS = ('actual', 'expected')
CONVENTIONS = (*PAPER_CONVENTIONS, *OWN_CONVENTIONS)

PROTOCOLS = ('knn', 'knn_centered', 'linear', 'finetune')  # of evaluation
SPLITS = ('test', 'validation')  # of evaluation

# Widths of projector and predictor (192-512-512-256 and 256-512-256 for ViT-Tiny, as in MoCo v3's shape).
HEAD_HIDDEN = 512
PROJECTION_SIZE = 256


def register_method(name: str, traits: MethodTraits) -> None:
  """Adds a method under a new name, before a configuration or flags name it (docs/extending.md).

  Raises:
    UsageError: the name is taken.
  """
  if name in METHODS:
    raise UsageError(f'--method: expected a new name, {name!r} is taken')
  METHODS[name] = traits
