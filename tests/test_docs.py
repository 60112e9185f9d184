"""The documents agree with the files: links, paths, flags, commands and Python snippets."""

import ast
import importlib
import pathlib
import re
import shlex
import string

import pytest

import lwfedssl_jax
from experiments import command, flags, presets
from lwfedssl_jax.config_fields import ConfigFields

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
COMMANDS = ('pretrain', 'sweep', 'evaluate', 'resources', 'report', 'export', 'benchmark', 'server', 'node')
SEARCHED = ('', 'lwfedssl_jax', 'lwfedssl_jax/federated', 'lwfedssl_jax/evaluation', 'lwfedssl_jax/resources')
REMOVED_FLAGS = {'num_seeds'}  # named by the changelog

pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def fenced_blocks(text, language):
  found = re.findall(r'^```(\w*)\n(.*?)^```$', text, flags=re.DOTALL | re.MULTILINE)
  return [block for named, block in found if named == language]


def without_code(text):
  return re.sub(r'^```.*?^```$', '', text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
  """GitHub's anchors of a page's headings."""
  headings = re.findall(r'^#+ (.+)$', without_code(page.read_text()), flags=re.MULTILINE)
  plain = [re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings]
  return {heading.replace(' ', '-') for heading in plain}


def shell_blocks(text):
  """Blocks of commands: indented by four spaces, or fenced without a language."""
  indented = re.findall(r'(?:^    .*\n|^\n(?=    ))+', without_code(text), flags=re.MULTILINE)
  return [*fenced_blocks(text, ''), *indented]


def split_commands(block):
  """Yields (module, arguments) of each `python -m MODULE` in a block, shell variables filled in."""
  variables = {}
  for line in block.replace('\\\n', ' ').splitlines():
    if not re.match(r'\s*[A-Z]=|[^#]*python -m', line):
      continue
    words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
    if len(words) == 1 and (found := re.fullmatch(r'([A-Z])=(.*)', words[0])):
      variables[found[1]] = found[2]
    elif words and words[-1].startswith('--command='):
      yield from split_commands(words[-1].partition('=')[2].partition('&&')[2])
    elif 'python' in words and words[words.index('python') + 1] == '-m':
      module, *arguments = words[words.index('python') + 2 :]
      yield module, [argument for argument in arguments if argument != '...']


def all_commands():
  return [
    pytest.param(module, arguments, id=f'{page.stem} {module} {index}')
    for page in PAGES
    for block in shell_blocks(page.read_text())
    for index, (module, arguments) in enumerate(split_commands(block))
  ]


def known_flags():
  names = set()
  for name in COMMANDS:
    described = importlib.import_module(f'experiments.{name}').COMMAND
    command.define_flags(described)
    names |= set(described.flags)
  for tool in (ROOT / 'tests' / 'tools').glob('*.py'):
    names |= set(re.findall(r"'--([a-z_]+)'", tool.read_text()))
  return names


@pages
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', without_code(page.read_text())):
    if target.startswith('https://'):
      continue
    path, _, anchor = target.partition('#')
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), f'{page.name}: {target}'
    assert not anchor or anchor in anchors(file), f'{page.name}: {target}'


@pages
def test_named_files_exist(page):
  text = page.read_text()
  for name in re.findall(r'`([\w./*]+\.py)`', text):
    assert any(list((ROOT / folder).glob(name)) for folder in SEARCHED), f'{page.name}: {name}'
  for name in re.findall(r'\b((?:lwfedssl_jax|experiments|tests)/[\w./*]*)', text):
    assert list(ROOT.glob(name.rstrip('./'))), f'{page.name}: {name}'


@pages
def test_named_flags_exist(page):
  known = known_flags() | REMOVED_FLAGS | {'help', 'helpfull'}
  names = re.findall(r'`--([a-z_0-9]+)', page.read_text())
  assert {name for name in names if not {name, name.removeprefix('no')} & known} == set()


@pytest.mark.parametrize(('module', 'arguments'), all_commands())
def test_commands_parse(module, arguments):
  if module == 'pytest':
    assert all((ROOT / argument).exists() for argument in arguments)
    return
  if module.startswith('tests.tools.'):
    source = (ROOT / f'{module.replace(".", "/")}.py').read_text()
    assert all(f"'{argument.partition('=')[0]}'" in source for argument in arguments)
    return
  described = importlib.import_module(module).COMMAND
  try:
    command.parse(described, arguments)
    if described.has_config:
      flags.config_from_flags(described.flags)
  finally:
    described.flags.unparse_flags()


def test_commands_are_found():
  found = {parameter.values[0] for parameter in all_commands()}
  assert found >= {f'experiments.{name}' for name in COMMANDS}


@pages
def test_presets_named_in_a_document_exist(page):
  assert set(re.findall(r'--preset=([a-z_0-9]+)', page.read_text())) <= set(presets.names())


@pages
def test_python_snippets_use_names_that_exist(page):
  for block in fenced_blocks(page.read_text(), 'python'):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'lwfedssl_jax':
        assert node.attr in lwfedssl_jax.__all__ or importlib.import_module(f'lwfedssl_jax.{node.attr}'), node.attr
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'configure':
        assert {keyword.arg for keyword in node.keywords} <= set(ConfigFields.__annotations__)


def written_files():
  """Returns the modules, documents and presets that a reader opens."""
  folders = (path for name in ('lwfedssl_jax', 'experiments', 'docs', '.ci') for path in (ROOT / name).rglob('*'))
  return [*(path for path in folders if path.suffix in ('.py', '.md', '.flags')), *ROOT.glob('*.md')]


# Names that the field does not know, and what replaced them.
PRIVATE_WORDS = {
  r'seats?': 'client slot',
  r'padded_share': 'padding_fraction',
  r'gangs?': 'multi-seed run',
  r'\w*federation\.deal|dealt': 'partitioned',
  r'LocalRules|make_rules': 'ClientUpdate',
  r'add_devices|join_devices': 'psum, all_gather',
  r'is_sound|left_out': 'is_valid_update, rejected',
  r'client_room|room_for': 'capacity',
  r'branches_of|losses_of': 'a verb',
  r'hand-over|once a round': 'block transfer, per round',
  r'SECOND_ATTEMPT': 'RETRY',
}


def test_words_are_those_of_the_field():
  for path in written_files():
    for private, instead in PRIVATE_WORDS.items():
      found = re.findall(rf'\b(?:{private})\b', path.read_text())
      assert not found, f'{path.relative_to(ROOT)}: {sorted(set(found))}, use {instead}'


def test_every_page_is_in_the_navigation_of_the_site():
  listed = set(re.findall(r': ([\w/]+\.(?:md|ipynb))$', (ROOT / 'mkdocs.yml').read_text(), flags=re.MULTILINE))
  made = {'index.md', 'changelog.md', 'contributing.md', 'reference/commands.md'}  # by .ci/mkdocs_hooks.py
  folder = ROOT / 'docs'
  pages = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.suffix in ('.md', '.ipynb')}
  assert listed == pages | made


def test_spelling_is_american():
  british = r'\b\w*(?:normalis|colour|centre|neighbour|behaviour|labelled(?!by)|honour|initialis|regularis|optimis)\w*'
  for path in written_files():
    found = set(re.findall(british, path.read_text(), flags=re.IGNORECASE)) - {'knn_centred'}
    assert not found, f'{path.relative_to(ROOT)}: {sorted(found)}'
