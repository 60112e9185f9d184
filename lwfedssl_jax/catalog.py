"""The choices, as data: methods, objectives, encoders, protocols, conventions. Imports no jax."""

import dataclasses
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
  """What costs depend on in an objective, beside its heads and its target branch.

  Attributes:
    similarity_products: products of (B, P) by (P, B) that a step executes, forward and backward.
    paper_views: views that the paper's FLOP count includes.
    has_target: there is a target branch, which a client can keep.
  """

  similarity_products: int
  paper_views: int = 1
  has_target: bool = False


def _everything(stop: int, step: int) -> int:
  return 0


def _newest(stop: int, step: int) -> int:
  return stop - step


METHODS = {
  'end_to_end': MethodTraits(staged=False, first_trained=_everything),
  'layerwise': MethodTraits(staged=True, first_trained=_newest),
  'lw_fedssl': MethodTraits(staged=True, first_trained=_newest, mechanisms=True),
  'prog_fedssl': MethodTraits(staged=True, first_trained=_everything),
  'centralized': MethodTraits(staged=False, first_trained=_everything, federated=False),
}

# info_nce has constant keys: per view one product forward and one in the gradient. NT-Xent compares all 2B projections
# with each other, four times the entries, and has both gradients. The distances of BYOL and SimSiam are row-wise: no
# such product. The paper counts both views of SimCLR, which has one branch; so SimSiam's are counted.
OBJECTIVES = {
  'moco_v3': ObjectiveTraits(similarity_products=4, has_target=True),
  'byol': ObjectiveTraits(similarity_products=0, has_target=True),
  'simclr': ObjectiveTraits(similarity_products=12, paper_views=2),
  'simsiam': ObjectiveTraits(similarity_products=0, paper_views=2),
}
AGGREGATIONS = ['mean', 'median', 'trimmed_mean', 'ldawa']  # federated.aggregation.register_aggregator adds to them
# Of the aggregated change: the learning rate that each has if none is named.
SERVER_OPTIMIZERS = {'none': 1.0, 'fedavgm': 1.0, 'fedadam': 0.01, 'fedyogi': 0.01}
CLIENT_UPDATES = ('global', 'fedu', 'fedema')
REMATERIALIZE = ('none', 'elementwise', 'all')  # ever less is kept
ATTENTION = ('plain', 'heads_first', 'cudnn')  # of transformer blocks
AUTO = 'auto'  # chosen by federated/execution.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTraits:
  """What a configuration depends on in an encoder.

  Attributes:
    depth: blocks, of which a stage adds `blocks_per_stage`.
    whole_patches: the patch size must divide the image size.
    equal_blocks: all blocks have the same shapes and are stacked (block_trees.py).
    num_adapters: the first blocks, each of which has a temporary layer behind it while it is the last one.
    norms: the values of --norm that the encoder has; empty: it has no choice. `batch` has statistics of the batch.
  """

  depth: int
  whole_patches: bool = False
  equal_blocks: bool = True
  num_adapters: int = 0
  norms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitTraits(EncoderTraits):
  """A vision transformer: token width, attention heads, MLP expansion."""

  width: int
  num_heads: int
  mlp_ratio: int
  whole_patches: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResnetTraits(EncoderTraits):
  """A residual network of basic units: units in each stage, and the width of the first, which doubles at the others."""

  units: tuple[int, ...] = (2, 2, 2, 2)
  width: int = 64
  depth: int = dataclasses.field(init=False)
  num_adapters: int = dataclasses.field(init=False)
  equal_blocks: bool = False
  norms: tuple[str, ...] = ('batch', 'group')

  def __post_init__(self) -> None:
    object.__setattr__(self, 'depth', len(self.units))
    object.__setattr__(self, 'num_adapters', len(self.units) - 1)

  @property
  def stage_widths(self) -> tuple[int, ...]:
    return tuple(self.width * 2**i for i in range(self.depth))


SIZED_VIT = 'vit'
# vit_tiny: the paper's encoder (arXiv 2401.11647). vit_small: DeiT-S (arXiv 2012.12877). vit_micro: ours, for CPUs and
# tests. The size of `vit` is set by flags; that of vit_tiny stands for it here.
ENCODERS: dict[str, EncoderTraits] = {
  'vit_tiny': VitTraits(width=192, depth=12, num_heads=3, mlp_ratio=4),
  'vit_small': VitTraits(width=384, depth=12, num_heads=6, mlp_ratio=4),
  'vit_micro': VitTraits(width=64, depth=4, num_heads=2, mlp_ratio=4),
  'resnet18': ResnetTraits(),
  SIZED_VIT: VitTraits(width=192, depth=12, num_heads=3, mlp_ratio=4),
}

# How costs are counted (resources/costs.py): as in versions 4 and 1 of the paper, or as executed.
PAPER_CONVENTIONS = ('paper_v4', 'paper_v1')
OWN_CONVENTIONS = ('actual', 'expected')
CONVENTIONS = (*PAPER_CONVENTIONS, *OWN_CONVENTIONS)

TRACKERS = ('tensorboard', 'wandb', 'mlflow', 'none')  # of a run's rows (workdir/trackers.py)
PROTOCOLS = ('knn', 'knn_centered', 'linear', 'finetune')  # of evaluation
# Of evaluation. val: the data set's own validation images; holdout: a fixed fifth of the images that are fitted on.
SPLITS = ('test', 'val', 'holdout')
TRAIN_SPLITS = ('train', 'val')

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
