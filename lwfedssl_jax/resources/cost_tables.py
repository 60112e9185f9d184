"""The costs of methods as text: totals with their ratios to end-to-end training, and stages."""

from collections.abc import Callable, Sequence

from lwfedssl_jax import tables
from lwfedssl_jax.resources import costs

_OWN_UNITS = 'FLOPs per image, both views and all branches, a multiply-add is 2; peak memory of the compiled step'
_UNITS = {
  'paper_v4': 'GB = 1000 MiB; FLOPs per image, one view (SimCLR and SimSiam: both), online branch, a multiply-add is 1',
  'paper_v1': 'GB = 1000 MiB; encoder blocks only; this convention counts no FLOPs',
  'actual': f'GB = 10^9 bytes, exchanged by this configuration, mean over clients; {_OWN_UNITS}',
  'expected': f'GB = 10^9 bytes, mean over all seeds; {_OWN_UNITS}',
}


def _number(value: float | None, scale: float, digits: int) -> str:
  return '-' if value is None else f'{value / scale:,.{digits}f}'


def _totals(found: Sequence[costs.MethodCost]) -> list[list[str]]:
  """Returns headings, then a row per method; ratios are relative to end to end."""
  reference = next((cost for cost in found if cost.method == 'end_to_end'), None)

  def cells(
    cost: costs.MethodCost, value: Callable[[costs.MethodCost], float | None], scale: float, digits: int
  ) -> list[str]:
    mine, other = value(cost), reference and value(reference)
    return [_number(mine, scale, digits), f'{other / mine:.2f}x' if mine and other else '-']

  has_server = any(cost.server_memory_bytes for cost in found)
  server = ['server memory MB'] * has_server
  rows = [['method', 'communication GB', 'less', 'GFLOPs', 'less', 'peak memory MB', 'less', *server]]
  for cost in found:
    rows.append(
      [
        cost.method,
        *cells(cost, lambda c: c.total_bytes, costs.gb_bytes(cost.convention), 2),
        *cells(cost, lambda c: c.total_flops, 1e9, 1),
        *cells(cost, lambda c: c.peak_memory_bytes, 1e6, 1),
        *[_number(cost.server_memory_bytes, 1e6, 1)] * has_server,
      ]
    )
  return rows


def _stage_rows(found: Sequence[costs.MethodCost]) -> list[list[str]]:
  """Returns headings, then a row per stage."""
  rows = [
    [
      'method',
      'stage',
      'rounds',
      'trained',
      *(f'down {part}' for part in costs.PARTS),
      *(f'up {part}' for part in costs.PARTS),
      'GFLOPs',
      'peak MB',
    ]
  ]
  for cost in found:
    for stage in cost.stages:
      figures = [
        str(stage.num_rounds),
        f'{stage.stop - stage.start} of {stage.stop}',
        *(f'{stage.download_bytes[part] / 1e6:,.2f}' for part in costs.PARTS),
        *(f'{stage.upload_bytes[part] / 1e6:,.2f}' for part in costs.PARTS),
        _number(stage.flops, 1e9, 2),
        _number(stage.peak_memory_bytes, 1e6, 1),
      ]
      rows.append([cost.method, str(stage.stage + 1), *figures])
  return rows


def to_text(found: Sequence[costs.MethodCost]) -> str:
  """Returns the costs as two tables, totals and stages, below the convention's name and units."""
  convention = found[0].convention
  return '\n'.join(
    [
      f'convention {convention}: {_UNITS[convention]}',
      '',
      tables.markdown(_totals(found)),
      '',
      'per stage, all its rounds, MB (10^6 bytes) and GFLOPs',
      '',
      tables.markdown(_stage_rows(found)),
      '',
    ]
  )
