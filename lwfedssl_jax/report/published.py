"""The paper's table of costs, and whether runs have its setting."""

from collections.abc import Sequence
from typing import Any

from lwfedssl_jax import config as configs
from lwfedssl_jax.config import Config
from lwfedssl_jax.report.items import Section, Table
from lwfedssl_jax.report.runs import Group, num_rounds
from lwfedssl_jax.resources import costs

# arXiv 2401.11647 v4, Table 2, MoCo v3 on ViT-Tiny, 180 rounds: GFLOPs, communication GB, peak memory GB.
PUBLISHED = {
  'end_to_end': ('586', '8.40', '8.72'),
  'layerwise': ('139', '1.66', '2.61'),
  'prog_fedssl': ('318', '5.04', '-'),
}
IMAGE_SIZE = 32
_SETTING = configs.configure(
  encoder='vit_tiny',
  image_size=IMAGE_SIZE,
  patch_size=4,
  objective='moco_v3',
  num_clients=10,
  rounds_per_stage=15,
  blocks_per_stage=1,
  local_epochs=3,
  batch_size=512,
)


def _cost_settings(config: Config) -> dict[str, Any]:
  """Returns the settings that determine the costs of the paper's table, besides the method."""
  return {
    'encoder': config.model.encoder,
    'image_size': config.model.image_size,
    'patch_size': config.model.patch_size,
    'objective': config.objective.objective,
    'rounds': num_rounds(config),
    'num_clients': config.effective_num_clients,
    'clients_per_round': config.effective_clients_per_round,
    'client_dropout': config.client.client_dropout,
    'local_epochs': config.client.local_epochs,
    'batch_size': config.client.batch_size,
    'blocks_per_stage': config.method.blocks_per_stage,
    'compute_dtype': config.model.compute_dtype,
  }


def differences(config: Config) -> dict[str, tuple[Any, Any]]:
  """Returns {setting: (value here, value in the paper)} of the differences to the paper's table."""
  return {
    name: (value, _cost_settings(_SETTING)[name])
    for name, value in _cost_settings(config).items()
    if value != _cost_settings(_SETTING)[name]
  }


def _is_published(config: Config) -> bool:
  """Whether the table has the method: without calibration and alignment, as in version 4."""
  return config.method.method in PUBLISHED and not config.uses_calibration and not config.uses_alignment


def published_section(groups: Sequence[Group]) -> Section:
  """Returns the paper's table, this program's count of the same setting, and the runs with that setting."""
  rows = [
    [
      'method',
      'GFLOPs, published',
      'GFLOPs, counted',
      'communication GB, published',
      'communication GB, counted',
      'peak GB, published',
      'run with this setting',
    ]
  ]
  matching = [group for group in groups if _is_published(group.config) and not differences(group.config)]
  for method, (gflops, gigabytes, memory) in PUBLISHED.items():
    cost = costs.method_cost(configs.with_values(_SETTING, {'method': method}), IMAGE_SIZE, 'paper_v4')
    assert cost.total_flops is not None
    found = [group.name for group in matching if group.config.method.method == method]
    rows.append(
      [
        method,
        gflops,
        f'{cost.total_flops / 1e9:.0f}',
        gigabytes,
        f'{cost.total_bytes / costs.gb_bytes("paper_v4"):.2f}',
        memory,
        ', '.join(found) or 'none',
      ]
    )
  text = (
    'arXiv 2401.11647 v4, Table 2: MoCo v3, ViT-Tiny at 32x32, 180 rounds, 10 clients, batch 512. Counted: this '
    'program, same setting, convention paper_v4. The published peak is of a whole GPU process.'
  )
  if matching:
    return Section("The paper's table", text, [Table('Published costs', rows)])
  return Section(
    "The paper's table: another setting",
    f'The setting differs from that of the runs on this page. {_name_differences(groups)} {text}',
    [Table('Published costs, another setting', rows)],
  )


def _name_differences(groups: Sequence[Group]) -> str:
  found = differences(groups[0].config)
  if not found:
    return 'The table has none of their methods.'
  shown = ', '.join(f'{name} {here} instead of {there}' for name, (here, there) in found.items())
  return f'The runs have {shown}.' if len(groups) == 1 else f'{groups[0].name}, for example, has {shown}.'
