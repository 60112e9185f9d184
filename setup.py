"""The description that a package index shows; setup.cfg says everything else about the package."""

import configparser
import pathlib
import re

from setuptools import setup

ROOT = pathlib.Path(__file__).parent


def describe(readme: str, repository: str) -> str:
  """Returns README.md for a package index, which resolves no relative links.

  Args:
    readme: its text.
    repository: address of the published repository, https://HOST/OWNER/NAME. Links and images lead there. If it is
      empty, their texts remain.
  """

  def link(match: re.Match[str]) -> str:
    image, text, path = match.groups()
    if not repository:
      return text
    return f'{image}[{text}]({repository}/{"raw" if image else "blob"}/HEAD/{path})'

  return re.sub(r'(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)', link, readme)


if __name__ == '__main__':
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  setup(long_description=describe((ROOT / 'README.md').read_text(), parser['metadata'].get('url', '')))
