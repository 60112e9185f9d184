"""What setup.cfg says about the package, held against the files that are there."""

import ast
import configparser
import importlib
import importlib.util
import pathlib
import re
import sys

import pytest

import experiments
from experiments import presets

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = ('pretrain', 'sweep', 'evaluate', 'resources', 'report', 'export', 'benchmark', 'server', 'node')


@pytest.fixture(scope='module')
def setup():
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  return parser


def lines(text):
  return [line for line in text.splitlines() if line]


def names(requirements):
  return [re.split(r'[^\w.-]', line)[0] for line in lines(requirements)]


def test_every_package_is_listed(setup):
  found = set()
  for top, prefix in (('lwfedssl_jax', ''), ('experiments', 'lwfedssl_jax.')):
    for path in (ROOT / top).rglob('__init__.py'):
      found.add(prefix + '.'.join(path.parent.relative_to(ROOT).parts))
  assert set(lines(setup['options']['packages'])) == found


def test_every_command_is_a_console_script(setup):
  scripts = dict(line.split(' = ') for line in lines(setup['options.entry_points']['console_scripts']))
  assert scripts == {f'lwfedssl-{name}': f'lwfedssl_jax.experiments.{name}:run' for name in COMMANDS}
  for name in COMMANDS:
    assert callable(importlib.import_module(f'experiments.{name}').run)


def test_presets_are_package_data(setup):
  patterns = lines(setup['options.package_data']['lwfedssl_jax.experiments'])
  packaged = {path for pattern in patterns for path in (ROOT / 'experiments').glob(pattern)}
  assert set(presets.FOLDER.iterdir()) <= packaged and len(presets.names()) >= 5


def test_commands_import_each_other_relatively_so_that_both_names_work():
  for path in (ROOT / 'experiments').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      absolute = isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split('.')[0] == 'experiments'
      plain = isinstance(node, ast.Import) and any(alias.name.split('.')[0] == 'experiments' for alias in node.names)
      assert not absolute and not plain, f'{path}:{node.lineno}'


def test_commands_run_under_their_installed_name(monkeypatch, capsys):
  name = 'lwfedssl_jax.experiments'
  spec = importlib.util.spec_from_file_location(
    name, experiments.__file__, submodule_search_locations=list(experiments.__path__)
  )
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
    before = set(sys.modules)
    pretrain = importlib.import_module(f'{name}.pretrain')
    assert sys.modules[f'{name}.command'].execute(pretrain.COMMAND, ['pretrain.py', '--help']) == 0
    for module in set(sys.modules) - before:
      del sys.modules[module]
  assert 'python -m lwfedssl_jax.experiments.pretrain --' in capsys.readouterr().out
  assert pretrain.COMMAND.flags is not importlib.import_module('experiments.pretrain').COMMAND.flags


@pytest.fixture(scope='module')
def describe():
  spec = importlib.util.spec_from_file_location('lwfedssl_setup', ROOT / 'setup.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.describe


def test_an_index_shows_no_relative_links(describe):
  readme = (ROOT / 'README.md').read_text()
  relative = r'\]\((?!https://)'
  assert re.search(relative, readme)
  assert not re.search(relative, describe(readme, ''))
  assert not re.search(relative, describe(readme, 'https://example.org/owner/name'))
  assert '[arXiv 2401.11647](https://arxiv.org/abs/2401.11647)' in describe(readme, '')


def test_an_index_links_to_the_repository(describe):
  text = 'see [a](docs/a.md#b), ![c](docs/c.png) and [here](#here)'
  assert describe(text, 'https://h/o/n') == (
    'see [a](https://h/o/n/blob/HEAD/docs/a.md#b), ![c](https://h/o/n/raw/HEAD/docs/c.png) and [here](#here)'
  )
  assert describe(text, '') == 'see a, c and [here](#here)'


def test_requirements_pin_every_direct_dependency(setup):
  wanted = names(setup['options']['install_requires']) + names(setup['options.extras_require']['tfds'])
  pinned = [line for line in lines((ROOT / 'requirements.txt').read_text()) if not line.startswith('#')]
  assert [line.partition('==')[0] for line in pinned] == wanted
  assert all(re.fullmatch(r'[\w.-]+==\d[\w.]*', line) for line in pinned)


def test_what_the_package_imports_is_declared(setup):
  distributions = {
    'absl': 'absl-py',
    'dp_accounting': 'dp-accounting',
    'mlflow': 'mlflow-skinny',
    'PIL': 'pillow',
    'sklearn': 'scikit-learn',
    'orbax': 'orbax-checkpoint',
    'tensorflow_datasets': 'tensorflow-datasets',
  }
  imported = set()
  for path in (*(ROOT / 'lwfedssl_jax').rglob('*.py'), *(ROOT / 'experiments').rglob('*.py')):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        imported |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.level == 0:
        imported.add(node.module.split('.')[0])
  found = {distributions.get(name, name) for name in imported - set(sys.stdlib_module_names) - {'lwfedssl_jax'}}
  extras = setup['options.extras_require']
  optional = ('tfds', 'hf', 'wandb', 'mlflow', 'torch', 'federation', 'privacy')
  declared = {
    *names(setup['options']['install_requires']),
    *(name for extra in optional for name in names(extras[extra])),
  }
  assert {'jax', 'tensorflow-datasets'} <= found <= declared
