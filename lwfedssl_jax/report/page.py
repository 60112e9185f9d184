"""Sections as report.html, one self-contained file, and as report.md with PNG figures."""

import base64
import html
import os
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax import tables
from lwfedssl_jax.report import charts, sections
from lwfedssl_jax.report.runs import group, read_run
from lwfedssl_jax.report.sections import Chart, Picture, Section, Table

_STYLE = '''
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --rule: #ccc; --soft: #f4f4f2;
  --c0: #0072b2; --c1: #c24e00; --c2: #00805c; --c3: #b3588f; --c4: #a86f00;
  --c5: #2a86c0; --c6: #6a6a6a; --c7: #857500; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #161616; --rule: #444; --soft: #222;
  --c0: #56b4e9; --c1: #ff8c42; --c2: #2fd3a0; --c3: #e5a3cb; --c4: #f0b93a;
  --c5: #8fd0f5; --c6: #a5a5a5; --c7: #d8c93a; } }
@media print { :root { --ink: #000; --paper: #fff; } details { display: none; } figure, table { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0 1rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding-bottom: .6rem; border-bottom: 1px solid var(--rule); }
a { color: inherit; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
figure { margin: 0; } figure svg, figure img { width: 100%; height: auto; max-width: 40rem; }
figure img { background: #fff; } figcaption { font-size: .9rem; max-width: 40rem; }
svg text { font-family: system-ui, sans-serif !important; }
details { font-size: .85rem; margin: .3rem 0; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { background: var(--soft); white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
'''


def _table(table: Table) -> str:
  row = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells) + '</tr>'
  heading, *rest = table.rows
  body = ''.join(row(cells, 'td') for cells in rest)
  head = row(heading, 'th').replace('<th>', '<th scope="col">')
  return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _chart(chart: Chart, number: int) -> str:
  numbers = '' if chart.table is None else f'<details><summary>The figures</summary>{_table(chart.table)}</details>'
  return (f'<figure><div role="img" aria-label="{html.escape(chart.alternative, quote=True)}">'
          f'{charts.to_svg(chart.figure, number)}</div><figcaption>{html.escape(chart.caption)}{numbers}</figcaption>'
          '</figure>')


def _picture(picture: Picture) -> str:
  with open(picture.path, 'rb') as file:
    data = base64.b64encode(file.read()).decode('ascii')
  return (f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(picture.alternative, quote=True)}">'
          f'<figcaption>{html.escape(picture.caption)}</figcaption></figure>')


def _anchor(title: str) -> str:
  return ''.join(c if c.isalnum() else '-' for c in title.lower())


def _section(section: Section, first_number: int) -> str:
  figures, others = [], []
  for offset, item in enumerate(section.items):
    if isinstance(item, Table):
      others.append(_table(item))
    else:
      figures.append(_chart(item, first_number + offset) if isinstance(item, Chart) else _picture(item))
  small = ' small' if len(figures) > 5 else ''
  grid = f'<div class="figures{small}">{"".join(figures)}</div>' if figures else ''
  text = f'<p>{html.escape(section.text)}</p>' if section.text else ''
  return (f'<section id="{_anchor(section.title)}"><h2>{html.escape(section.title)}</h2>{text}{grid}'
          f'{"".join(others)}</section>')


def to_html(title: str, found: Sequence[Section]) -> str:
  """Returns a page that loads nothing from anywhere; it closes the sections' figures."""
  links = ''.join(f'<a href="#{_anchor(section.title)}">{html.escape(section.title)}</a>' for section in found)
  body, number = [], 0
  for section in found:
    body.append(_section(section, number))
    number += len(section.items)
  return ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
          '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
          f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>'
          f'<nav aria-label="Sections">{links}</nav><main>{"".join(body)}</main></body></html>\n')


def write_markdown(title: str, found: Sequence[Section], output: str) -> None:
  """Writes report.md; the figures it shows are PNG files beside it, written here too."""
  lines = [f'# {title}', '']
  for section in found:
    lines += [f'## {section.title}', '']
    if section.text:
      lines += [section.text, '']
    for item in section.items:
      if isinstance(item, Table):
        lines += [tables.markdown(item.rows), '']
        continue
      if isinstance(item, Chart):
        name = f'{item.name}.png'
        charts.write_png(item.figure, os.path.join(output, name))
      else:
        name = os.path.basename(item.path)
        with open(item.path, 'rb') as source, open(os.path.join(output, name), 'wb') as target:
          target.write(source.read())
      lines += [f'![{item.alternative}]({name})', '', item.caption, '']
  with open(os.path.join(output, 'report.md'), 'w', encoding='utf-8') as file:
    file.write('\n'.join(lines))


def write_report(workdirs: Sequence[str], output: str) -> dict[str, Any]:
  """Writes report.html, report.md and its figures into a folder.

  Args:
    workdirs: of finished runs; those that differ in their seed alone are put together.
    output: the folder.

  Returns:
    `table`, the comparison as Markdown; `html`, the page's path; `groups`, the number of configurations.

  Raises:
    UsageError: a workdir holds no finished run.
  """
  groups = group([read_run(workdir) for workdir in workdirs])
  found = sections.all_sections(groups)
  os.makedirs(output, exist_ok=True)
  title = 'Layer-wise federated self-supervised learning: ' + ', '.join(
      dict.fromkeys(run.summary['dataset'] for one in groups for run in one.runs))
  write_markdown(title, found, output)
  path = os.path.join(output, 'report.html')
  with open(path, 'w', encoding='utf-8') as file:
    file.write(to_html(title, found))
  table = next(item for item in found[0].items if isinstance(item, Table))
  return {'table': tables.markdown(table.rows), 'html': path, 'groups': len(groups)}
