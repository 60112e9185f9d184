"""The sections of a report, in reading order."""

import os
from collections.abc import Sequence

from lwfedssl_jax.plots.charts import Axes
from lwfedssl_jax.report import clients, curves, embeddings, evaluations, finding, provenance, published, tables
from lwfedssl_jax.report.items import Image, Report, Section, Table
from lwfedssl_jax.report.runs import Group, UnfinishedRun
from lwfedssl_jax.report.tables import Entry
from lwfedssl_jax.resources import costs


def _has_several_seeds(groups: Sequence[Group]) -> bool:
  return any(len(group.runs) > 1 for group in groups)


def _seeds_text(groups: Sequence[Group]) -> str:
  """Describes figures over several seeds; empty if every method has one seed."""
  if not _has_several_seeds(groups):
    return ''
  where = '' if all(len(group.runs) > 1 for group in groups) else ' where a method has several'
  return f' Mean ± standard deviation over seeds{where}.'


def _band_text(groups: Sequence[Group]) -> str:
  return ' The band spans minimum and maximum over seeds.' if _has_several_seeds(groups) else ''


def _reference_text(entries: Sequence[Entry]) -> str:
  has_ratios = any(column.is_ratio for column in tables.columns_with_values(entries))
  return ' ×: reduction factor relative to end_to_end with the same settings.' if has_ratios else ''


def _describe_runs(groups: Sequence[Group]) -> str:
  """Names what all runs have in common."""

  def of(name: str, form: str) -> str:
    return (
      form.format(groups[0].runs[0].summary[name])
      if len({run.summary[name] for group in groups for run in group.runs}) == 1
      else ''
    )

  parts = [
    of('dataset', '{}'),
    of('encoder', '{}'),
    of('objective', '{}'),
    of('num_clients', '{} clients'),
    of('num_rounds', '{} rounds'),
  ]
  return ', '.join(filter(None, parts))


def overview(entries: Sequence[Entry]) -> Section:
  """Returns accuracy against bytes and memory, and one row for each method."""
  groups = [entry.group for entry in entries]
  levels = curves.reference_levels(groups)
  comparison = tables.comparison(entries)
  items = [
    comparison,
    curves.metric(
      'knn_accuracy',
      'Accuracy at the end of each stage against the bytes a client has exchanged by then.' + _band_text(groups),
      groups,
      curves.exchanged_megabytes,
      Axes('MB a client has exchanged, down and up', 'kNN accuracy', log_x=True),
      levels=levels,
      file='accuracy_against_bytes',
    ),
    curves.accuracy_against_memory(entries, levels),
  ]
  best = ' The best value of a column is bold.' if comparison.best else ''
  text = (
    f'{_describe_runs(groups)}. kNN: cosine, k = 200, on the pooled embedding.{_seeds_text(groups)}{best}'
    f'{_reference_text(entries)} Costs in convention "actual": bytes of a client over all rounds, as really '
    'exchanged; memory of the compiled client step; FLOPs of an image over all local epochs, all branches and '
    'both views, a multiply-add counts 2.'
  )
  return Section('Comparison', text, [item for item in items if item])


def training_section(groups: Sequence[Group]) -> Section | None:
  """Returns accuracy over the training, losses and collapse metrics."""
  share, rank, std = 'share of the rounds', 'effective rank', 'embedding std'
  items = [
    curves.metric(
      'knn_accuracy',
      'kNN accuracy at the end of each stage.',
      groups,
      curves.progress,
      Axes(share, 'kNN accuracy'),
      file='accuracy_over_training',
    ),
    curves.metric(
      'loss',
      'Mean client loss of each round, alignment included; losses of different methods are not comparable.',
      groups,
      curves.rounds,
      Axes('round', 'client loss'),
      file='losses',
    ),
    curves.metric(
      'client_divergence',
      "Distance between client models: root mean square distance of a round's uploads from their mean, relative to its "
      'norm, over the parameters that are trained.',
      groups,
      curves.rounds,
      Axes('round', 'relative distance', log_y=True),
    ),
    curves.metric(
      'calibration_loss',
      "Mean loss of the server's calibration.",
      groups,
      curves.rounds,
      Axes('round', 'calibration loss'),
      file='calibration_losses',
    ),
    curves.metric(
      'effective_rank',
      'Effective rank of the embeddings at the end of each stage; 1 is a collapse to a line.',
      groups,
      curves.progress,
      Axes(share, rank),
    ),
    curves.metric(
      'embedding_std',
      'Standard deviation of the normalized embeddings times the root of their width; '
      '1: uniformly distributed, 0: collapsed.',
      groups,
      curves.progress,
      Axes(share, std),
    ),
  ]
  return Section('Training', _band_text(groups).strip(), [item for item in items if item])


def costs_section(entries: Sequence[Entry]) -> Section:
  """Returns memory and FLOPs of each stage, and totals in named conventions."""
  items = [
    curves.per_stage(
      'memory_per_stage', 'peak memory of a client step, MB', entries, lambda stage: stage.peak_memory_bytes / 1e6
    ),
    curves.per_stage(
      'flops_per_stage',
      'MFLOPs per image and local epoch',
      entries,
      lambda stage: stage.flops / stage.local_epochs / 1e6,
    ),
  ]
  rows = [
    [
      'method',
      'communication GB (paper_v4)',
      'GFLOPs (paper_v4)',
      'communication GB (actual)',
      'GFLOPs (actual)',
      'client memory, MB (actual)',
    ]
  ]
  for entry in entries:
    actual, paper = entry.actual, entry.paper
    assert paper.total_flops is not None
    assert actual.total_flops is not None
    rows.append(
      [
        entry.name,
        f'{paper.total_bytes / costs.gb_bytes("paper_v4"):.3f}',
        f'{paper.total_flops / 1e9:.2f}',
        f'{actual.total_bytes / costs.gb_bytes("actual"):.3f}',
        f'{actual.total_flops / 1e9:.2f}',
        f'{tables.memory(entry).mean / 1e6:.0f}',
      ]
    )
  return Section(
    'Costs of a client',
    'Each column is in one named convention; figures of two conventions are not comparable. '
    'paper_v4: GB = 1000 MiB, one view and the online branch, a multiply-add counts 1. actual: GB = 10^9 bytes '
    'really exchanged, all that is executed, a multiply-add counts 2.',
    [*filter(None, items), Table('Costs by convention', rows)],
  )


def data_section(groups: Sequence[Group]) -> Section:
  """Returns who holds what, and what the model sees."""
  run, items = groups[0].runs[0], []
  for name, caption, alternative in (
    ('partition.png', 'Images of each class on each client.', 'Number of images of each class on each client.'),
    (
      'views.png',
      'Training images, each followed by two augmented views.',
      'Training images and their two augmented views.',
    ),
  ):
    path = os.path.join(run.workdir, name)
    if os.path.exists(path):
      items.append(Image(path, caption, alternative))
  return Section('Data', f'Of {groups[0].name}, seed {run.config.run.seed}.', items)


def make_report(groups: Sequence[Group], unfinished: Sequence[UnfinishedRun], made: dict[str, str]) -> Report:
  """Builds a report; compiles client steps for their memory.

  Args:
    groups: at least one.
    unfinished: runs that are omitted.
    made: {fact: value} about the report itself.
  """
  entries = tables.make_entries(groups)
  paper = published.published_section(groups)
  found = [
    overview(entries),
    costs_section(entries),
    evaluations.evaluations_section(groups),
    training_section(groups),
    clients.clients_section(groups),
    embeddings.embeddings_section(groups),
    data_section(groups),
    paper,
    provenance.settings_section(groups),
    provenance.provenance_section(groups, made),
  ]
  datasets = dict.fromkeys(group.dataset for group in groups)
  return Report(
    'Layer-wise federated self-supervised learning: ' + ', '.join(datasets),
    finding.find(entries),
    finding.describe_unfinished(unfinished),
    [section for section in found if section and section.items],
    tables.records(entries),
  )
