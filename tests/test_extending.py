"""The page on extending is true: its code runs as it stands, and does what the page says."""

import pathlib
import re

import numpy as np
import pytest

import lwfedssl_jax
from lwfedssl_jax import UsageError, catalog, objectives
from lwfedssl_jax.catalog import MethodTraits

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'extending.md'


@pytest.fixture
def registries():
  kept = [(table, dict(table)) for table in (catalog.METHODS, catalog.OBJECTIVES, objectives.BUILDERS)]
  yield
  for table, before in kept:
    table.clear()
    table.update(before)


@pytest.mark.usefixtures('registries')
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.DOTALL)
  assert len(blocks) == 3
  names = {}
  exec(compile(blocks[0], 'extending.md, use', 'exec'), names)
  assert names['embeddings'].shape == (10, 64) and names['embeddings'].dtype == np.float32
  assert names['result']['mean']['accuracy'] > 0.2
  for number, block in enumerate(blocks[1:]):
    exec(compile(block, f'extending.md, {number}', 'exec'), names)
  assert [(stage.start, stage.stop) for stage in names['cost'].stages] == [(0, 1), (0, 2), (1, 3), (2, 4)]
  summary = names['summary']
  assert (summary['method'], summary['objective']) == ('two_newest', 'barlow_twins')
  assert np.isfinite(summary['final_loss'])
  counted = sum(sum(stage.upload_bytes.values()) for stage in names['cost'].stages)
  assert summary['upload_bytes'] == pytest.approx(counted)


def test_a_name_that_is_taken_is_refused():
  with pytest.raises(UsageError, match='--method: expected a new name'):
    lwfedssl_jax.register_method('layerwise', MethodTraits(staged=True, first_trained=lambda stop, step: 0))
  with pytest.raises(UsageError, match='--objective: expected a new name'):
    lwfedssl_jax.register_objective('byol', catalog.OBJECTIVES['simclr'], objectives.BUILDERS['simclr'])


def test_public_names_are_all_there_and_importing_them_loads_no_jax():
  import subprocess
  import sys

  assert all(getattr(lwfedssl_jax, name) is not None for name in lwfedssl_jax.__all__)
  with pytest.raises(AttributeError, match='no attribute'):
    lwfedssl_jax.nonsense  # noqa: B018
  program = 'import sys, lwfedssl_jax; lwfedssl_jax.configure(num_clients=3); sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', program], timeout=60).returncode == 0
