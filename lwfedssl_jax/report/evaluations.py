"""Accuracy of the runs' encoders by protocol, beside random weights of the same encoder."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lwfedssl_jax.evaluation import protocols
from lwfedssl_jax.report import tables
from lwfedssl_jax.report.items import Folded, Section, Table
from lwfedssl_jax.report.runs import Group, Stat, show, stat

_DETAILS = ('accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1')


class _Row(NamedTuple):
  """A row of the table, and the stored results in it."""

  name: str
  results: list[dict[str, Any]]

  def measure(self, protocol: str, figure: str) -> Stat | None:
    return stat([one[figure] for found in self.results if _protocol(found) == protocol for one in found['runs']])


def _protocol(result: dict[str, Any]) -> str:
  return str(result['name']).removesuffix(protocols.FROM_SCRATCH)


def _results(group: Group, from_scratch: bool) -> list[dict[str, Any]]:
  return [result for run in group.runs for result in run.evaluations if result['from_scratch'] == from_scratch]


def _scratch_rows(groups: Sequence[Group]) -> list[_Row]:
  """Returns a row for each encoder with random weights; every run of it has the same, so a protocol counts once."""
  found: dict[Any, _Row] = {}
  for group in groups:
    row = found.setdefault(group.config.model, _Row(f'random weights ({group.name})', []))
    known = {result['name'] for result in row.results}
    row.results.extend(
      {result['name']: result for result in _results(group, True) if result['name'] not in known}.values()
    )
  rows = [row for row in found.values() if row.results]
  return rows if len(rows) > 1 else [row._replace(name='random weights') for row in rows]


def evaluations_section(groups: Sequence[Group]) -> Section | None:
  """Returns accuracy by protocol over the runs and their evaluation seeds; None where nothing was evaluated."""
  trained = [_Row(group.name, _results(group, False)) for group in groups]
  rows = trained + _scratch_rows(groups)
  names = list(dict.fromkeys(_protocol(result) for row in rows for result in row.results))
  if not names:
    return None
  shown = [['method', *names]]
  shown += [[row.name, *(show(row.measure(name, 'accuracy')) for name in names)] for row in rows]
  best = {
    (place + 1, column + 1)
    for column, name in enumerate(names)
    for place in tables.best_rows(groups, [row.measure(name, 'accuracy') for row in trained], '{:.3f}', 1, max)
  }
  details = [['method', 'protocol', 'accuracy', 'per class', 'precision', 'recall', 'F1']]
  details += [
    [row.name, name, *(show(row.measure(name, key)) for key in _DETAILS)]
    for row in rows
    for name in names
    if row.measure(name, 'accuracy')
  ]
  several = any(
    sum(len(found['runs']) for found in row.results if _protocol(found) == name) > 1 for row in rows for name in names
  )
  seeds_text = ', mean ± standard deviation over pretraining and evaluation seeds' if several else ''
  return Section(
    'Evaluation',
    f"Test accuracy by protocol{seeds_text}. A linear probe's penalty is chosen on a held-out fifth "
    'of its training labels.',
    [
      Table('Test accuracy', shown, frozenset(best)),
      Folded('Precision, recall and F1', Table('Macro averages', details)),
    ],
  )
