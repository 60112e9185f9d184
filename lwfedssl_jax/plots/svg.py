"""A plot as an <svg> element of a page: in the page's colors, with the marks' texts as titles."""

import io
import re
from xml.etree import ElementTree

from lwfedssl_jax.plots.charts import COLORS, INK, MUTED, Plot


def _local_name(name: str) -> str:
  return name.rpartition('}')[2]


def _parse(plot: Plot, name: str) -> ElementTree.Element:
  """Returns matplotlib's SVG without namespaces, which HTML does not need, and without its style sheet."""
  import matplotlib

  buffer = io.StringIO()
  with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': name}):
    plot.figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None}, transparent=True)
  root = ElementTree.fromstring(buffer.getvalue())
  for element in root.iter():
    element.tag = _local_name(element.tag)
    element.attrib = {_local_name(key): value for key, value in element.attrib.items()}
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag in ('metadata', 'style'):
        parent.remove(child)
  return root


def _add_titles(root: ElementTree.Element, titles: dict[str, list[str]]) -> None:
  """Adds a title to every mark of an artist, or one title to the artist."""
  artists = {element.get('id'): element for element in root.iter() if element.get('id') in titles}
  for gid, texts in titles.items():
    marks = [artists[gid]] if len(texts) == 1 else list(artists[gid].iter('use'))
    for mark, text in zip(marks, texts, strict=True):
      title = ElementTree.Element('title')
      title.text = text
      mark.insert(0, title)


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
  """Prefixes identifiers that are referenced, and removes the others."""
  reference = re.compile(r'^(?:url\()?#([^)]+)\)?$')
  used = set()
  for element in root.iter():
    for key, value in element.attrib.items():
      if found := reference.match(value):
        used.add(found[1])
        element.set(key, value.replace('#', f'#{prefix}-'))
  for element in root.iter():
    identifier = element.attrib.pop('id', None)
    if identifier in used:
      element.set('id', f'{prefix}-{identifier}')


def to_svg(plot: Plot, name: str) -> str:
  """Returns a plot as an <svg> element.

  Colors are the page's variables --c0 .., --muted and its text color. The element is hidden from assistive technology;
  the page describes it in text.

  Args:
    plot: the plot.
    name: unique in the page; prefix of identifiers.
  """
  root = _parse(plot, name)
  for key in ('width', 'height', 'version'):
    root.attrib.pop(key, None)
  root.attrib |= {'aria-hidden': 'true', 'focusable': 'false'}
  _add_titles(root, plot.titles)
  _rename_ids(root, name)
  text = ElementTree.tostring(root, encoding='unicode')
  text = text.replace(INK, 'currentColor').replace(MUTED, 'var(--muted)')
  for index, color in enumerate(COLORS):
    text = text.replace(color, f'var(--c{index})')
  return text
