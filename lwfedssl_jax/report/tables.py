"""The comparison of methods: columns as data, ratios to end-to-end training, best values per column."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lwfedssl_jax.report.items import Table
from lwfedssl_jax.report.runs import Group, Stat, end_to_end_settings, is_end_to_end, over_seeds, show, stat
from lwfedssl_jax.resources import costs


class Entry(NamedTuple):
  """A group and the costs of a client.

  Attributes:
    group: runs of one configuration.
    actual: cost of its first run, convention `actual`.
    paper: cost of the same configuration in the paper's convention.
    reference: the group's end-to-end counterpart with the same settings, if it exists; itself for that one.
  """

  group: Group
  actual: costs.MethodCost
  paper: costs.MethodCost
  reference: 'Entry | None' = None

  @property
  def name(self) -> str:
    return self.group.name


class Column(NamedTuple):
  """A column of the comparison.

  Attributes:
    key: its name in report.csv and report.json, which hold base units.
    heading: its name on the page.
    value: figure of an entry over its seeds; None if it has none.
    form: format of a figure.
    scale: base units per unit of the page.
    choose: `max` or `min`, whichever is best; None if no value is best.
  """

  key: str
  heading: str
  value: Callable[[Entry], Stat | None]
  form: str
  scale: float = 1
  choose: Callable[..., float] | None = None

  @property
  def is_ratio(self) -> bool:
    return self.key.endswith('_ratio')


def make_entries(groups: Sequence[Group]) -> list[Entry]:
  """Counts the costs of each group; compiles a client step for every stage shape, seconds each."""

  def count(group, convention):
    return costs.method_cost(group.config, group.config.model.image_size, convention)

  entries = [Entry(group, count(group, 'actual'), count(group, 'paper_v4')) for group in groups]
  references = {
    end_to_end_settings(entry.group.config): entry for entry in entries if is_end_to_end(entry.group.config)
  }
  return [entry._replace(reference=references.get(end_to_end_settings(entry.group.config))) for entry in entries]


def _summary(name: str) -> Callable[[Entry], Stat | None]:
  return lambda entry: over_seeds(entry.group, lambda run: run.summary[name])


def _exchanged(*names: str) -> Callable[[Entry], Stat | None]:
  """Bytes of a client; None for a run without exchange."""
  return lambda entry: over_seeds(
    entry.group, lambda run: sum(run.summary[name] for name in names) if run.config.is_federated else None
  )


def memory(entry: Entry) -> Stat:
  """Peak memory of a client step, bytes."""
  found = stat([entry.actual.peak_memory_bytes])
  assert found is not None
  return found


def _flops(entry: Entry) -> Stat | None:
  return stat([entry.actual.total_flops])


accuracy, exchanged = _summary('final_knn_accuracy'), _exchanged('download_bytes', 'upload_bytes')


def _ratio(value: Callable[[Entry], Stat | None]) -> Callable[[Entry], Stat | None]:
  """How many times less an entry needs than its reference."""

  def ratio(entry: Entry) -> Stat | None:
    own, other = value(entry), entry.reference and value(entry.reference)
    return None if own is None or other is None else stat([other.mean / own.mean])

  return ratio


COLUMNS = (
  Column('knn_accuracy', 'kNN accuracy', accuracy, '{:.3f}', choose=max),
  Column('random_init_knn_accuracy', 'random weights', _summary('random_init_knn_accuracy'), '{:.3f}'),
  Column('raw_pixel_knn_accuracy', 'raw pixels', _summary('raw_pixel_knn_accuracy'), '{:.3f}'),
  Column('download_bytes', 'down, MB', _exchanged('download_bytes'), '{:.1f}', 1e6, min),
  Column('upload_bytes', 'up, MB', _exchanged('upload_bytes'), '{:.1f}', 1e6, min),
  Column('peak_memory_bytes', 'client memory, MB', memory, '{:.0f}', 1e6, min),
  Column('flops_per_image', 'GFLOPs per image', _flops, '{:.3g}', 1e9, min),
  Column('memory_ratio', '×\u00a0less memory', _ratio(memory), '{:.2f}', choose=max),
  Column('bytes_ratio', '×\u00a0fewer bytes', _ratio(exchanged), '{:.2f}', choose=max),
  Column('flops_ratio', '×\u00a0fewer FLOPs', _ratio(_flops), '{:.2f}', choose=max),
  Column('seconds', 'seconds', _summary('seconds'), '{:.0f}'),
)


def columns_with_values(entries: Sequence[Entry]) -> list[Column]:
  """Returns the columns with figures; ratios need a reference other than the entry itself."""
  compared = [entry for entry in entries if entry.reference and entry.reference.group is not entry.group]
  return [
    column for column in COLUMNS if any(column.value(entry) for entry in (compared if column.is_ratio else entries))
  ]


def best_rows(
  groups: Sequence[Group], stats: Sequence[Stat | None], form: str, scale: float, choose: Callable[..., Any] | None
) -> set[int]:
  """Returns the rows with the best figure, ties as displayed included; none if all are equal.

  Args:
    groups: of the rows; groups on different data are not compared.
    stats: of the rows.
    form: as in `Column`.
    scale: as in `Column`.
    choose: as in `Column`.
  """
  found: set[int] = set()
  for dataset in {group.dataset for group in groups}:
    means = {
      index: value.mean
      for index, (group, value) in enumerate(zip(groups, stats))
      if value is not None and group.dataset == dataset
    }
    shown = {index: form.format(mean / scale) for index, mean in means.items()}
    if choose is not None and len(set(shown.values())) > 1:
      best = choose(means, key=means.__getitem__)
      found |= {index for index, text in shown.items() if text == shown[best]}
  return found


def comparison(entries: Sequence[Entry]) -> Table:
  """Returns the main table: one row per entry."""
  columns, groups = columns_with_values(entries), [entry.group for entry in entries]
  several = any(len(group.runs) > 1 for group in groups)
  rows = [
    ['method', 'seeds' if several else 'seed'],
    *([entry.name, ', '.join(map(str, entry.group.seeds))] for entry in entries),
  ]
  best = set()
  for column in columns:
    stats = [column.value(entry) for entry in entries]
    missing = 'no labels' if column.key.endswith('accuracy') else '-'
    best |= {(row + 1, len(rows[0])) for row in best_rows(groups, stats, column.form, column.scale, column.choose)}
    for row, cell in zip(rows, [column.heading, *(show(s, column.form, column.scale, missing) for s in stats)]):
      row.append(cell)
  return Table('Methods', rows, frozenset(best))


def records(entries: Sequence[Entry]) -> list[dict[str, Any]]:
  """Returns the main table as numbers in base units: means, and deviations where there are several seeds."""
  found: list[dict[str, Any]] = [
    {'method': entry.name, 'dataset': entry.group.dataset, 'seeds': entry.group.seeds} for entry in entries
  ]
  for column in columns_with_values(entries):
    stats = [column.value(entry) for entry in entries]
    several = any(value and value.std is not None for value in stats)
    for record, value in zip(found, stats):
      record[column.key] = value and value.mean
      if several:
        record[f'{column.key}_std'] = value and value.std
  return found
