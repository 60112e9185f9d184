"""What a report is made of; no markup here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lwfedssl_jax.plots.charts import Plot


class Table(NamedTuple):
  """Cells as shown.

  Attributes:
    caption: a few words.
    rows: headings first; the first cell of a row names it.
    best: (row, column) of the cells that hold the best value of their column.
    is_text: cells hold words, not numbers.
  """

  caption: str
  rows: Sequence[Sequence[str]]
  best: frozenset[tuple[int, int]] = frozenset()
  is_text: bool = False


class Folded(NamedTuple):
  """A table that is shown on demand."""

  summary: str
  table: Table


class Chart(NamedTuple):
  """A plot, its caption, a text that replaces it, and its numbers; `name` is unique in a report."""

  name: str
  plot: Plot
  caption: str
  alternative: str
  table: Table | None = None


class Image(NamedTuple):
  """A PNG file that a run wrote."""

  path: str
  caption: str
  alternative: str


class Key(NamedTuple):
  """What the signs of a scatter plot stand for: (sign, index of its color, name)."""

  entries: Sequence[tuple[str, int, str]]


class Section(NamedTuple):
  """A heading, a paragraph, and what follows; `items` are the types above."""

  title: str
  text: str
  items: Sequence[Any]


class Report(NamedTuple):
  """A whole report.

  Attributes:
    title: of the page.
    finding: one sentence; what the runs show.
    notes: what the reader must know beside it, for example which runs are left out.
    sections: in reading order.
    records: the comparison as {column: value}, one a configuration, in base units.
  """

  title: str
  finding: str
  notes: Sequence[str]
  sections: Sequence[Section]
  records: Sequence[dict[str, Any]]
