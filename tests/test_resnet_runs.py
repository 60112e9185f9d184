"""Runs of a residual network: checkpoints, bytes, real clients, and its weights in timm and back."""

import json

import jax
import numpy as np
import pytest

import lwfedssl_jax
from lwfedssl_jax import UsageError, catalog, export, hub, models, pretrained, trees
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.deployment.network import Network
from lwfedssl_jax.deployment.server_options import ServerOptions
from lwfedssl_jax.resources import communication
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.workdir import metrics_writer
from tests.deployment import in_process
from tests.reference.numpy_resnet import NumpyResnet

pytestmark = pytest.mark.usefixtures('cheap_views', 'tiny_library')

VALUES = {'encoder': 'resnet_tiny', 'rounds_per_stage': 1, 'num_clients': 2, 'max_train_images': 60, 'tracker': 'none'}


@pytest.fixture(autouse=True)
def registered(registries):
  models.register_encoder('resnet_tiny', catalog.ResnetTraits(width=4, units=(1, 1)), models.build_resnet)


CASES = [('layerwise', {'representation_alignment': True}), ('prog_fedssl', {})]


@pytest.mark.parametrize(('method', 'more'), CASES)
def test_real_clients_give_the_simulation_s_parameters_and_bytes(tmp_path, method, more):
  """Running statistics and temporary layers travel with the rest; the simulation resumes from its checkpoint."""
  values = {**VALUES, 'method': method, **more}
  simulated = in_process.make_config(tmp_path / 'simulated', **values)
  first = in_process.make_config(tmp_path / 'simulated', **values, stop_after_round=1)
  assert lwfedssl_jax.train(first)['rounds_done'] == 1
  summary = lwfedssl_jax.train(in_process.make_config(tmp_path / 'simulated', **values, resume=True))
  config = in_process.make_config(tmp_path / 'real', **values)
  transport = in_process.InProcess(in_process.make_clients(tmp_path, config))
  digests, rows, found = in_process.run(
    config,
    federated_dataset.load_for_server(config),
    lambda setup: Network(setup, transport, ServerOptions()),
  )
  assert len(set(digests)) == 2
  assert found['params_sha256'] == summary['params_sha256']
  assert (found['upload_bytes'], found['download_bytes']) == (summary['upload_bytes'], summary['download_bytes'])
  assert transport.sent == sum(row['total_download_bytes'] for row in rows)
  sizes = communication.make_payload(simulated, 8).sizes_bytes
  heads = sizes['projector'] + sizes['predictor']
  earlier = sizes['embedding'] + sizes['block_00']
  second = heads + sizes['block_01'] + (earlier if method == 'prog_fedssl' else 0)
  assert found['upload_bytes'] == earlier + sizes['adapter_00'] + heads + second
  assert len(metrics_writer.read_metrics(str(tmp_path / 'simulated'))) == 2


def test_a_run_that_has_reached_one_stage_is_loaded_and_exported_as_far_as_it_is(tmp_path):
  config = in_process.make_config(tmp_path / 'run', **VALUES, method='layerwise', stop_after_round=1)
  lwfedssl_jax.train(config)
  loaded = lwfedssl_jax.load_encoder(str(tmp_path / 'run'))
  assert (loaded.depth, loaded.rounds_done) == (1, 1)
  assert set(loaded.params) == {'embedding', 'blocks', 'norm'}
  statistics = loaded.params['embedding']['norm1']['running_mean']
  assert np.abs(statistics).max() > 0
  exported = export.convert(loaded)
  assert exported.description['differs'] == {
    'layers': (1,),
    'channels': (4,),
    'conv1': '3x3, stride 1, padding 1',
    'maxpool': 'none',
  }
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
  numpy_resnet = NumpyResnet(exported.tensors, large_stem=False, norm='batch')
  np.testing.assert_allclose(
    loaded.apply(loaded.params, images), numpy_resnet((images / 255 - 0.5) / 0.5), atol=1e-5, rtol=1e-4
  )
  with pytest.raises(UsageError, match='--layout=hf: expected an encoder that timm has, got resnet_tiny'):
    hub.write_folder(str(tmp_path / 'run'), str(tmp_path / 'folder'), 'apache-2.0')


def randomized(loaded, seed=0):
  """Parameters far from the initial ones, so that every scale, bias and statistic counts."""
  generator = np.random.default_rng(seed)

  def draw(path, leaf):
    noise = generator.normal(size=leaf.shape).astype(np.float32)
    return leaf * np.exp(0.2 * noise) if path[-1].key in ('scale', 'running_var') else leaf + 0.05 * noise

  return loaded._replace(params=jax.tree_util.tree_map_with_path(draw, loaded.params))


def make_resnet18(**values):
  config = lwfedssl_jax.configure(**{'encoder': 'resnet18', 'stem': 'large', 'image_size': 32, **values})
  return randomized(pretrained.random_encoder(config, 0))


def test_resnet18_is_restored_from_the_names_of_timm():
  """Names and shapes of torchvision's state dict, without its counters of batches."""
  loaded = make_resnet18()
  tensors, description = export.convert(loaded)
  assert (len(tensors), sum(tensor.size for tensor in tensors.values())) == (100, 11_176_512 + 9_600)
  assert tensors['layer3.0.downsample.0.weight'].shape == (256, 128, 1, 1)
  assert tensors['conv1.weight'].shape == (64, 3, 7, 7)
  assert json.loads(json.dumps(description))['timm_architecture'] == 'resnet18'
  restored = loaded.encoder.restore(tensors)
  assert jax.tree.structure(restored) == jax.tree.structure(loaded.params)
  jax.tree.map(np.testing.assert_array_equal, restored, loaded.params)


@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_timm_loads_it_and_agrees_in_evaluation_and_training(norm):
  """torch and timm are too big for CI."""
  torch = pytest.importorskip('torch', reason='extra `torch` is not installed')
  timm = pytest.importorskip('timm', reason='timm is not installed')
  loaded = make_resnet18(norm=norm)
  tensors, description = export.convert(loaded)
  model = timm.create_model(description['timm_architecture'], **description['arguments'])
  model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
  images = np.random.default_rng(0).uniform(size=(6, 32, 32, 3)).astype(np.float32)
  inputs = torch.tensor(((images - 0.5) / 0.5).transpose(0, 3, 1, 2))
  with torch.no_grad():
    expected = model.eval()(inputs).numpy()
    trained = model.train()(inputs).numpy()
  found = loaded.apply(loaded.params, images)
  scale = np.abs(expected).max()
  assert found.shape == (6, 512) and scale > 0.1
  np.testing.assert_allclose(found, expected, atol=1e-4 * scale)
  found, statistics = loaded.apply.train(loaded.params, images)
  np.testing.assert_allclose(found, trained, atol=1e-3 * np.abs(trained).max())
  after = loaded._replace(params=trees.overlay(loaded.params, statistics))
  for name, tensor in export.convert(after).tensors.items():
    np.testing.assert_allclose(tensor, model.state_dict()[name].numpy(), atol=1e-4, rtol=1e-4, err_msg=name)


def test_torchvision_agrees():
  """torch and torchvision are too big for CI."""
  torch = pytest.importorskip('torch', reason='extra `torch` is not installed')
  torchvision = pytest.importorskip('torchvision', reason='torchvision is not installed')
  loaded = make_resnet18()
  model = torchvision.models.resnet18()
  model.fc = torch.nn.Identity()
  tensors = {name: torch.tensor(tensor) for name, tensor in export.convert(loaded).tensors.items()}
  model.load_state_dict(tensors, strict=True)
  images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    expected = model.eval()(torch.tensor(((images - 0.5) / 0.5).transpose(0, 3, 1, 2))).numpy()
  np.testing.assert_allclose(loaded.apply(loaded.params, images), expected, atol=1e-4 * np.abs(expected).max())


def test_every_stage_plan_knows_its_start():
  plans = make_plans(lwfedssl_jax.configure(encoder='resnet18', method='layerwise'))
  assert [plan.shape for plan in plans] == [(1, True, 0), (1, False, 1), (1, False, 2), (1, False, 3)]
  assert [(plan.static_stop, plan.has_adapter) for plan in plans] == [(1, True), (2, True), (3, True), (4, False)]
