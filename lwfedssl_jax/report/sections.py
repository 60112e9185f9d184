"""What a report says: sections of figures, tables and pictures, made from groups of runs; no markup here."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax.report import charts
from lwfedssl_jax.report.charts import Series
from lwfedssl_jax.report.runs import Group, differing_fields, mean_and_spread
from lwfedssl_jax.resources import costs

SCATTER_POINTS = 400


class Table(NamedTuple):
  """Headings first."""

  rows: list[list[str]]


class Chart(NamedTuple):
  """A figure of matplotlib, its caption, a text that says what it shows, and its numbers."""

  name: str
  figure: Any
  caption: str
  alternative: str
  table: Table | None = None


class Picture(NamedTuple):
  """A PNG that a run wrote."""

  path: str
  caption: str
  alternative: str


class Section(NamedTuple):
  """A heading, a paragraph, and what follows."""

  title: str
  text: str
  items: list[Any]


# arXiv 2401.11647 v4, Table 2, MoCo v3 on ViT-Tiny, 180 rounds: GFLOPs, communication GB, peak memory GB.
PUBLISHED = {'end_to_end': ('586', '8.40', '8.72'), 'layerwise': ('139', '1.66', '2.61'),
             'prog_fedssl': ('318', '5.04', '-')}
_PUBLISHED_SETTING = {
    'encoder': 'vit_tiny', 'image_size': 32, 'patch_size': 4, 'objective': 'moco_v3', 'num_clients': 10,
    'clients_per_round': 0, 'client_dropout': 0.0, 'rounds_per_stage': 15, 'blocks_per_stage': 1, 'local_epochs': 3,
    'compute_dtype': 'float32', 'server_calibration': None, 'representation_alignment': None}


def _shown(pair: tuple[float, float] | None, digits: int = 3, scale: float = 1) -> str:
  if pair is None:
    return 'no labels'
  mean, spread = pair
  return f'{mean / scale:.{digits}f}' + (f' ± {spread / scale:.{digits}f}' if spread else '')


def _over_seeds(group: Group, value: Any) -> tuple[float, float] | None:
  return mean_and_spread([value(run) for run in group.runs])


def _megabytes(run: Any) -> np.ndarray:
  return np.cumsum([row['download_bytes'] + row['upload_bytes'] for row in run.rows]) / 1e6


def _measured(group: Group, name: str, x_of: Any) -> Series | None:
  """A series over the rows in which `name` was measured: mean over seeds, least and greatest as the band."""
  picked = [[index for index, row in enumerate(run.rows) if row.get(name) is not None] for run in group.runs]
  if not picked[0] or any(found != picked[0] for found in picked):
    return None
  x = np.mean([x_of(run)[picked[0]] for run in group.runs], axis=0)
  y = np.array([[run.rows[index][name] for index in picked[0]] for run in group.runs])
  band = (y.min(0), y.max(0)) if len(y) > 1 else (None, None)
  return Series(group.name, x, y.mean(0), *band)


def _series_table(series: Sequence[Series], x_label: str) -> Table:
  rows = [['', x_label, 'value', 'least', 'greatest']]
  for one in series:
    for index in range(len(one.x)):
      edges = ['-', '-'] if one.low is None else [f'{one.low[index]:.4g}', f'{one.high[index]:.4g}']
      rows.append([one.label, f'{one.x[index]:.4g}', f'{one.y[index]:.4g}', *edges])
  return Table(rows)


def _ends(series: Sequence[Series], unit: str = '') -> str:
  return '; '.join(f'{one.label} ends at {one.y[-1]:.3g}{unit}' for one in series)


def _line(name: str, groups: Sequence[Group], metric: str, x_of: Any, x_label: str, y_label: str, caption: str,
          **options: Any) -> Chart | None:
  # A group looks alike on the whole page, whichever groups a chart leaves out.
  series = [found._replace(style=place) for place, group in enumerate(groups)
            if (found := _measured(group, metric, x_of)) is not None]
  if not series:
    return None
  return Chart(name, charts.line_chart(series, x_label, y_label, **options), caption,
               f'{y_label} against {x_label}. {_ends(series)}.', _series_table(series, x_label))


def _rounds(run: Any) -> np.ndarray:
  return np.array([row['round'] + 1 for row in run.rows])


def _blocks(run: Any) -> np.ndarray:
  """Share of the training that is over: stages differ between methods, rounds do not."""
  return _rounds(run) / len(run.rows)


class Costs(NamedTuple):
  """Costs of each group: of its runs as they are (`actual`), and the same configuration in the paper's convention."""

  actual: list[costs.MethodCost]
  paper: list[costs.MethodCost]


def count_costs(groups: Sequence[Group]) -> Costs:
  """Compiles a client's step of every group and stage shape; seconds each unless the compilation cache has it."""
  count = lambda group, convention: costs.method_cost(group.config, group.config.model.image_size, convention)
  return Costs([count(group, 'actual') for group in groups], [count(group, 'paper_v4') for group in groups])


def overview(groups: Sequence[Group], counted: Costs) -> Section:
  """The picture to remember, and one row a group."""
  first = groups[0].runs[0].summary
  levels = {title: first[name] for name, title in (
      ('random_init_knn_accuracy', 'random weights'), ('raw_pixel_knn_accuracy', 'raw pixels'))
            if first[name] is not None}
  items = [_line(
      'accuracy_against_bytes', groups, 'knn_accuracy', _megabytes,
      'megabytes a client has exchanged, down and up (actual)', 'kNN accuracy',
      'Accuracy at the end of each stage against what a client has sent and received by then; the band is the least '
      'and greatest seed.', log_x=True, levels=levels)]
  memory = [Series(group.name, [cost.peak_memory_bytes / 1e6], [final[0]], [min(values)], [max(values)])
            for group, cost in zip(groups, counted.actual)
            for values in [[run.summary['final_knn_accuracy'] for run in group.runs]]
            if (final := mean_and_spread(values)) is not None]
  if memory:
    items.append(Chart(
        'accuracy_against_memory',
        charts.line_chart(memory, 'peak memory of a client step, MB (actual, compiled)', 'kNN accuracy', log_x=True,
                          levels=levels, lines=False),
        'Final accuracy against the peak memory of a client\'s step in its most demanding stage.',
        'Final kNN accuracy against client memory: ' + '; '.join(
            f'{one.label} {one.y[0]:.3f} at {one.x[0]:.0f} MB' for one in memory) + '.',
        _series_table(memory, 'MB')))
  rows = [['method', 'seeds', 'kNN accuracy', 'random weights', 'raw pixels', 'down MB', 'up MB', 'peak client MB',
           'GFLOPs an image', 'seconds']]
  for group, cost in zip(groups, counted.actual):
    of = lambda name, digits=3, scale=1.0, group=group: _shown(
        _over_seeds(group, lambda run: run.summary[name]), digits, scale)
    rows.append([
        group.name, str(len(group.runs)), of('final_knn_accuracy'), of('random_init_knn_accuracy'),
        of('raw_pixel_knn_accuracy'), of('download_bytes', 1, 1e6), of('upload_bytes', 1, 1e6),
        f'{cost.peak_memory_bytes / 1e6:.0f}', f'{cost.total_flops / 1e9:.3g}', of('seconds', 0)])
  text = (f'{first["dataset"]}, {first["encoder"]}, {first["objective"]}, {first["num_clients"]} clients, '
          f'{first["num_rounds"]} rounds. kNN: cosine, k = 200, on the pooled embedding. Mean ± standard deviation '
          'over seeds. Bytes are per client, all rounds, as really exchanged; memory is of the compiled step; GFLOPs '
          'are per image over all local epochs, all branches and both views, a multiply-add counting 2 ("actual").')
  return Section('Comparison', text, [*filter(None, items), Table(rows)])


def evaluations_section(groups: Sequence[Group]) -> Section | None:
  """Protocols as columns: accuracy, mean over runs and their evaluation seeds."""
  names = list(dict.fromkeys(found['name'] for group in groups for run in group.runs for found in run.evaluations))
  if not names:
    return None
  rows = [['method', *names]]
  details = [['method', 'protocol', 'accuracy', 'per class', 'precision', 'recall', 'F1']]
  for group in groups:
    cells = []
    for name in names:
      found = [entry for run in group.runs for result in run.evaluations if result['name'] == name
               for entry in result['runs']]
      cells.append(_shown(mean_and_spread([entry['accuracy'] for entry in found])) if found else '-')
      if found:
        details.append([group.name, name, *(_shown(mean_and_spread([entry[key] for entry in found])) for key in (
            'accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1'))])
    rows.append([group.name, *cells])
  return Section(
      'Evaluation', 'Test accuracy by protocol, mean ± standard deviation over pretraining seeds and evaluation seeds. '
      'A linear probe\'s penalty is chosen on a held-out fifth of its training labels.', [Table(rows), Table(details)])


def training_section(groups: Sequence[Group]) -> Section:
  """Accuracy over the training, losses, collapse monitors."""
  items = [
      _line('accuracy_over_training', groups, 'knn_accuracy', _blocks, 'share of the rounds', 'kNN accuracy',
            'kNN accuracy at the end of each stage.'),
      _line('losses', groups, 'loss', _rounds, 'round', 'client loss',
            'Mean client loss of each round, alignment included; losses of different methods are not comparable.'),
      _line('calibration_losses', groups, 'calibration_loss', _rounds, 'round', 'calibration loss',
            'Mean loss of the server\'s calibration.'),
      _line('effective_rank', groups, 'effective_rank', _blocks, 'share of the rounds', 'effective rank',
            'Effective rank of the embeddings at the end of each stage: 1 is a collapse to a line.'),
      _line('embedding_std', groups, 'embedding_std', _blocks, 'share of the rounds', 'spread of embeddings',
            'Deviation of the normalised embeddings times the root of their width: near 1 spread evenly, 0 collapsed.')]
  return Section('Training', '', [item for item in items if item])


def costs_section(groups: Sequence[Group], counted: Costs) -> Section:
  """Memory and operations per stage; totals in named conventions beside the published ones."""
  memory, operations = [], []
  for group, cost in zip(groups, counted.actual):
    ends = np.cumsum([stage.num_rounds for stage in cost.stages])
    starts = ends - [stage.num_rounds for stage in cost.stages]
    step = lambda values, starts=starts, ends=ends: (
        np.stack([starts, ends], 1).ravel(), np.repeat(np.asarray(values, float), 2))
    memory.append(Series(group.name, *step([stage.peak_memory_bytes / 1e6 for stage in cost.stages])))
    operations.append(Series(group.name, *step([stage.flops / stage.local_epochs / 1e6 for stage in cost.stages])))
  items = []
  for name, series, label in (('memory_per_stage', memory, 'peak memory of a client step, MB'),
                              ('flops_per_stage', operations, 'MFLOPs an image and local epoch')):
    items.append(Chart(name, charts.line_chart(series, 'rounds', label, log_y=True),
                       f'{label[0].upper()}{label[1:]}, over the rounds (convention "actual").',
                       f'{label} over rounds. {_ends(series)}.', _series_table(series, 'rounds')))
  rows = [['method', 'communication GB (paper_v4)', 'GFLOPs (paper_v4)', 'communication GB (actual)',
           'GFLOPs (actual)', 'peak client MB (actual)']]
  for group, paper, actual in zip(groups, counted.paper, counted.actual):
    rows.append([group.name, f'{paper.total_bytes / costs.gb_bytes("paper_v4"):.3f}',
                 f'{paper.total_flops / 1e9:.2f}', f'{actual.total_bytes / costs.gb_bytes("actual"):.3f}',
                 f'{actual.total_flops / 1e9:.2f}', f'{actual.peak_memory_bytes / 1e6:.0f}'])
  return Section(
      'What a client pays', 'Each column is in one named convention; figures of two are not comparable. '
      'paper_v4: GB = 1000 MiB, one view and the online branch, a multiply-add counts 1. actual: GB = 10^9 bytes '
      'really exchanged, all that is executed, a multiply-add counts 2.', [*items, Table(rows)])


def published_section() -> Section:
  """The paper's table beside what this program counts for the paper's setting."""
  rows = [['method', 'GFLOPs, published', 'here', 'communication GB, published', 'here', 'peak GB, published']]
  for method, (gflops, gigabytes, memory) in PUBLISHED.items():
    config = configs.with_values(configs.Config(), {**_PUBLISHED_SETTING, 'method': method})
    cost = costs.method_cost(config, 32, 'paper_v4')
    rows.append([method, gflops, f'{cost.total_flops / 1e9:.0f}', gigabytes,
                 f'{cost.total_bytes / costs.gb_bytes("paper_v4"):.2f}', memory])
  return Section(
      'The paper\'s table',
      'arXiv 2401.11647 v4, Table 2: MoCo v3, ViT-Tiny at 32x32, 180 rounds, 10 clients, batch 512; "here" is this '
      'program\'s count of the same setting in convention paper_v4. The published peak is of a whole GPU process; '
      'experiments.resources gives the compiled step\'s.', [Table(rows)])


def embeddings_section(groups: Sequence[Group]) -> Section | None:
  """First seed of each group in two dimensions: PCA and t-SNE, and random weights once."""
  from sklearn import decomposition, manifold

  items = []
  for index, group in enumerate(groups):
    path = group.runs[0].embeddings_path
    if not os.path.exists(path):
      continue
    with np.load(path, allow_pickle=False) as archive:
      labels = archive['labels'][:SCATTER_POINTS]
      sets = [(group.name, archive['trained'][:SCATTER_POINTS])]
      if index == 0:
        sets.insert(0, ('random weights', archive['random'][:SCATTER_POINTS]))
    names = [str(number) for number in range(labels.max() + 1)] if labels.max() < 10 else []
    for name, rows in sets:
      if len(rows) < 10:
        continue
      projections = {
          'PCA': decomposition.PCA(2, random_state=0).fit_transform(rows),
          't-SNE': manifold.TSNE(2, perplexity=min(30, len(rows) / 4), init='pca', random_state=0).fit_transform(rows)}
      for kind, points in projections.items():
        file_name = f'embeddings_{name}_{kind}'.replace(' ', '_').lower()
        items.append(Chart(
            file_name, charts.scatter_by_class(points, labels, names, f'{name}, {kind}'),
            f'{name}: {len(rows)} test images by {kind}.',
            f'Embeddings of {len(rows)} test images of {name} in two dimensions by {kind}; each mark is the sign of '
            'its class.'))
  if not items:
    return None
  return Section('Embeddings', 'Test images in two dimensions, each drawn as the sign of its class; first seed.', items)


def data_section(groups: Sequence[Group]) -> Section:
  """Who holds what, and what the model sees."""
  run, items = groups[0].runs[0], []
  for name, caption, alternative in (
      ('partition.png', 'Images of each class on each client.', 'Number of images of each class on each client.'),
      ('views.png', 'Training images, each followed by two augmented views.', 'Training images beside their two '
       'augmented views.')):
    path = os.path.join(run.workdir, name)
    if os.path.exists(path):
      items.append(Picture(path, caption, alternative))
  return Section('Data', f'Of the first run, seed {run.config.run.seed}.', items)


def configs_section(groups: Sequence[Group]) -> Section:
  """What differs between the runs, and where each came from."""
  runs = [run for group in groups for run in group.runs]
  differing = differing_fields(runs)
  rows = [['run', *differing, 'revision', 'device', 'jax', 'sha256 of parameters']]
  for index, run in enumerate(runs):
    environment = run.environment
    rows.append([
        run.workdir, *(str(values[index]) for values in differing.values()),
        str(environment.get('git_revision') or '-')[:7], str(environment.get('device_kind')),
        str(environment.get('versions', {}).get('jax')), run.summary['params_sha256'][:12]])
  flat = configs.flatten(runs[0].config)
  shared = [['flag', 'value'], *([name, str(value)] for name, value in flat.items() if name not in differing)]
  text = 'What differs between the runs; below it, what they share.'
  return Section('Configurations', text, [Table(rows), Table(shared)])


def all_sections(groups: Sequence[Group]) -> list[Section]:
  """Everything, in reading order."""
  counted = count_costs(groups)
  found = [overview(groups, counted), evaluations_section(groups), costs_section(groups, counted), published_section(),
           training_section(groups), embeddings_section(groups), data_section(groups), configs_section(groups)]
  return [section for section in found if section is not None and section.items]
