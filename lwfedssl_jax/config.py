"""The configuration of a run: groups of settings (`config_groups.py`), checks across them, and what follows from them.

Imports no jax.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Unpack

from lwfedssl_jax.config_fields import ConfigFields
from lwfedssl_jax.config_groups import (
  AugmentConfig,
  ClientConfig,
  DataConfig,
  MethodConfig,
  ModelConfig,
  ObjectiveConfig,
  PartitionConfig,
  RunConfig,
)
from lwfedssl_jax.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One pretraining run: every setting that determines its result is a field of one of these groups."""

  model: ModelConfig = ModelConfig()
  objective: ObjectiveConfig = ObjectiveConfig()
  method: MethodConfig = MethodConfig()
  data: DataConfig = DataConfig()
  partition: PartitionConfig = PartitionConfig()
  client: ClientConfig = ClientConfig()
  augment: AugmentConfig = AugmentConfig()
  run: RunConfig = RunConfig()

  def __post_init__(self) -> None:
    model, depth = self.model, self.model.traits.depth
    model.check_image_size(model.image_size, f'--image_size={model.image_size}')
    if depth % self.method.blocks_per_stage:
      raise UsageError(
        f'--blocks_per_stage: expected a divisor of the {depth} blocks of {model.encoder}, '
        f'got {self.method.blocks_per_stage}'
      )
    if self.method.total_rounds % (depth // self.method.blocks_per_stage):
      raise UsageError(
        f'--total_rounds: expected a multiple of the {depth // self.method.blocks_per_stage} layer-wise stages, '
        f'got {self.method.total_rounds}'
      )
    if 0 < self.method.depth_dropout_keep < self.method.blocks_per_stage:
      raise UsageError(
        f'--depth_dropout_keep: expected 0 or at least --blocks_per_stage={self.method.blocks_per_stage}, '
        f'got {self.method.depth_dropout_keep}'
      )
    kept = 'server_optimizer' if self.method.server_optimizer != 'none' else self.client_state_flag
    if self.effective_depth_dropout_keep and kept:
      raise UsageError(f'--depth_dropout_keep: expected 0 with --{kept}, whose state is of the same blocks every round')
    if self.method.warmup_rounds >= self.effective_rounds_per_stage:
      raise UsageError(
        f'--warmup_rounds: expected less than the {self.effective_rounds_per_stage} rounds of a stage, '
        f'got {self.method.warmup_rounds}'
      )
    if self.client.micro_batch_size and self.client.batch_size % self.client.micro_batch_size:
      raise UsageError(
        f'--micro_batch_size: expected a divisor of --batch_size={self.client.batch_size}, '
        f'got {self.client.micro_batch_size}'
      )
    self._check_blocks()
    if self.client.clients_per_round > self.effective_num_clients:
      raise UsageError(
        f'--clients_per_round: expected at most --num_clients={self.effective_num_clients}, '
        f'got {self.client.clients_per_round}'
      )
    if self.client.client_update != 'global' and not self.objective.traits.has_target:
      raise UsageError(
        f'--client_update: expected global with --objective={self.objective.objective}, which has no target branch, '
        f'got {self.client.client_update}'
      )
    held_out = self.data.auxiliary_fraction or self.partition.file
    if self.client.dp_noise_multiplier and not self.method.client_update_clip:
      raise UsageError('--client_update_clip: expected more than 0 with --dp_noise_multiplier, got 0')
    if self.uses_calibration and not self.data.auxiliary_dataset and not held_out:
      raise UsageError('--auxiliary_fraction: expected more than 0 with --server_calibration, got 0')

  def _check_blocks(self) -> None:
    """Raises UsageError for what unlike blocks, or statistics of a batch, do not allow."""
    model = self.model
    if self.method.new_block_init == 'previous' and not model.traits.equal_blocks:
      raise UsageError(f'--new_block_init: expected random for {model.encoder}, whose blocks are unlike, got previous')
    if self.effective_depth_dropout_keep and not model.traits.equal_blocks:
      raise UsageError(
        f'--depth_dropout_keep: expected 0 for {model.encoder}, whose blocks are unlike, '
        f'got {self.method.depth_dropout_keep}'
      )
    pieces = {
      'micro_batch_size': self.client.micro_batch_size % self.client.batch_size,
      'calibration_micro_batch_size': self.method.calibration_micro_batch_size,
    }
    for name, size in pieces.items():
      if size and model.uses_batch_statistics:
        raise UsageError(
          f'--{name}: expected 0 for {model.encoder} with --norm=batch, whose statistics are those of the full batch, '
          f'got {size}; with --norm=group the gradient in pieces is exact'
        )

  @property
  def is_federated(self) -> bool:
    """Whether parameters are exchanged; `centralized` is one client that holds all the data."""
    return self.method.traits.federated

  @property
  def effective_num_clients(self) -> int:
    return self.partition.num_clients if self.is_federated else 1

  @property
  def effective_clients_per_round(self) -> int:
    return self.client.clients_per_round or self.effective_num_clients

  @property
  def effective_rounds_per_stage(self) -> int:
    """Rounds of a layer-wise stage."""
    method = self.method
    shared = method.total_rounds // (self.model.traits.depth // method.blocks_per_stage)
    return shared or method.rounds_per_stage

  @property
  def uses_calibration(self) -> bool:
    chosen = self.method.server_calibration
    return self.method.traits.mechanisms if chosen is None else chosen

  @property
  def effective_depth_dropout_keep(self) -> int:
    """The blocks that a client keeps at most, up to all of them; 0: no depth dropout, as in a method of one stage."""
    return min(self.method.depth_dropout_keep, self.model.traits.depth) if self.method.traits.staged else 0

  @property
  def server_update_clip(self) -> float:
    """The norm to which the server clips updates; 0: none. With privacy noise the clients clip, before the noise."""
    return 0.0 if self.client.dp_noise_multiplier else self.method.client_update_clip

  @property
  def uses_alignment(self) -> bool:
    chosen = self.objective.representation_alignment
    return self.method.traits.mechanisms if chosen is None else chosen

  @property
  def uses_previous_model(self) -> bool:
    """Whether the alignment compares with a client's model of its last round."""
    return self.uses_alignment and self.objective.alignment_kind == 'moon'

  @property
  def client_state_flag(self) -> str:
    """Name of the flag because of which clients keep a state between the rounds of a stage, or empty."""
    return 'client_update' if self.client.client_update != 'global' else 'alignment_kind' * self.uses_previous_model

  @property
  def uses_client_state(self) -> bool:
    return bool(self.client_state_flag)


GROUPS: dict[str, type] = typing.get_type_hints(Config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
  """Returns `config` with the named fields replaced, in any group.

  Raises:
    UsageError: a name is not a field, or the result is not valid.
  """
  left, groups = dict(values), {}
  for group, group_type in GROUPS.items():
    names = {f.name for f in dataclasses.fields(group_type)} & left.keys()
    groups[group] = dataclasses.replace(getattr(config, group), **{n: left.pop(n) for n in names})
  if left:
    raise UsageError(f'config: unknown field {sorted(left)[0]!r}')
  return Config(**groups)


def configure(**values: Unpack[ConfigFields]) -> Config:
  """Returns the default configuration with the named fields set: `configure(dataset='digits', num_clients=4)`.

  Raises:
    UsageError: a name is not a field, or a value is not valid.
  """
  return with_values(Config(), values)


def flatten(config: Config) -> dict[str, Any]:
  """Returns {field: value} over all groups, in declaration order."""
  return {
    field.name: getattr(getattr(config, group), field.name)
    for group, group_type in GROUPS.items()
    for field in dataclasses.fields(group_type)
  }


def from_flat(values: Mapping[str, Any]) -> Config:
  """Inverse of `flatten`; accepts JSON's lists for tuples. Raises UsageError."""
  return with_values(Config(), {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
