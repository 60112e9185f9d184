"""Charts: distinguishable without color, values on their marks, well-formed SVG."""

from xml.etree import ElementTree

import numpy as np
import pytest

from lwfedssl_jax.plots import charts, svg

NAMES = charts.Axes('rounds', 'loss')


def chart(*series, **options):
  return charts.line_chart([charts.Series(*one) for one in series], NAMES, **options)


def looks(plot):
  return [
    (line.get_color(), line.get_linestyle(), line.get_marker())
    for line in plot.figure.axes[0].lines
    if line.get_alpha() != 0
  ]


def test_series_differ_in_more_than_color():
  found = looks(chart(*((str(index), [1, 2], [1, 2]) for index in range(8))))
  assert len({look[1:] for look in found}) == len({look[0] for look in found}) == 8


def test_a_series_keeps_its_look_in_a_chart_that_leaves_others_out():
  every = looks(chart(*((name, [1, 2], [1, 2]) for name in 'abc')))
  assert looks(chart(('c', [1, 2], [1, 2], None, None, 2))) == every[2:] != every[:1]


@pytest.mark.parametrize('count', [3, 40])  # beyond 30 points a line has no marks to be seen
def test_marks_have_their_values_as_titles(count):
  x, y = np.arange(count), np.arange(count) / 2
  text = svg.to_svg(chart(('a < b & c', x, y), ('b', [1], [7.0], [6.0], [8.5])), 'name')
  root = ElementTree.fromstring(text)
  titles = [(mark.tag, title.text) for mark in root.iter() for title in mark.findall('title')]
  assert titles == [
    *(('use', f'a < b & c: loss {value:.4g}; rounds {index}') for index, value in enumerate(y)),
    ('g', 'b: loss 7 (6 to 8.5); rounds 1'),
  ]  # of the only mark, or of all


def test_class_marks_have_names_as_titles():
  points, labels = np.random.default_rng(0).normal(size=(20, 2)), np.array([0, 1, -1, 2] * 5)
  root = ElementTree.fromstring(svg.to_svg(charts.scatter_by_class(points, labels, ['x', 'cat', 'dog']), 'name'))
  assert sorted(title.text for title in root.iter('title')) == ['class cat', 'class dog', 'class x', 'no label']
  assert len(list(root.iter('use'))) == 20


def test_identifiers_of_two_charts_differ():
  one, other = (svg.to_svg(chart(('a', [1, 2], [3, 4])), name) for name in ('one', 'other'))

  def identifiers(text):
    return {element.get('id') for element in ElementTree.fromstring(text).iter()} - {None}

  assert identifiers(one) and not identifiers(one) & identifiers(other)


@pytest.mark.parametrize(('values', 'scale'), [([1.0, 90.0], 'log'), ([40.0, 79.0], 'linear'), ([0.0, 9.0], 'linear')])
def test_an_axis_is_logarithmic_where_that_shows_more(values, scale):
  plot = charts.line_chart([charts.Series('a', [1, 2], values)], NAMES._replace(log_y=True))
  assert plot.figure.axes[0].get_yscale() == scale


def test_logarithmic_ticks_are_plain_numbers_and_at_least_three():
  for low, high in ((36, 90), (3, 20), (6, 172), (1, 5000)):
    axes = charts.line_chart([charts.Series('a', [1, 2], [low, high])], NAMES._replace(log_y=True)).figure.axes[0]
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator()() if bottom <= tick <= top]
    shown = [axes.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(shown) >= 3
    assert all(text.replace(',', '').isdigit() for text in shown), shown


def test_long_names_are_broken():
  plot = chart((', '.join(f'flag_{index}=0.001' for index in range(6)), [1, 2], [3, 4]))
  assert all(
    len(line) <= charts.LEGEND_CHARACTERS
    for text in plot.figure.legends[0].get_texts()
    for line in text.get_text().splitlines()
  )
  long = charts.line_chart([charts.Series('a', [1], [2])], charts.Axes('x', 'peak memory of a client step, MB'))
  assert max(map(len, long.figure.axes[0].get_ylabel().splitlines())) <= charts.Y_LABEL_CHARACTERS
