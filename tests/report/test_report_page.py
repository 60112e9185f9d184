"""The page stands alone, is accessible, and says in words what its figures show."""

import json
import os
import pathlib
import re
from urllib.parse import unquote

import pytest
from report_runs import Page, add_embeddings, fake_costs, write_run

from lwfedssl_jax import UsageError
from lwfedssl_jax.plots import charts
from lwfedssl_jax.report import files, page
from lwfedssl_jax.report.items import Table


def test_nothing_is_loaded_from_anywhere(report):
  folder, _, text = report
  parsed = Page(text)
  assert not parsed.all('script') and not parsed.all('iframe') and not parsed.all('object')
  loaded = [
    value
    for _, attributes in parsed.found
    for name, value in attributes.items()
    if name in ('src', 'xlink:href', 'srcset', 'data', 'poster', 'action')
  ]
  loaded += [attributes['href'] for tag, attributes in parsed.found if 'href' in attributes and tag != 'a']
  assert loaded
  assert all(value.startswith(('data:', '#')) for value in loaded), set(loaded)
  assert not re.search(r'@import|url\((?!#)', text)
  beside = {attributes['href'] for attributes in parsed.all('a') if not attributes['href'].startswith('#')}
  assert beside == {'report.csv', 'report.json'}
  assert all((folder / unquote(name)).exists() for name in beside)


def test_links_lead_to_sections(report):
  parsed = Page(report[2])
  targets = {attributes['href'][1:] for attributes in parsed.all('a') if attributes['href'].startswith('#')}
  assert targets == {attributes['id'] for attributes in parsed.all('h2')}
  assert len(targets) >= 9


def test_headings_landmarks_and_tables_are_those_of_a_document(report):
  parsed = Page(report[2])
  headings = [tag for tag, _ in parsed.found if re.fullmatch('h[1-6]', tag)]
  assert headings[0] == 'h1' and set(headings[1:]) == {'h2'}
  assert parsed.all('html')[0]['lang'] == 'en'
  assert all(len(parsed.all(tag)) == 1 for tag in ('header', 'nav', 'main', 'footer'))
  assert {attributes.get('scope') for attributes in parsed.all('th')} == {'col', 'row'}
  assert len(parsed.all('table')) == len(parsed.all('caption')) == len(parsed.all('thead')) > 5
  regions = [attributes for attributes in parsed.all('div') if attributes.get('class') == 'scroll']
  assert len(regions) == len(parsed.all('table'))  # each scrolls by itself, by keyboard too
  assert all(one['tabindex'] == '0' and one['role'] == 'region' and one['aria-label'] for one in regions)


def test_every_figure_has_a_text_alternative(report):
  parsed = Page(report[2])
  figures, images = parsed.all('figure'), parsed.all('img')
  described = [attributes for attributes in parsed.all('div') if attributes.get('role') == 'img']
  assert len(figures) == len(images) + len(described) >= 8
  assert all(len(attributes['aria-label']) > 40 for attributes in described)
  assert all(attributes.get('aria-hidden') == 'true' for attributes in parsed.all('svg'))
  alternatives = ' '.join(attributes['aria-label'] for attributes in described)
  assert 'layerwise ends at 0.6' in alternatives and 'layerwise + calibration ends at 0.8' in alternatives


def test_identifiers_and_their_uses_agree(report):
  parsed = Page(report[2])
  identifiers = [attributes['id'] for _, attributes in parsed.found if 'id' in attributes]
  assert len(identifiers) == len(set(identifiers))
  used = set(re.findall(r' (?:href|clip-path)="(?:url\()?#([^")]+)', report[2]))
  assert used and used <= set(identifiers)


def test_the_finding_opens_the_page_and_unfinished_runs_are_named(report):
  opening = Page(report[2]).text('header')[0]
  assert report[1]['finding'] in opening
  assert 'Omitted, not finished: d0 (round 2 of 2).' in opening


def luminance(color):
  channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_and_series_have_contrast_in_both_schemes(report, scheme):
  found = {}
  for condition, variables in re.findall(r'(@media [^{]*\{\s*)?:root \{([^}]*)\}', report[2]):
    if not condition or (scheme == 'dark' and 'dark' in condition):
      found |= dict(re.findall(r'(--\w+): (#\w+)', variables))

  def expand(color):
    return color if len(color) == 7 else '#' + ''.join(2 * c for c in color[1:])

  colors = {name: expand(color) for name, color in found.items()}
  assert set(colors) >= {'--ink', '--muted', '--paper', *(f'--c{index}' for index in range(8))}
  assert (luminance(colors['--paper']) > 0.5) == (scheme == 'light')
  for name, color in colors.items():
    if name not in ('--paper', '--rule', '--soft'):
      assert contrast(color, colors['--paper']) >= 4.5, (name, color)


def test_charts_take_the_reader_s_colors(report):
  charts_only = ''.join(re.findall(r'<svg.*?</svg>', report[2], re.DOTALL))
  assert '@media print' in report[2] and 'width=device-width' in report[2]
  assert 'currentColor' in charts_only and 'var(--c0)' in charts_only and 'var(--muted)' in charts_only
  assert not any(color in charts_only for color in (charts.INK, charts.MUTED, *charts.COLORS))
  assert '<style' not in charts_only  # it would hold for the whole page
  # Black text would vanish in the dark.
  assert not re.search(r'<text[^>]*(?:fill: ?#000|style="(?![^"]*fill)[^"]*")', charts_only)


def test_chart_text_is_readable_on_a_phone(report):
  pixels, measured = 390 - 2 * 16, 0  # without the page's padding
  for svg in re.findall(r'<svg.*?</svg>', report[2], re.DOTALL):
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(size) for size in re.findall(r'font(?:-size)?: ([\d.]+)px', svg)]
    assert len(sizes) == svg.count('<text')
    assert all(size * pixels / width >= 12 for size in sizes), sizes
    measured += len(sizes)
  assert measured > 50


def test_names_from_outside_are_escaped(tmp_path, monkeypatch):
  fake_costs(monkeypatch, {'layerwise': 40})
  folder = write_run(
    tmp_path / '<script>alert(1)</script>',
    method='layerwise',
    environment={'command': '<script>', 'git_revision': '"><script>'},
  )
  result = files.write_report([folder], str(tmp_path / 'out'))
  text = pathlib.Path(result['html']).read_text(encoding='utf-8')
  assert '<script' not in text
  assert '&lt;script&gt;' in text and '&quot;&gt;&lt;script&gt;' in text


def test_markdown_and_its_figures_are_written_beside_it(report):
  folder, _, _ = report
  text = (folder / 'report.md').read_text(encoding='utf-8')
  images = re.findall(r'!\[([^\]]+)\]\(([^)]+)\)', text)
  assert len(images) >= 8
  for alternative, name in images:
    assert len(alternative) > 20
    assert os.path.getsize(folder / name) > 3000
  assert text.splitlines()[2] == report[1]['finding']
  assert '| **0.800**' in text and '0.600 ± 0.141' in text


def test_best_cells_are_bold_and_no_others():
  table = Table('x', [['method', 'a', 'b'], ['m', '1', '2'], ['n', '3', '4']], frozenset({(1, 2), (2, 1)}))
  assert Page(page._table(table)).text('strong') == ['2', '3']


def test_json_has_the_rows_of_the_csv(report):
  folder, _, _ = report
  rows = json.loads((folder / 'report.json').read_text())
  lines = (folder / 'report.csv').read_text().splitlines()
  assert lines[0].split(',') == list(rows[0])
  for row, line in zip(rows, lines[1:], strict=True):
    row['seeds'] = ' '.join(map(str, row['seeds']))
    assert line.split(',') == ['' if value is None else str(value) for value in row.values()]


def test_runs_without_labels_have_a_page(tmp_path, monkeypatch):
  fake_costs(monkeypatch, {'centralized': 90})
  folder = write_run(tmp_path / 'a', method='centralized', accuracy=None)
  add_embeddings(tmp_path / 'a', ())
  result = files.write_report([folder], str(tmp_path / 'out'))
  parsed = Page(pathlib.Path(result['html']).read_text(encoding='utf-8'))
  assert 'no labels, so no accuracy' in parsed.text('header')[0]
  assert 'Embeddings' in parsed.text('h2') and not parsed.all('ul')
  assert parsed.text('title')[0].endswith('digits') and 'no label' in parsed.text('title')
  assert json.loads((tmp_path / 'out' / 'report.json').read_text())[0]['peak_memory_bytes'] == 90e6


def test_unfinished_run_is_named(tmp_path):
  with pytest.raises(UsageError, match='--workdirs: expected a finished run'):
    files.write_report([str(tmp_path)], str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()
