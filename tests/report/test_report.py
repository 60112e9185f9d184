"""The report's page stands alone and says in words what its figures show."""

import html.parser
import os
import pathlib
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from lwfedssl_jax import UsageError, run_log
from lwfedssl_jax import config as configs
from lwfedssl_jax.report import charts, page, runs

MONITORED = {'knn_accuracy': 0.5, 'random_knn_accuracy': 0.2, 'effective_rank': 5.0, 'embedding_std': 0.8}


def write_run(folder, seed=0, accuracy=0.6, **values):
  """A finished run as training leaves it, two rounds of two stages, by hand."""
  config = configs.with_values(configs.Config(), {
      'dataset': 'digits', 'image_size': 8, 'patch_size': 4, 'batch_size': 4, 'num_clients': 2, 'rounds_per_stage': 1,
      'blocks_per_stage': 2, 'seed': seed, 'workdir': str(folder), **values})
  os.makedirs(folder)
  run_log.write_json(os.path.join(folder, run_log.CONFIG), {
      'format': run_log.FORMAT, 'config': configs.flatten(config), 'git_revision': 'abcdef0123', 'device_kind': 'cpu',
      'versions': {'jax': '0.10'}})
  rows = [{'round': index, 'stage': index, 'loss': 3.0 - index, 'download_bytes': 1e6, 'upload_bytes': 2e6,
           **MONITORED, 'knn_accuracy': accuracy - 0.1 * (1 - index)} for index in range(2)]
  (folder / run_log.METRICS).write_text(''.join(run_log.json.dumps(row) + '\n' for row in rows))
  run_log.write_json(os.path.join(folder, run_log.SUMMARY), {
      'method': config.method.method, 'objective': 'moco_v3', 'encoder': 'vit_micro', 'dataset': 'digits', 'seed': seed,
      'num_clients': 2, 'num_rounds': 2, 'final_knn_accuracy': accuracy, 'random_init_knn_accuracy': 0.2,
      'raw_pixel_knn_accuracy': 0.9, 'download_bytes': 2e6, 'upload_bytes': 4e6, 'seconds': 10.0,
      'params_sha256': f'{seed:064d}'})
  generator = np.random.default_rng(seed)
  labels = np.arange(40) % 3
  run_log.write_arrays(str(folder / 'embeddings.npz'), {
      'trained': generator.normal(size=(40, 8)) + labels[:, None], 'random': generator.normal(size=(40, 8)),
      'labels': labels})
  evaluation = {'name': 'linear, digits, 10 % of labels', 'runs': [
      {'seed': 0, 'accuracy': accuracy, 'mean_per_class_accuracy': 0.5, 'macro_precision': 0.5, 'macro_recall': 0.5,
       'macro_f1': 0.5}]}
  os.makedirs(folder / 'evaluations')
  run_log.write_json(str(folder / 'evaluations' / 'linear.json'), evaluation)
  return str(folder)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  root = tmp_path_factory.mktemp('report')
  folders = [
      write_run(root / 'runs' / 'a0', method='layerwise', accuracy=0.5),
      write_run(root / 'runs' / 'a1', method='layerwise', accuracy=0.7, seed=1),
      write_run(root / 'runs' / 'b0', method='layerwise', server_calibration=True, accuracy=0.8),
      write_run(root / 'runs' / 'c0', method='end_to_end', accuracy=0.75),
  ]
  result = page.write_report(runs.expand([str(root / 'runs')]), str(root / 'out <&> "x"'))
  return folders, result, pathlib.Path(result['html']).read_text(encoding='utf-8')


class Page(html.parser.HTMLParser):
  """Collects tags with their attributes."""

  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))

  def all(self, tag):
    return [attributes for name, attributes in self.found if name == tag]


def test_nothing_is_loaded_from_anywhere(report):
  text = report[2]
  parsed = Page(text)
  assert not parsed.all('script') and not parsed.all('iframe') and not parsed.all('object')
  references = [value for _, attributes in parsed.found for name, value in attributes.items()
                if name in ('src', 'href', 'xlink:href', 'srcset', 'data', 'poster', 'action')]
  assert references
  assert all(value.startswith(('data:', '#')) for value in references), set(references)
  assert not re.search(r'@import|url\((?!#)', text)


def test_every_figure_has_a_text_alternative(report):
  parsed = Page(report[2])
  figures, images = parsed.all('figure'), parsed.all('img')
  described = [attributes for attributes in parsed.all('div') if attributes.get('role') == 'img']
  assert len(figures) == len(images) + len(described) >= 8
  assert all(len(attributes['aria-label']) > 40 for attributes in described)
  assert all(len(attributes['alt']) > 20 for attributes in images)
  assert all(attributes.get('aria-hidden') == 'true' for attributes in parsed.all('svg'))
  alternatives = ' '.join(attributes['aria-label'] for attributes in described)
  assert 'layerwise ends at 0.6' in alternatives and 'layerwise + calibration ends at 0.8' in alternatives


def test_identifiers_and_their_uses_agree(report):
  parsed = Page(report[2])
  identifiers = [attributes['id'] for _, attributes in parsed.found if 'id' in attributes]
  assert len(identifiers) == len(set(identifiers))
  used = set(re.findall(r'(?:xlink:href|clip-path)="(?:url\()?#([^")]+)', report[2]))
  assert used and used <= set(identifiers)


def test_seeds_are_put_together_and_methods_told_apart(report):
  table = report[1]['table']
  assert report[1]['groups'] == 3
  line = next(line for line in table.splitlines() if line.startswith('| layerwise  '))
  cells = [cell.strip() for cell in line.split('|')]
  assert cells[2:4] == ['2', '0.600 ± 0.141']
  assert any(line.startswith('| layerwise + calibration') for line in table.splitlines())


def test_page_takes_the_reader_s_colours(report):
  text = report[2]
  assert 'prefers-color-scheme: dark' in text and '@media print' in text and 'width=device-width' in text
  assert 'currentColor' in text and 'var(--c0)' in text
  assert charts.INK not in text
  assert not re.search(r'<text[^>]*(?:fill: ?#000|style="(?![^"]*fill)[^"]*")', text)  # black would vanish in the dark
  for colour in charts.COLOURS:
    assert f'stroke: {colour}' not in text


def test_names_from_outside_are_escaped(tmp_path):
  folder = write_run(tmp_path / '<script>alert(1)</script>', method='layerwise')
  result = page.write_report([folder], str(tmp_path / 'out'))
  assert '<script' not in pathlib.Path(result['html']).read_text(encoding='utf-8')


def test_markdown_and_its_figures_lie_beside_it(report):
  folder = os.path.dirname(report[1]['html'])
  text = pathlib.Path(folder, 'report.md').read_text(encoding='utf-8')
  pictures = re.findall(r'!\[([^\]]+)\]\(([^)]+)\)', text)
  assert len(pictures) >= 8
  for alternative, name in pictures:
    assert len(alternative) > 20
    assert os.path.getsize(os.path.join(folder, name)) > 3000
  assert '586' in text and '8.40' in text and 'paper_v4' in text


def test_series_differ_in_more_than_colour():
  series = [charts.Series(str(index), [1, 2], [1, 2]) for index in range(8)]
  lines = charts.line_chart(series, 'x', 'y').axes[0].lines
  assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 8


def test_a_series_keeps_its_look_in_a_chart_that_leaves_others_out():
  looks = lambda series: [
      (line.get_color(), line.get_marker()) for line in charts.line_chart(series, 'x', 'y').axes[0].lines]
  every = [charts.Series(name, [1, 2], [1, 2]) for name in 'abc']
  assert looks([every[2]._replace(style=2)]) == looks(every)[2:] != looks(every)[:1]


def test_charts_are_well_formed_xml():
  svg = charts.to_svg(charts.line_chart([charts.Series('a < b & c', [1, 10], [1, 2])], 'x', 'y', log_x=True), 3)
  xml.etree.ElementTree.fromstring(svg.replace('xlink:href', 'href'))


def test_groups_of_one_method_are_named_by_what_differs(tmp_path):
  folders = [write_run(tmp_path / name, method='layerwise', learning_rate=rate, temperature=temperature)
             for name, rate, temperature in (('a', 1e-3, 0.1), ('b', 2e-3, 0.1))]
  groups = runs.group([runs.read_run(folder) for folder in folders])
  assert [group.name for group in groups] == ['layerwise, learning_rate=0.001', 'layerwise, learning_rate=0.002']


def test_unfinished_run_is_named(tmp_path):
  with pytest.raises(UsageError, match='--workdirs: expected a finished run'):
    page.write_report(runs.expand([str(tmp_path)]), str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()
