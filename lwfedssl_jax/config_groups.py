"""The groups of settings: every field with its default, help text, choices and range (`options.py`). Imports no jax.

The command line (`experiments/flags.py`), the checks and the saved `config.json` follow from these declarations. Field
names are unique across groups: a flag is a field. Defaults train on scikit-learn's digits in a minute or two on two CPU
cores; the presets paper_v1 and paper_v4 have the paper's values.
"""

import dataclasses

from lwfedssl_jax import catalog
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.options import Validated, option

MOST_PIXELS = 4096  # a side; a typing error beyond it would allocate terabytes
MOST_PIXELS_OF_SMALL_STEM = 64  # a side


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Validated):
  encoder: str = option(
    'vit_micro', 'encoder architecture; vit: a vision transformer of the size of --vit_*', choices=catalog.ENCODERS
  )
  vit_width: int = option(192, 'width of a token with --encoder=vit, a multiple of the heads', at_least=1)
  vit_depth: int = option(12, 'blocks with --encoder=vit', at_least=1)
  vit_heads: int = option(3, 'attention heads with --encoder=vit', at_least=1)
  vit_mlp_ratio: int = option(4, "width of a block's hidden layer with --encoder=vit, in token widths", at_least=1)
  image_size: int = option(
    0, 'side of the square images, pixels; 0: as the data set has them', at_least=0, at_most=MOST_PIXELS
  )
  patch_size: int = option(4, "side of a patch, pixels; a ViT's divides the image size", at_least=1)
  position_init: str = option(
    'random',
    'initial position table, which is learned: normal, standard deviation 0.02; or 2-D sines and cosines',
    choices=('random', 'sincos'),
  )
  norm: str = option(
    'batch',
    "normalization in a ResNet: batch (statistics of the client's own batch; running statistics are exchanged and used "
    'in evaluation) or group (of channels of an image)',
    choices=('batch', 'group'),
  )
  stem: str = option(
    'auto',
    "stem of a ResNet: small, 3x3 and stride 1; large, the paper's 7x7 and stride 2, then a max-pool; auto: small for "
    'images of 64 pixels and less',
    choices=('auto', 'small', 'large'),
  )
  compute_dtype: str = option(
    'float32', 'type of activations and matrix products; parameters stay float32', choices=('float32', 'bfloat16')
  )

  @property
  def traits(self) -> catalog.EncoderTraits:
    if self.encoder != catalog.SIZED_VIT:
      return catalog.ENCODERS[self.encoder]
    return catalog.VitTraits(
      width=self.vit_width, depth=self.vit_depth, num_heads=self.vit_heads, mlp_ratio=self.vit_mlp_ratio
    )

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.vit_width % self.vit_heads:
      raise UsageError(f'--vit_width: expected a multiple of --vit_heads={self.vit_heads}, got {self.vit_width}')
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name.startswith('vit_') and value != field.default and self.encoder != catalog.SIZED_VIT:
        raise UsageError(f'--{field.name}: expected --encoder={catalog.SIZED_VIT} with it, got {self.encoder}')

  @property
  def uses_batch_statistics(self) -> bool:
    """Whether an image's embedding in training depends on the other images of its batch."""
    return self.norm == 'batch' and 'batch' in self.traits.norms

  def has_large_stem(self, image_size: int) -> bool:
    return self.stem == 'large' or (self.stem == 'auto' and image_size > MOST_PIXELS_OF_SMALL_STEM)

  def check_image_size(self, image_size: int, named: str) -> None:
    """Raises UsageError where the encoder takes no images of that side, pixels; the message calls it `named`."""
    if self.traits.whole_patches and image_size % self.patch_size:
      raise UsageError(f'--patch_size: expected a divisor of {named}, got {self.patch_size}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Validated):
  objective: str = option('moco_v3', 'self-supervised objective', choices=catalog.OBJECTIVES)
  temperature: float = option(0.2, 'softmax temperature of the contrastive losses', above=0)
  target_decay: float = option(0.99, 'decay mu of the target branch, per step', at_least=0, at_most=1)
  representation_alignment: bool | None = option(
    None, 'align local projections with those of the global model; unset: on for lw_fedssl'
  )
  alignment_kind: str = option(
    'contrastive',
    "form of the alignment regularizer; moon (MOON) compares with the client's own model of its last round too",
    choices=('contrastive', 'cosine', 'moon'),
  )
  alignment_weight: float = option(1.0, 'weight of the alignment term', at_least=0)

  @property
  def traits(self) -> catalog.ObjectiveTraits:
    return catalog.OBJECTIVES[self.objective]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(Validated):
  method: str = option(
    'lw_fedssl', 'which blocks are trained in which stage, and what is exchanged', choices=catalog.METHODS
  )
  blocks_per_stage: int = option(1, 'encoder blocks added per stage', at_least=1)
  rounds_per_stage: int = option(
    15,
    'rounds of a layer-wise stage; a method with one stage runs as many rounds in all as a '
    'layer-wise one (depth / blocks_per_stage * rounds_per_stage)',
    at_least=1,
  )
  total_rounds: int = option(
    0, 'rounds in all, shared evenly by the layer-wise stages, instead of rounds_per_stage; 0: not set', at_least=0
  )
  depth_dropout_keep: int = option(
    0,
    'depth dropout: blocks that a client keeps at most, those that the stage adds and a random subset of the earlier '
    'ones, drawn per client and round; 0: all blocks. No effect on a method of one stage',
    at_least=0,
  )
  warmup_rounds: int = option(
    0,
    'warm-up: first rounds of every stage but the first in which the new blocks train alone, with norm and heads; no '
    'effect on a method whose clients train nothing else',
    at_least=0,
  )
  aggregation: str = option(
    'mean',
    'aggregation of client updates: mean weighted by images; coordinate-wise median or trimmed mean, '
    'unweighted, which hold all updates of a round in memory; or ldawa, the unweighted mean of the tensors of clients, '
    'each times its cosine to the received one',
    choices=catalog.AGGREGATIONS,
  )
  ldawa_fedavg_rounds: int = option(
    3, 'first rounds of every stage that --aggregation=ldawa aggregates as mean does', at_least=0
  )
  trim_fraction: float = option(
    0.2, 'share of clients trimmed at either end by --aggregation=trimmed_mean', at_least=0, at_most=0.49
  )
  server_optimizer: str = option(
    'none',
    "optimizer of the global parameters, whose gradient is what the clients' aggregation changed: FedAvgM, FedAdam or "
    'FedYogi; none: the aggregation is the new global model',
    choices=catalog.SERVER_OPTIMIZERS,
  )
  server_learning_rate: float = option(
    0.0, 'learning rate of --server_optimizer; 0: 1 for fedavgm, 0.01 for fedadam and fedyogi', at_least=0
  )
  server_momentum: float = option(
    0.9, 'momentum of fedavgm; decay beta_1 of the first moment of fedadam and fedyogi', at_least=0, at_most=0.999
  )
  server_epsilon: float = option(
    1e-3, 'adaptivity tau of fedadam and fedyogi, added to the root of the second moment', above=0
  )
  client_update_clip: float = option(
    0.0, "maximum l2 norm of a client's update; larger ones are clipped; 0: no limit", at_least=0
  )
  client_loss_limit: float = option(
    10.0, 'reject a client whose mean loss exceeds that of the round before by this factor; 0: no limit', at_least=0
  )
  new_block_init: str = option(
    'random', 'initial weights of a new block: random, or a copy of the block below', choices=('random', 'previous')
  )
  server_calibration: bool | None = option(
    None, 'end-to-end training on the server after aggregation; unset: on for lw_fedssl'
  )
  calibration_epochs: int = option(3, 'epochs over the auxiliary images per round', at_least=1)
  calibration_batch_size: int = option(0, 'images per calibration step; 0: batch_size', at_least=0)
  calibration_micro_batch_size: int = option(
    0,
    'images whose activations the server stores at once in a calibration step; the largest divisor of the batch up '
    'to this number is taken; 0: the full batch',
    at_least=0,
  )
  server_memory_budget_mb: float = option(
    0.0,
    'memory budget of a calibration step on the server, megabytes (10^6 bytes): calibration_micro_batch_size is chosen '
    'so that the compiled step fits; 0: no limit',
    at_least=0,
  )
  calibration_learning_rate: float = option(
    0.0, 'base learning rate of calibration per 256 images; 0: learning_rate', at_least=0
  )
  calibration_rematerialize: str = option(
    catalog.AUTO, 'as rematerialize, for calibration', choices=(catalog.AUTO, *catalog.REMATERIALIZE)
  )

  @property
  def traits(self) -> catalog.MethodTraits:
    return catalog.METHODS[self.method]

  @property
  def effective_server_learning_rate(self) -> float:
    return self.server_learning_rate or catalog.SERVER_OPTIMIZERS[self.server_optimizer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Validated):
  dataset: str = option('digits', 'digits, folder:PATH, npz:PATH, tfds:NAME or hf:NAME_OR_PATH')
  data_dir: str = option('', "folder of prepared TFDS data sets; empty: TFDS's default")
  cache_dir: str = option('', "folder of the cache of decoded images; empty: in the user's cache folder")
  max_train_images: int = option(0, 'number of training images to use, drawn by a fixed seed; 0: all', at_least=0)
  auxiliary_dataset: str = option('', "data set of the server's images; empty: held back from the training split")
  auxiliary_fraction: float = option(
    0.1,
    'share of the training images held out for the server, for every method, so that '
    'clients hold the same images under every method',
    at_least=0,
    at_most=0.9,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig(Validated):
  num_clients: int = option(10, 'simulated clients', at_least=1)
  partition: str = option(
    'iid',
    'partition of images over clients: iid; dirichlet (each class over the clients, sizes differ); '
    'dirichlet_clients (class shares of each client, equal sizes); shards (few classes each); folders (a folder per '
    'client, in --dataset=folder:PATH); file:PATH (the partition.json of a run, or one of your own, which decides the '
    "server's images too)",
    choices=('iid', 'dirichlet', 'dirichlet_clients', 'shards', 'folders'),
    open_choice='file:PATH',
  )
  dirichlet_beta: float = option(
    0.5, 'concentration of the Dirichlet partitions; smaller is more heterogeneous', above=0
  )
  shards_per_client: int = option(2, 'label-sorted shards per client with --partition=shards', at_least=1)
  client_size_sigma: float = option(
    0.0, 'log-normal sigma of client sizes with --partition=iid; 0: equal sizes', at_least=0, at_most=3
  )

  @property
  def file(self) -> str:
    """Path of the file that holds the partition, or empty."""
    kind, _, path = self.partition.partition(':')
    return path if kind == 'file' else ''

  @property
  def has_client_folders(self) -> bool:
    return self.partition == 'folders'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientConfig(Validated):
  clients_per_round: int = option(0, 'clients sampled each round; 0: all', at_least=0)
  client_dropout: float = option(0.0, 'probability that a sampled client does not return', at_least=0, at_most=1)
  client_chunk: int = option(
    0,
    "maximum number of clients that a device vmaps; 0: one on CPUs, elsewhere what fits the device's total "
    'memory; the choice is saved in config.json',
    at_least=0,
  )
  local_epochs: int = option(3, "epochs over a client's images per round", at_least=1)
  batch_size: int = option(64, 'images per client step', at_least=2)
  micro_batch_size: int = option(
    0,
    'images whose activations a client stores at once; the gradient is exactly that of the full batch, at the '
    'cost of a second forward pass through the active part; 0: the full batch',
    at_least=0,
  )
  client_memory_budget_mb: float = option(
    0.0,
    'memory budget of a client step, megabytes (10^6 bytes): micro_batch_size, rematerialize and compute_dtype '
    'are chosen so that the compiled step fits; 0: no limit',
    at_least=0,
  )
  rematerialize: str = option(
    catalog.AUTO,
    'activation checkpointing of active blocks: none, elementwise (recompute all but matrix products) or all; auto: '
    'elementwise where several blocks are trained at once, else none',
    choices=(catalog.AUTO, *catalog.REMATERIALIZE),
  )
  unroll_blocks: bool | None = option(
    None,
    'one copy of the program per active block instead of a loop: less memory traffic, longer compilation; unset: on '
    'accelerators, not on CPUs',
  )
  attention: str = option(
    catalog.AUTO,
    'attention of clients and server: plain; heads_first, which computes queries, keys and values as (batch, heads, '
    "tokens, size); or cuDNN's fused kernel; auto: cudnn in bfloat16 on GPUs of compute capability 8.0 and newer, "
    'heads_first on TPUs, else plain',
    choices=(catalog.AUTO, *catalog.ATTENTION),
  )
  learning_rate: float = option(2e-3, 'base learning rate of AdamW per 256 images (times batch_size / 256)', above=0)
  weight_decay: float = option(
    1e-5, 'AdamW weight decay of matrices; biases, norms and positions have none', at_least=0
  )
  client_update: str = option(
    'global',
    "what a client's training starts from: the global model and a copy of it as target branch; or, where the objective "
    'has a target branch, fedu (FedU) or fedema (FedEMA): its target branch of its last round, and the global model '
    'mixed with its own',
    choices=catalog.CLIENT_UPDATES,
  )
  fedu_threshold: float = option(
    0.4, "divergence of a client's last training from which on fedu keeps its own predictor", at_least=0
  )
  fedema_share: float = option(
    0.7, "tau of fedema: the share of its own model in a client's second round of a stage", at_least=0, at_most=1
  )
  proximal_weight: float = option(
    0.0,
    "weight mu of FedProx's term (mu / 2) ||w - w_global||^2 over the parameters that a client trains; 0: none",
    at_least=0,
  )
  dp_noise_multiplier: float = option(
    0.0,
    'standard deviation of the Gaussian noise that a client adds to its clipped update, in units of '
    'client_update_clip; 0: none',
    at_least=0,
  )
  dp_delta: float = option(1e-5, 'delta at which summary.json states the epsilon of --dp_noise_multiplier', above=0)
  block_learning_rate_decay: float = option(
    1.0, 'factor on the learning rate per block below the newest active one', above=0, at_most=1
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig(Validated):
  crop_area: tuple[float, float] = option(
    (0.08, 1.0), 'minimum and maximum share of the area that a crop keeps', above=0, at_most=1
  )
  flip_probability: float = option(0.5, 'probability of a horizontal flip', at_least=0, at_most=1)
  jitter_probability: float = option(0.8, 'probability of color jitter', at_least=0, at_most=1)
  jitter_strength: tuple[float, float, float, float] = option(
    (0.4, 0.4, 0.2, 0.1), 'brightness, contrast, saturation, hue', at_least=0, at_most=1
  )
  grayscale_probability: float = option(0.2, 'probability of conversion to gray', at_least=0, at_most=1)
  blur_probability: tuple[float, float] = option(
    (1.0, 0.1), 'probability of a Gaussian blur, per view', at_least=0, at_most=1
  )
  blur_sigma: tuple[float, float] = option(
    (0.1, 2.0), 'minimum and maximum sigma of the Gaussian blur, pixels of the blurred image', above=0
  )
  blur_kernel_size: int = option(
    0,
    'side of the blur kernel, pixels, odd; 0: the odd number nearest to a tenth of the image side, at least 3',
    at_least=0,
    at_most=MOST_PIXELS,
  )
  solarize_probability: tuple[float, float] = option(
    (0.0, 0.2), 'probability of solarization, per view', at_least=0, at_most=1
  )

  def __post_init__(self) -> None:
    super().__post_init__()
    for name in ('crop_area', 'blur_sigma'):
      low, high = getattr(self, name)
      if low > high:
        raise UsageError(f'--{name}: expected the lower bound first, got {low},{high}')
    if self.blur_kernel_size and self.blur_kernel_size % 2 == 0:
      raise UsageError(f'--blur_kernel_size: expected an odd number or 0, got {self.blur_kernel_size}')
    if self.jitter_strength[3] > 0.5:
      raise UsageError(f'--jitter_strength: expected a hue of at most 0.5, got {self.jitter_strength[3]}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Validated):
  seed: int = option(0, 'seed of every random choice', at_least=0, at_most=2**31 - 1)
  workdir: str = option('', 'folder the run writes to')
  resume: bool = option(False, 'continue from the newest checkpoint in --workdir')
  stop_after_round: int = option(0, 'stop after this many rounds of the run; 0: at its end', at_least=0)
  checkpoint_every: int = option(1, "rounds between checkpoints; a stage's last round is always saved", at_least=1)
  keep_checkpoints: int = option(2, 'number of newest checkpoints to keep', at_least=1)
  tracker: str = option(
    'tensorboard',
    "where a round's metrics go beside metrics.jsonl: the folder tensorboard of the workdir; Weights & Biases or "
    'MLflow, as their environment variables say',
    choices=catalog.TRACKERS,
  )
  num_devices: int = option(0, "devices over which a round's clients are sharded; 0: all", at_least=0)
  device_data_budget_mb: float = option(
    0.0,
    'training images that a device may hold, megabytes (10^6 bytes); beyond it, images stay in files and each '
    "round's are copied one round ahead; 0: no limit",
    at_least=0,
  )
  knn_bank_images: int = option(10_000, 'labeled training images in the bank of the kNN monitor; 0: all', at_least=0)
  knn_test_images: int = option(10_000, 'test images the kNN monitor classifies; 0: all', at_least=0)
