"""The page on extending is true: its code runs as it stands, and does what the page says."""

import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lwfedssl_jax
from lwfedssl_jax import UsageError, catalog, models, objectives
from lwfedssl_jax.catalog import MethodTraits
from lwfedssl_jax.federated import aggregation

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'extending.md'
LONGEST = 40  # lines of what the page registers


def check_two_newest(names):
  """The objective with two online-only heads under the method of the page."""
  cost, summary = names['cost'], names['summary']
  assert [(stage.start, stage.stop) for stage in cost.stages] == [(0, 1), (0, 2), (1, 3), (2, 4)]
  assert (summary['method'], summary['objective']) == ('two_newest', 'moco_byol')
  assert np.isfinite(summary['final_loss'])
  counted = sum(sum(stage.upload_bytes.values()) for stage in cost.stages)
  assert summary['upload_bytes'] == pytest.approx(counted)
  assert 'blocks.3.attn.qkv.weight' in load_file('two_newest.safetensors')


def check_mlp(names):
  """The encoder of the page, trained with the aggregation of the page."""
  cost, summary = names['mlp_cost'], names['mlp_summary']
  assert np.isfinite(summary['final_loss'])
  assert summary['upload_bytes'] == pytest.approx(sum(sum(stage.upload_bytes.values()) for stage in cost.stages))
  tensors = load_file('mlp.safetensors')
  assert tensors['blocks/Dense_0/kernel'].shape == (3, 32, 64)
  description = json.loads(pathlib.Path('mlp.json').read_text())
  assert (description['model'], description['arguments']['patch_size']) == ('lwfedssl_jax, encoder mlp', 5)
  uploads = aggregation.Uploads(
    {'kernel': jnp.array([[1.0], [5.0], [100.0]])}, jnp.array([0.9, 0.1, 0.0]), jnp.array([True, True, False])
  )
  rule = aggregation.make_aggregator(lwfedssl_jax.configure(aggregation='uniform_mean').method)
  state = rule.add(rule.init({'kernel': jnp.zeros(1)}, 3), uploads, 0)
  tally = aggregation.tally_clients(uploads.weights, uploads.accepted)
  np.testing.assert_allclose(rule.finish(state, uploads.accepted, tally)['kernel'], [3.0])


def check_by_hand(names):
  """One client's second block is trained, then the server calibrates both."""

  def kernel(params):
    return np.asarray(params['blocks']['mlp1']['kernel'])

  def moved(old, new):
    return np.any(kernel(old) != kernel(new), axis=(1, 2)).tolist()

  assert moved(names['before'], names['after']) == [False, True, False, False]
  assert moved(names['after'], names['calibrated']) == [True, True, False, False]
  assert np.isfinite(names['client_losses'].total)


@pytest.mark.usefixtures('registries', 'cheap_views')
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  use, objective, method, rule, encoder, by_hand = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.DOTALL)
  names = {}

  def run(code):
    return exec(compile(code, 'extending.md', 'exec'), names)

  run(use)
  assert names['embeddings'].shape == (10, 64) and names['embeddings'].dtype == np.float32
  assert names['result']['mean']['accuracy'] > 0.2
  run(objective)
  run(method)
  check_two_newest(names)
  run(rule)
  run(encoder)
  check_mlp(names)
  run(by_hand)
  check_by_hand(names)


def test_what_the_page_registers_is_short():
  blocks = re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.DOTALL)
  registered = [block.partition('\nlwfedssl_jax.register_')[0] for block in blocks if 'lwfedssl_jax.register_' in block]
  assert len(registered) == 4
  code = [[line for line in block.splitlines() if line and 'import ' not in line] for block in registered]
  assert max(map(len, code)) < LONGEST


def test_a_name_that_is_taken_is_refused():
  with pytest.raises(UsageError, match='--method: expected a new name'):
    lwfedssl_jax.register_method('layerwise', MethodTraits(staged=True, first_trained=lambda stop, step: 0))
  with pytest.raises(UsageError, match='--objective: expected a new name'):
    lwfedssl_jax.register_objective('byol', catalog.OBJECTIVES['simclr'], objectives.BUILDERS['simclr'])
  with pytest.raises(UsageError, match='--encoder: expected a new name'):
    lwfedssl_jax.register_encoder('vit_tiny', catalog.ENCODERS['vit_micro'], models.BUILDERS['vit_micro'])
  with pytest.raises(UsageError, match='--aggregation: expected a new name'):
    lwfedssl_jax.register_aggregator('median', aggregation.BUILDERS['mean'])


def test_public_names_are_all_there_and_importing_them_loads_no_jax():
  assert all(getattr(lwfedssl_jax, name) is not None for name in lwfedssl_jax.__all__)
  with pytest.raises(AttributeError, match='no attribute'):
    lwfedssl_jax.nonsense  # noqa: B018
  program = 'import sys, lwfedssl_jax; lwfedssl_jax.configure(num_clients=3); sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', program], timeout=60).returncode == 0
