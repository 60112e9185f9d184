"""Tables as Markdown that reads well in a terminal too."""

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table; the first row holds the headings. Columns are padded to their widest cell."""
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
  lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
  return '\n'.join(lines)
