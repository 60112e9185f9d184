"""The keywords of `lwfedssl_jax.configure` with their types, for editors and type checkers. Imports no jax."""

import typing


class ConfigFields(typing.TypedDict, total=False):
  """Every field of every group in `config_groups.py`, by name; a test holds names and types equal to the groups'."""

  # ModelConfig
  encoder: str
  vit_width: int
  vit_depth: int
  vit_heads: int
  vit_mlp_ratio: int
  image_size: int
  patch_size: int
  position_init: str
  norm: str
  stem: str
  compute_dtype: str
  # ObjectiveConfig
  objective: str
  temperature: float
  target_decay: float
  representation_alignment: bool | None
  alignment_kind: str
  alignment_weight: float
  # MethodConfig
  method: str
  blocks_per_stage: int
  rounds_per_stage: int
  total_rounds: int
  depth_dropout_keep: int
  warmup_rounds: int
  aggregation: str
  ldawa_fedavg_rounds: int
  trim_fraction: float
  server_optimizer: str
  server_learning_rate: float
  server_momentum: float
  server_epsilon: float
  client_update_clip: float
  client_loss_limit: float
  new_block_init: str
  server_calibration: bool | None
  calibration_epochs: int
  calibration_batch_size: int
  calibration_micro_batch_size: int
  server_memory_budget_mb: float
  calibration_learning_rate: float
  calibration_rematerialize: str
  # DataConfig
  dataset: str
  data_dir: str
  cache_dir: str
  max_train_images: int
  auxiliary_dataset: str
  auxiliary_fraction: float
  # PartitionConfig
  num_clients: int
  partition: str
  dirichlet_beta: float
  shards_per_client: int
  client_size_sigma: float
  # ClientConfig
  clients_per_round: int
  client_dropout: float
  client_chunk: int
  local_epochs: int
  batch_size: int
  micro_batch_size: int
  client_memory_budget_mb: float
  rematerialize: str
  unroll_blocks: bool | None
  attention: str
  learning_rate: float
  weight_decay: float
  client_update: str
  fedu_threshold: float
  fedema_share: float
  proximal_weight: float
  dp_noise_multiplier: float
  dp_delta: float
  block_learning_rate_decay: float
  # AugmentConfig
  crop_area: tuple[float, float]
  flip_probability: float
  jitter_probability: float
  jitter_strength: tuple[float, float, float, float]
  grayscale_probability: float
  blur_probability: tuple[float, float]
  blur_sigma: tuple[float, float]
  blur_kernel_size: int
  solarize_probability: tuple[float, float]
  # RunConfig
  seed: int
  workdir: str
  resume: bool
  stop_after_round: int
  checkpoint_every: int
  keep_checkpoints: int
  tracker: str
  num_devices: int
  device_data_budget_mb: float
  knn_bank_images: int
  knn_test_images: int
