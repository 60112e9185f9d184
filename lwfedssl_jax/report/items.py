"""The items of a report, without markup."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lwfedssl_jax.plots.charts import Plot


class Table(NamedTuple):
  """A table of formatted cells.

  Attributes:
    caption: a few words.
    rows: headings first; the first cell of a row is its name.
    best: (row, column) of the cells that hold the best value of their column.
    is_text: cells are text, not numbers.
  """

  caption: str
  rows: Sequence[Sequence[str]]
  best: frozenset[tuple[int, int]] = frozenset()
  is_text: bool = False


class Folded(NamedTuple):
  """A collapsed table."""

  summary: str
  table: Table


class Chart(NamedTuple):
  """A plot, its caption, its alternative text, and its numbers; `name` is unique in a report."""

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
  """The legend of a scatter plot: (sign, index of its color, name)."""

  entries: Sequence[tuple[str, int, str]]


class Section(NamedTuple):
  """A heading, a paragraph, and items of the types above."""

  title: str
  text: str
  items: Sequence[Any]


class Report(NamedTuple):
  """A report.

  Attributes:
    title: of the page.
    finding: one sentence.
    notes: further remarks, for example which runs are omitted.
    sections: in reading order.
    records: the comparison as {column: value}, one per configuration, in base units.
  """

  title: str
  finding: str
  notes: Sequence[str]
  sections: Sequence[Section]
  records: Sequence[dict[str, Any]]
