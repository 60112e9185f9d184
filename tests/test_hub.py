"""A published folder: read by timm's layout and by ourselves to the same embeddings; what its card states."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_export import normalized, vision_transformer

import lwfedssl_jax
from experiments import command, export
from lwfedssl_jax import UsageError, configure, hub, pretrained, run_evaluation
from lwfedssl_jax.workdir import run_dir

SIZE = 16
SUMMARY = {
  'final_knn_accuracy': 0.8125,
  'random_init_knn_accuracy': 0.3,
  'raw_pixel_knn_accuracy': None,
  'download_bytes': 41.5e6,
  'upload_bytes': 20.25e6,
  'seconds': 99.0,
}
EVALUATIONS = [
  {'name': 'linear, digits, 10 % of labels', 'runs': [{}, {}], 'mean': {'accuracy': 0.7}, 'std': {'accuracy': 0.01}},
  {'name': 'knn, digits, 100 % of labels', 'runs': [{}], 'mean': {'accuracy': 0.6}, 'std': {'accuracy': 0.0}},
]


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
  """An encoder of three blocks whose biases and scales count too."""
  images = tmp_path_factory.mktemp('secret') / 'birds'
  images.mkdir()
  config = configure(encoder='vit_micro', image_size=SIZE, patch_size=4, num_clients=7, dataset=f'folder:{images}')
  made = pretrained.random_encoder(config, seed=0)

  def noise(path, leaf):
    return (leaf + 0.05 * np.random.default_rng(len(str(path))).normal(size=leaf.shape)).astype('f')

  params = jax.tree_util.tree_map_with_path(noise, made.params)
  params['blocks'] = jax.tree.map(lambda leaf: leaf[:3], params['blocks'])
  return made._replace(params=params, rounds_done=45)


@pytest.fixture(scope='module')
def images():
  return np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope='module')
def published(loaded, tmp_path_factory):
  """The folder, and the run's workdir, which has a summary and evaluations."""
  root = tmp_path_factory.mktemp('hub')
  workdir, folder = root / 'run', root / 'deep' / 'encoder'
  workdir.mkdir()
  run_dir.write_json(str(workdir / run_dir.SUMMARY), SUMMARY)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrained, 'load_encoder', lambda path: loaded)
    patch.setattr(run_evaluation, 'read_evaluations', lambda path: EVALUATIONS)
    paths = hub.write_folder(str(workdir), str(folder), 'cc-by-nc-4.0')
  assert sorted(paths) == sorted(map(str, folder.iterdir()))
  return folder


def embed(loaded, images):
  return np.asarray(jax.jit(loaded.apply)(loaded.params, images))


def test_timm_s_layout_gives_the_same_embeddings(published, loaded, images):
  config = json.loads((published / 'config.json').read_text())
  assert config['num_classes'] == 0 and config['num_features'] == 64
  statistics = {'normalization': config['pretrained_cfg']}
  found = vision_transformer(
    load_file(published / 'model.safetensors'), config['model_args'], normalized(images, statistics)
  )
  np.testing.assert_allclose(found, embed(loaded, images), atol=1e-5)


def test_timm_loads_the_folder_by_its_name(published, loaded, images):
  """timm and PyTorch (750 MB) are too big for CI."""
  timm = pytest.importorskip('timm', reason='timm is not installed')
  import torch

  model = timm.create_model(f'local-dir:{published}', pretrained=True).eval()
  settings = timm.data.resolve_model_data_config(model)
  assert settings['input_size'] == (3, SIZE, SIZE) and settings['crop_pct'] == 1
  with torch.no_grad():
    found = model(torch.tensor(normalized(images, {'normalization': settings}), dtype=torch.float32)).numpy()
  np.testing.assert_allclose(found, embed(loaded, images), atol=1e-5)
  with_head = timm.create_model(f'local-dir:{published}', pretrained=True, num_classes=5)
  assert torch.equal(with_head.blocks[2].mlp.fc1.weight, model.blocks[2].mlp.fc1.weight)
  assert with_head.get_classifier().out_features == 5


def test_load_encoder_reads_it_back_to_the_bit(published, loaded, images):
  again = lwfedssl_jax.load_encoder(str(published))
  assert (again.depth, again.rounds_done, again.config.model) == (3, 45, loaded.config.model)
  assert jax.tree.structure(again.params) == jax.tree.structure(loaded.params)
  jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
  np.testing.assert_array_equal(embed(again, images), embed(loaded, images))


def test_the_card_states_data_method_costs_accuracies_and_license(published):
  card = (published / 'README.md').read_text()
  assert card.startswith('---\nlicense: cc-by-nc-4.0\nlibrary_name: timm\n')
  rows = {cells[1].strip(): cells[2:-1] for line in card.splitlines() if (cells := line.split('|'))[2:]}
  rows = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
  assert rows['data'] == ['`folder:birds`, labels not used']
  assert rows['method'] == ['`lw_fedssl`, objective `moco_v3`']
  assert rows['clients'] == ['7, 7 a round'] and rows['rounds'] == ['45 of 60, 3 local epochs each']
  assert rows['downloaded by a client, mean'] == ['41.50 MB'] and rows['uploaded by a client, mean'] == ['20.25 MB']
  assert float(rows['training of a client, whole run'][0].split()[0]) > 0
  assert rows['kNN monitor of the run, test images'] == ['1', '0.812'] and 'the same, raw pixels' not in rows
  assert rows['linear, digits, 10 % of labels'] == ['2', '0.700 ± 0.010']
  assert rows['knn, digits, 100 % of labels'] == ['1', '0.600']
  assert 'The run was not finished when it was exported.' in card and 'License of the weights: cc-by-nc-4.0.' in card
  assert not any('secret' in path.read_text() for path in published.iterdir() if path.suffix in ('.md', '.json'))


def test_an_unfinished_run_without_evaluations_has_no_accuracies(loaded, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrained, 'load_encoder', lambda path: loaded)
  hub.write_folder(str(tmp_path / 'run'), str(tmp_path / 'out'), 'mit')
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert 'Not measured.' in card and 'downloaded' not in card


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
@pytest.mark.parametrize('content', [b'', b'{}', b'[1]', b'\x00' * 100])
def test_a_damaged_folder_is_one_line(published, tmp_path, name, content):
  for path in published.iterdir():
    (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
  with pytest.raises(UsageError, match=f'^{tmp_path}/{name}: expected') as error:
    lwfedssl_jax.load_encoder(str(tmp_path))
  assert '\n' not in str(error.value)


def test_weights_of_another_encoder_are_refused(published, tmp_path):
  for path in published.iterdir():
    text = path.read_bytes()
    (tmp_path / path.name).write_bytes(text.replace(b'"patch_size": 4', b'"patch_size": 8'))
  with pytest.raises(UsageError, match=r'model\.safetensors: expected the weights of vit_micro'):
    lwfedssl_jax.load_encoder(str(tmp_path))


def test_what_cannot_be_published_is_refused_before_anything_is_written(loaded, tmp_path, monkeypatch, capsys):
  out = tmp_path / 'out'
  with pytest.raises(UsageError, match='--license: expected'):
    hub.write_folder('run', str(out), '')
  other = loaded._replace(encoder=loaded.encoder._replace(export=None, restore=None))
  monkeypatch.setattr(pretrained, 'load_encoder', lambda path: other)
  with pytest.raises(UsageError, match='--layout=hf: expected an encoder that timm has, got vit_micro'):
    hub.write_folder('run', str(out), 'mit')
  assert not out.exists()
  (tmp_path / '.lock').write_text('')
  with pytest.raises(UsageError, match='--output: expected a folder of its own'):
    hub.write_folder(str(tmp_path), str(tmp_path), 'mit')
  (tmp_path / 'file').write_text('')
  monkeypatch.setattr(pretrained, 'load_encoder', lambda path: loaded)
  with pytest.raises(UsageError, match='--output: expected a folder that can be written'):
    hub.write_folder('run', str(tmp_path / 'file' / 'x'), 'mit')
  for output in ('', 'encoder.safetensors'):
    assert command.execute(export.COMMAND, ['export', '--workdir=x', '--layout=hf', f'--output={output}']) == 2
    assert f'--output: expected a folder with --layout=hf, got {output!r}' in capsys.readouterr().err
