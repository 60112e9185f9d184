"""The finding of a report: one sentence from the figures of its runs."""

from collections.abc import Callable, Sequence
from typing import Any

from lwfedssl_jax.report.runs import Stat, UnfinishedRun, over_seeds, seeds_text, short_names, show
from lwfedssl_jax.report.tables import Entry, accuracy, exchanged, memory


def _megabytes(found: Stat) -> str:
  return f'{found.mean / 1e6:.0f} MB'


def _costs(entry: Entry) -> str:
  traffic = exchanged(entry)
  exchanges = '' if traffic is None else f' and exchanges {_megabytes(traffic)}'
  return f'{entry.name} needs {_megabytes(memory(entry))} of client memory{exchanges}'


def _pick(entries: Sequence[Entry], rank: Callable[[Entry], Any]) -> tuple[Entry, Entry | None]:
  """Returns the federated method of the highest rank other than end_to_end, and the one to compare it with.

  The latter is its end-to-end counterpart with the same settings, or else the next in rank.
  """
  candidates = [
    entry
    for entry in entries
    if entry.group.config.is_federated and (entry.reference is None or entry.reference.group is not entry.group)
  ]
  lead = max(candidates or entries, key=rank)
  others = [entry for entry in entries if entry is not lead]
  counterpart = [entry for entry in others if lead.reference and lead.reference.group is entry.group]
  return lead, counterpart[0] if counterpart else max(others, key=rank, default=None)


def _rank(entry: Entry) -> tuple[float, float]:
  found = accuracy(entry)
  assert found is not None
  return round(found.mean, 3), -memory(entry).mean


def _sentence(entries: Sequence[Entry]) -> str:
  measured = [entry for entry in entries if accuracy(entry) is not None]
  if not measured:
    compared = filter(None, _pick(entries, lambda entry: -memory(entry).mean))
    return '; '.join(map(_costs, compared)) + ' (no labels, so no accuracy).'
  lead, other = _pick(measured, _rank)
  text = f'{lead.name} reaches {show(accuracy(lead))} with {_megabytes(memory(lead))} of client memory'
  if other is not None:
    text += f', {other.name} {show(accuracy(other))} with {_megabytes(memory(other))}'
  else:
    random = over_seeds(lead.group, lambda run: run.summary['random_init_knn_accuracy'])
    text += f', random weights {show(random)}'
  return f'{text} (kNN accuracy, {seeds_text([entry.group for entry in (lead, other) if entry])}).'


def find(entries: Sequence[Entry]) -> str:
  """Returns a sentence per dataset: which method reaches which accuracy with how much client memory.

  Without labels it compares memory and bytes; a single method is compared with random weights.
  """
  datasets = list(dict.fromkeys(entry.group.dataset for entry in entries))
  sentences = [_sentence([entry for entry in entries if entry.group.dataset == dataset]) for dataset in datasets]
  if len(datasets) == 1:
    return sentences[0]
  return ' '.join(f'{dataset}: {sentence}' for dataset, sentence in zip(datasets, sentences))


def describe_unfinished(unfinished: Sequence[UnfinishedRun]) -> list[str]:
  """Returns a note that names the runs that the report omits."""
  if not unfinished:
    return []
  names = short_names([run.workdir for run in unfinished])
  runs = ', '.join(f'{name} (round {run.rounds_done} of {run.num_rounds})' for name, run in zip(names, unfinished))
  return [f'Omitted, not finished: {runs}.']
