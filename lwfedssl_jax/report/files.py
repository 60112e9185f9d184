"""Reads runs and writes the report's files: HTML page, Markdown with PNG figures, rows as CSV and JSON."""

import csv
import datetime
import os
import shutil
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax import tables
from lwfedssl_jax.plots import charts
from lwfedssl_jax.report import page, runs, sections
from lwfedssl_jax.report.items import Chart, Folded, Key, Report, Table
from lwfedssl_jax.version import __version__
from lwfedssl_jax.workdir import run_dir

CSV, JSON = 'report.csv', 'report.json'


def _markdown_table(table: Table) -> str:
  rows = [
    [f'**{cell}**' if (row, column) in table.best else cell for column, cell in enumerate(cells)]
    for row, cells in enumerate(table.rows)
  ]
  return tables.markdown(rows)


def _markdown_item(item: Any, output: str) -> list[str]:
  """Returns the lines of an item; writes its PNG file."""
  if isinstance(item, Table):
    return [_markdown_table(item)]
  if isinstance(item, Folded):
    return ['<details>', f'<summary>{item.summary}</summary>', '', _markdown_table(item.table), '', '</details>']
  if isinstance(item, Key):
    return [
      'Signs of the classes: '
      + ', '.join(f'{sign} {name}' if sign != name else sign for sign, _, name in item.entries)
      + '.'
    ]
  if isinstance(item, Chart):
    name = f'{item.name}.png'
    charts.write_png(item.plot, os.path.join(output, name))
  else:
    name = os.path.basename(item.path)
    shutil.copyfile(item.path, os.path.join(output, name))
  return [f'![{item.alternative}]({name})', '', item.caption]


def write_markdown(report: Report, output: str) -> None:
  """Writes report.md and its PNG files into a folder."""
  lines = [f'# {report.title}', '', report.finding, '']
  for note in report.notes:
    lines += [note, '']
  for section in report.sections:
    lines += [f'## {section.title}', '', *([section.text, ''] if section.text else [])]
    for item in section.items:
      lines += [*_markdown_item(item, output), '']
  with open(os.path.join(output, 'report.md'), 'w', encoding='utf-8') as file:
    file.write('\n'.join(lines))


def write_rows(records: Sequence[dict[str, Any]], output: str) -> None:
  """Writes report.csv (no value: an empty cell; seeds joined by spaces) and report.json (null; a list)."""
  run_dir.write_json(os.path.join(output, JSON), list(records))
  with open(os.path.join(output, CSV), 'w', encoding='utf-8', newline='') as file:
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(record | {'seeds': ' '.join(map(str, record['seeds']))} for record in records)


def write_report(folders: Sequence[str], output: str, command: str = '') -> dict[str, Any]:
  """Writes report.html, report.md with its figures, report.csv and report.json into a folder.

  Args:
    folders: of finished runs, or of such folders; runs that differ in their seed alone are put together.
    output: the folder; made where it is missing.
    command: which the page is to name as its origin.

  Returns:
    `table`, the comparison as Markdown; `html`, the page's path; `finding`, its first sentence; `groups`, the number of
    configurations.

  Raises:
    UsageError: a folder holds no finished run.
  """
  workdirs, unfinished = runs.find(folders)
  groups = runs.group([runs.read_run(workdir) for workdir in workdirs])
  made = {
    'written': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    **({'command': command} if command else {}),
    'lwfedssl_jax': __version__,
  }
  report = sections.make_report(groups, unfinished, made)
  os.makedirs(output, exist_ok=True)
  write_markdown(report, output)
  write_rows(report.records, output)
  path = os.path.join(output, 'report.html')
  with open(path, 'w', encoding='utf-8') as file:
    file.write(page.to_html(report, [CSV, JSON]))
  comparison = next(item for item in report.sections[0].items if isinstance(item, Table))
  return {'table': tables.markdown(comparison.rows), 'html': path, 'finding': report.finding, 'groups': len(groups)}
