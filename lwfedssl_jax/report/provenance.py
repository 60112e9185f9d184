"""Provenance: settings that differ between runs or from the defaults, machines, versions, commands."""

from collections.abc import Sequence
from typing import Any

from lwfedssl_jax import config as configs
from lwfedssl_jax.report.items import Folded, Section, Table
from lwfedssl_jax.report.runs import FinishedRun, Group, differing_fields, shared_fields, short_names


def _show(value: Any) -> str:
  if isinstance(value, tuple):
    return ', '.join(map(str, value))
  return 'not set' if value in (None, '') else str(value)


def settings_section(groups: Sequence[Group]) -> Section:
  """Returns the settings that differ between runs, the shared ones that are not defaults, and the rest collapsed."""
  runs = [run for group in groups for run in group.runs]
  differing, defaults = differing_fields(runs), configs.flatten(configs.Config())
  shared = shared_fields(runs)
  chosen = {name: value for name, value in shared.items() if value != defaults[name]}
  rows = [['run', *differing, 'sha256']]
  for index, (name, run) in enumerate(zip(short_names([run.workdir for run in runs]), runs)):
    rows.append([name, *(_show(values[index]) for values in differing.values()), run.summary['params_sha256'][:12]])
  rest = [['flag', 'default'], *([name, _show(value)] for name, value in shared.items() if name not in chosen)]
  flags = [
    ['flag', 'value', 'default'],
    *([name, _show(value), _show(defaults[name])] for name, value in chosen.items()),
  ]
  items: list[Table | Folded] = [
    Table('Runs, what differs between them, and the digest of their parameters', rows, is_text=True)
  ]
  if chosen:
    items.append(Table('Shared settings that are not the default', flags, is_text=True))
  items.append(
    Folded(f'{len(rest) - 1} settings at their defaults', Table('Settings at their defaults', rest, is_text=True))
  )
  return Section('Settings', 'Folders, checkpoints and devices do not affect a result and are omitted.', items)


def _facts(run: FinishedRun) -> dict[str, str]:
  """Returns the facts about a run that config.json records."""
  environment = run.environment
  kind = environment.get('device_kind')
  found = {
    'command': environment.get('command'),
    'host': environment.get('host_kind'),
    'devices': kind and f'{environment.get("num_devices", 1)} × {kind}',
    'git revision': environment.get('git_revision'),
    **environment.get('versions', {}),
  }
  return {name: str(value) for name, value in found.items() if value}


def _started(runs: Sequence[FinishedRun]) -> str | None:
  """Returns the start times of the first and the last run, to the minute."""
  times = sorted(run.environment['started'][:16].replace('T', ' ') for run in runs if 'started' in run.environment)
  return None if not times else ' to '.join(dict.fromkeys([times[0], times[-1]])) + ' UTC'


def provenance_section(groups: Sequence[Group], made: dict[str, str]) -> Section:
  """Returns commands, machines and versions of the runs; a fact that differs names its runs.

  Args:
    groups: of the runs.
    made: {fact: value} about the report itself.
  """
  runs = [run for group in groups for run in group.runs]
  names, facts = short_names([run.workdir for run in runs]), [_facts(run) for run in runs]
  rows = [['fact', 'value']]
  if started := _started(runs):
    rows.append(['started', started])
  for fact in dict.fromkeys(fact for found in facts for fact in found):
    values: dict[str, list[str]] = {}
    for name, found in zip(names, facts):
      values.setdefault(found.get(fact, 'not recorded'), []).append(name)
    rows += [[fact, value if len(values) == 1 else f'{value} ({", ".join(where)})'] for value, where in values.items()]
  report = [['fact', 'value'], *([name, value] for name, value in made.items())]
  return Section('Provenance', '', [Table('The runs', rows, is_text=True), Table('This report', report, is_text=True)])
