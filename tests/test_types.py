"""What a type checker tells a user of the package."""

import ast
import pathlib
import re
import typing

import pytest

import lwfedssl_jax
from lwfedssl_jax import config as configs
from lwfedssl_jax.config_fields import ConfigFields

ROOT = pathlib.Path(__file__).parents[1]

# Lines that must be refused end in the error that mypy gives.
USER_FILE = """
import lwfedssl_jax

config: lwfedssl_jax.Config = lwfedssl_jax.configure(
    method='layerwise', crop_area=(0.2, 1.0), server_calibration=None, temperature=1)
values: lwfedssl_jax.ConfigFields = {'batch_size': 8}
config = lwfedssl_jax.configure(**values)
blocks = lwfedssl_jax.load_encoder('runs/mine').params['blocks']
lwfedssl_jax.configure(metod='layerwise')  # call-arg
lwfedssl_jax.configure(batch_size='x')  # arg-type
lwfedssl_jax.configure(crop_area=(0.2, 0.5, 1.0))  # arg-type
lwfedssl_jax.nonsense  # attr-defined
lwfedssl_jax.load_encoder('runs/mine').params.blocks  # attr-defined
lwfedssl_jax.train('runs/mine')  # arg-type
"""


def test_keywords_of_configure_are_the_fields_of_the_groups():
  fields = {
    name: annotation for group in configs.GROUPS.values() for name, annotation in typing.get_type_hints(group).items()
  }
  assert typing.get_type_hints(ConfigFields) == fields
  assert not ConfigFields.__required_keys__


def test_type_checkers_see_the_names_that_are_imported_when_first_used():
  tree = ast.parse((ROOT / 'lwfedssl_jax' / '__init__.py').read_text())
  block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING')
  seen = {
    alias.asname or alias.name: (node.module.removeprefix('lwfedssl_jax.'), alias.name)
    for node in block.body
    for alias in node.names
  }
  assert seen == lwfedssl_jax._LAZY
  assert set(lwfedssl_jax.__all__) >= seen.keys()


def test_mypy_refuses_a_users_mistakes_and_nothing_else(tmp_path, monkeypatch):
  api = pytest.importorskip('mypy.api', reason='mypy is not installed (extra lint)')
  path = tmp_path / 'user.py'
  path.write_text(USER_FILE)
  monkeypatch.setenv('MYPYPATH', str(ROOT))
  monkeypatch.chdir(tmp_path)
  found, problems, _ = api.run(['--strict', '--config-file=', f'--cache-dir={ROOT / ".mypy_cache"}', 'user.py'])
  assert not problems
  errors = dict(re.findall(r'^user\.py:(\d+): error: .*\[([\w-]+)\]$', found, re.MULTILINE))
  expected = {
    str(number): line.partition('  # ')[2] for number, line in enumerate(USER_FILE.splitlines(), 1) if '  # ' in line
  }
  assert errors == expected, found
