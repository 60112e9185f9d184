"""A report as one self-contained HTML page: styles, plots and images are embedded."""

import base64
import html
import importlib.resources
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lwfedssl_jax.plots import charts
from lwfedssl_jax.plots.svg import to_svg
from lwfedssl_jax.report.items import Chart, Folded, Image, Key, Report, Section, Table

SMALL_FIGURES = 6  # from this many consecutive figures on, they are smaller


def _style() -> str:
  def colors(values):
    return ' '.join(f'--c{index}: {color};' for index, color in enumerate(values))

  sheet = importlib.resources.files('lwfedssl_jax.report').joinpath('style.css').read_text(encoding='utf-8')
  return (
    f':root {{ {colors(charts.COLORS)} }}\n'
    f'@media (prefers-color-scheme: dark) {{ :root {{ {colors(charts.DARK_COLORS)} }} }}\n{sheet}'
  )


def _cells(table: Table, number: int) -> str:
  cells = [html.escape(cell) for cell in table.rows[number]]
  if number == 0:
    return ''.join(f'<th scope="col">{cell}</th>' for cell in cells)
  marked = [f'<strong>{cell}</strong>' if (number, column) in table.best else cell for column, cell in enumerate(cells)]
  return f'<th scope="row">{marked[0]}</th>' + ''.join(f'<td>{cell}</td>' for cell in marked[1:])


def _table(table: Table) -> str:
  head, *body = [f'<tr>{_cells(table, number)}</tr>' for number in range(len(table.rows))]
  caption = html.escape(table.caption)
  kind = ' class="text"' if table.is_text else ''
  return (
    f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table{kind}>'
    f'<caption>{caption}</caption><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'
  )


def _folded(folded: Folded) -> str:
  return f'<details><summary>{html.escape(folded.summary)}</summary>{_table(folded.table)}</details>'


def _chart(chart: Chart) -> str:
  numbers = '' if chart.table is None else _folded(Folded('The figures', chart.table))
  return (
    f'<figure><div role="img" aria-label="{html.escape(chart.alternative)}">{to_svg(chart.plot, chart.name)}'
    f'</div><figcaption>{html.escape(chart.caption)}{numbers}</figcaption></figure>'
  )


def _image(image: Image) -> str:
  with open(image.path, 'rb') as file:
    data = base64.b64encode(file.read()).decode('ascii')
  return (
    f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(image.alternative)}">'
    f'<figcaption>{html.escape(image.caption)}</figcaption></figure>'
  )


def _key(key: Key) -> str:
  def format_name(sign, name):
    return html.escape(f'class {name}' if name == sign else name)

  entries = ''.join(
    f'<li><b style="color: var(--c{color})">{html.escape(sign)}</b> {format_name(sign, name)}</li>'
    for sign, color, name in key.entries
  )
  return f'<ul class="key" aria-label="Signs of the classes">{entries}</ul>'


_RENDER: dict[type, Callable[[Any], str]] = {Table: _table, Folded: _folded, Chart: _chart, Image: _image, Key: _key}


def _items(items: Sequence[Any]) -> str:
  """Returns items as HTML; consecutive figures form a grid."""
  parts = []
  for are_figures, run in itertools.groupby(items, lambda item: isinstance(item, (Chart, Image))):
    rendered = [_RENDER[type(item)](item) for item in run]
    small = ' small' if len(rendered) >= SMALL_FIGURES else ''
    parts.append(f'<div class="figures{small}">{"".join(rendered)}</div>' if are_figures else ''.join(rendered))
  return ''.join(parts)


def _anchor(title: str) -> str:
  return ''.join(c if c.isalnum() else '-' for c in title.lower())


def _section(section: Section) -> str:
  text = f'<p>{html.escape(section.text)}</p>' if section.text else ''
  return (
    f'<section aria-labelledby="{_anchor(section.title)}"><h2 id="{_anchor(section.title)}">'
    f'{html.escape(section.title)}</h2>{text}{_items(section.items)}</section>\n'
  )


def to_html(report: Report, files: Sequence[str]) -> str:
  """Returns the page.

  Args:
    report: its content.
    files: names of files beside the page that hold its rows; they are linked.
  """
  title = html.escape(report.title)
  links = ''.join(f'<a href="#{_anchor(name)}">{html.escape(name)}</a>' for name, *_ in report.sections)
  notes = ''.join(f'<p>{html.escape(note)}</p>' for note in report.notes)
  rows = ', '.join(f'<a href="{html.escape(name)}">{html.escape(name)}</a>' for name in files)
  sections = ''.join(map(_section, report.sections))
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    f'<title>{title}</title><style>{_style()}</style></head>\n<body><header><h1>{title}</h1>'
    f'<p class="finding">{html.escape(report.finding)}</p>{notes}'
    f'<nav aria-label="Sections">{links}</nav></header>\n<main>{sections}</main>\n'
    f'<footer>The rows of the comparison are in {rows}. Hover over a mark of a chart for its value.'
    '</footer></body></html>\n'
  )
