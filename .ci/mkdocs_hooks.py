"""Hooks of mkdocs.yml: pages made of files outside docs/ and of `--help`; nothing may be fetched from another host."""

import importlib
import pathlib
import re
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
# File of the repository -> page of the site.
COPIES = {
  'README.md': 'index.md',
  'CHANGELOG.md': 'changelog.md',
  'CONTRIBUTING.md': 'contributing.md',
  'CITATION.cff': 'CITATION.cff',
}
COMMANDS = ('pretrain', 'sweep', 'evaluate', 'report', 'export', 'resources', 'benchmark', 'server', 'node')
COMMANDS_PAGE = 'reference/commands.md'
# What a browser fetches by itself, from another host: scripts, style sheets, fonts, images, frames.
FETCHED = re.compile(
  r'<(?:script|img|iframe|source)\b[^>]*\bsrc=["\']?(?:https?:)?//|<link\b[^>]*\bhref=["\']?(?:https?:)?//'
)


def relink(markdown: str) -> str:
  """Returns a page whose links to files of the repository lead to the pages made of them."""
  for file, page in COPIES.items():
    markdown = re.sub(rf'\]\((?:\.\./)?{re.escape(file)}(?=[)#])', f']({page}', markdown)
  return re.sub(r'\]\(docs/', '](', markdown)


def describe_commands() -> str:
  """Returns the page of all commands: what `--help` prints for each."""
  sys.path.insert(0, str(ROOT))
  command, usage = (importlib.import_module(f'experiments.{name}') for name in ('command', 'usage'))
  parts = ['# Commands', 'What `--help` prints. `python -m experiments.NAME` is the same command in a checkout.']
  for name in COMMANDS:
    described = importlib.import_module(f'experiments.{name}').COMMAND
    command.define_flags(described)
    text = usage.describe(
      described.doc,
      described.flags,
      frozenset({'flagfile', 'verbosity'}),
      has_config=described.has_config,
      full=False,
      program=f'lwfedssl-{name}',
    )
    parts.append(f'## lwfedssl-{name}\n\n```text\n{text}```')
  return '\n\n'.join(parts)


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages that are not in docs/."""
  for name, page in COPIES.items():
    files.append(File.generated(config, page, content=(ROOT / name).read_text()))
  files.append(File.generated(config, COMMANDS_PAGE, content=describe_commands()))
  return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
  """Leads links to where the site has their target."""
  return relink(markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
  """Stops the build where a page would load something from another host."""
  if found := FETCHED.search(output):
    raise PluginError(f'{page.file.src_uri}: expected resources of this site alone, got {found[0]}')
  return output
