"""The residual network: layers by an independent NumPy version, statistics of batches, what follows from its blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, block_trees, catalog, models, stages, trees
from lwfedssl_jax.config import configure
from lwfedssl_jax.evaluation import finetune
from lwfedssl_jax.federated import aggregation, client_update, ldawa, server_optimizer, training_step
from lwfedssl_jax.federated.client_update import ClientData
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.training_step import Batch
from lwfedssl_jax.models import resnet, resnet_export
from lwfedssl_jax.pretrained import EncoderFunction
from tests import tiny
from tests.reference.numpy_resnet import NumpyResnet

TRAITS = catalog.ResnetTraits(width=4, units=(2, 1, 1))
SIDE = 8
VARIANTS = [('batch', False), ('batch', True), ('group', False)]


@pytest.fixture(autouse=True)
def registered(tiny_library, registries):
  models.register_encoder('resnet_tiny', TRAITS, models.build_resnet)


def tiny_config(**values):
  return configure(**{**tiny.VALUES, 'encoder': 'resnet_tiny', 'image_size': SIDE, **values})


def draw(shapes, seed=0):
  """Parameters far from their initial values; variances are positive."""
  generator = np.random.default_rng(seed)

  def leaf(path, like):
    noise, name = generator.normal(size=like.shape), path[-1].key
    if name == 'kernel':
      return noise * np.sqrt(2 / np.prod(like.shape[:-1]))
    return np.exp(0.3 * noise) if name in ('scale', 'running_var') else 0.3 * noise

  return jax.tree_util.tree_map_with_path(lambda *given: jnp.asarray(leaf(*given), jnp.float32), shapes)


@functools.cache
def build(norm, large_stem):
  encoder = resnet.make_resnet(TRAITS, SIDE, large_stem, norm)
  params = draw(jax.eval_shape(encoder.init, jax.random.key(0)))
  tensors = resnet_export.export_timm(TRAITS, large_stem, norm, params).tensors
  return encoder, params, NumpyResnet(tensors, large_stem=large_stem, norm=norm)


def make_images(count, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(count, SIDE, SIDE, 3)), jnp.float32)


@pytest.mark.parametrize(('norm', 'large_stem'), VARIANTS)
def test_the_forward_pass_in_evaluation_is_numpy_s(norm, large_stem):
  encoder, params, expected = build(norm, large_stem)
  images = make_images(5)
  features = encoder.embed(params['embedding'], images)
  found = encoder.pool(params['norm'], encoder.prefix(params['blocks'], features, 3))
  assert found.shape == (5, 16)
  np.testing.assert_allclose(found, expected(images), atol=1e-5)
  np.testing.assert_array_equal(found, encoder.pool({}, encoder.blocks(params['blocks'], features)))
  assert np.std(found) > 0.1


@pytest.mark.parametrize(('norm', 'large_stem'), VARIANTS)
def test_the_forward_pass_in_training_is_numpy_s_on_the_valid_samples_of_each_view(norm, large_stem):
  """Padding is arbitrary. View 1 moves the running statistics first, then view 2."""
  encoder, params, numpy_resnet = build(norm, large_stem)
  images, mask = make_images(2 * 6, seed=1), np.array([True, True, False, True, True, False])
  found, statistics = encoder.train({**params, 'adapters': {}}, images, jnp.asarray(mask))
  expected = NumpyResnet(numpy_resnet.tensors, large_stem=large_stem, norm=norm)
  views = images.reshape(2, 6, *images.shape[1:])
  for view, rows in zip(views, np.asarray(found).reshape(2, 6, -1)):
    np.testing.assert_allclose(rows[mask], expected(view[mask], training=True), atol=2e-5)
  moved = resnet_export.export_timm(TRAITS, large_stem, norm, trees.overlay(params, statistics)).tensors
  assert sum('running' in name for name in moved) == (2 * 11 if norm == 'batch' else 0)
  for name, tensor in expected.running.items():
    np.testing.assert_allclose(moved[name], tensor, atol=2e-5, err_msg=name)
    assert np.abs(moved[name] - numpy_resnet.tensors[name]).max() > 1e-3


def test_initial_weights_are_he_s_by_fan_out():
  encoder = resnet.make_resnet(catalog.ResnetTraits(units=(1, 1)), SIDE, False)
  params = encoder.init(jax.random.key(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path({name: params[name] for name in ('embedding', 'blocks')}):
    if leaf.ndim == 4:
      assert np.std(leaf) == pytest.approx(np.sqrt(2 / (leaf[..., 0, 0].size * leaf.shape[3])), rel=0.06), path
  again = params['blocks']['block_00']['unit0']
  assert np.abs(again['conv1']['kernel'] - again['conv2']['kernel']).max() > 0.01


def test_an_adapter_maps_to_the_encoder_s_width_while_its_block_is_the_last():
  encoder, params, _ = build('batch', False)
  plan = stages.make_plans(tiny_config(method='layerwise', blocks_per_stage=1))[1]
  part = stages.split(params, plan.shape, plan.start)
  assert {name: list(part.active[name]) for name in ('blocks', 'adapters')} == {
    'blocks': ['block_01'],
    'adapters': ['adapter_01'],
  }
  assert list(part.frozen['blocks']) == ['block_00']
  mask, inputs = jnp.ones(3, bool), jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 4)), jnp.float32)
  found, _ = encoder.train(part.active, inputs, mask)
  pooled, _ = encoder.train({**part.active, 'adapters': {}}, inputs, mask)
  layer = params['adapters']['adapter_01']
  assert (pooled.shape, found.shape) == ((6, 8), (6, 16))
  np.testing.assert_allclose(found, pooled @ layer['kernel'] + layer['bias'], rtol=1e-5)


def step_arguments(config, stage, seed=0, mask=(True,) * 5 + (False,)):
  plan, options = stages.make_plans(config)[stage], client_update.make_step_options(config, SIDE)
  params = draw(jax.eval_shape(options.model.init_params, jax.random.key(0)), seed)
  global_params = stages.split(params, plan.shape, plan.start)
  optimizer = training_step.make_optimizer(options, global_params)
  state = training_step.init_state(options, optimizer, global_params)
  views = jnp.asarray(np.random.default_rng(seed).uniform(size=(2, 6, SIDE, SIDE, 3)), jnp.float32)
  return options, optimizer, state, global_params, Batch(views, jnp.array(mask))


@pytest.mark.parametrize(('method', 'stage'), [('layerwise', 1), ('prog_fedssl', 1)])
def test_a_step_moves_running_statistics_by_the_forward_pass_alone(method, stage):
  """No gradient, no weight decay, no proximal term, no block-wise rate, and no optimizer state."""
  config = tiny_config(
    method=method, weight_decay=5.0, proximal_weight=3.0, block_learning_rate_decay=0.5, learning_rate=1.0
  )
  options, optimizer, state, global_params, batch = step_arguments(config, stage)
  moved = state._replace(params={**state.params, 'statistics': state.params['statistics'] + 0.1})
  after, losses = jax.jit(functools.partial(training_step.train_step, options, optimizer))(moved, global_params, batch)
  inputs = training_step.prefix_tokens(options.model, global_params, batch.views)
  active = options.model.raveler.unravel(moved.params, global_params.active)
  expected = options.model.raveler.ravel(options.model.encoder.train(active, inputs, batch.mask)[1])
  np.testing.assert_allclose(after.params['statistics'], expected['statistics'], rtol=1e-5, atol=1e-6)
  assert np.abs(after.params['kernel'] - moved.params['kernel']).max() > 1e-3
  sizes = {leaf.size for leaf in jax.tree.leaves(after.optimizer)}
  assert after.params['statistics'].size not in sizes and after.params['kernel'].size in sizes
  assert np.isfinite(losses.total)
  padding = batch._replace(mask=jnp.zeros(6, bool))
  same, _ = jax.jit(functools.partial(training_step.train_step, options, optimizer))(moved, global_params, padding)
  jax.tree.map(np.testing.assert_array_equal, same.params, moved.params)


def test_the_frozen_part_runs_by_its_running_statistics():
  """An image's input to the active block depends on no other image, and is the one of evaluation."""
  config = tiny_config(method='layerwise')
  options, _, _, global_params, batch = step_arguments(config, 2)
  found = training_step.prefix_tokens(options.model, global_params, batch.views)
  alone = training_step.prefix_tokens(options.model, global_params, batch.views[:, 2:3])
  np.testing.assert_allclose(found[jnp.array([2, 8])], alone, atol=1e-5)
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf * 4 if path[-1].key == 'running_var' else leaf, global_params.frozen
  )
  other = training_step.prefix_tokens(options.model, global_params._replace(frozen=scaled), batch.views)
  assert np.abs(other - found).max() > 0.1


def test_running_statistics_have_no_gradient_in_evaluation():
  encoder, params, _ = build('batch', False)
  features = encoder.embed(params['embedding'], make_images(3))
  slopes = jax.grad(lambda blocks: jnp.square(encoder.pool({}, encoder.blocks(blocks, features))).sum())(
    params['blocks']
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(slopes):
    assert np.any(leaf) != (path[-1].key in trees.RUNNING), path


def moved_parts(before, after):
  """Names of the components of which any leaf has moved."""
  before, after = block_trees.components(before), block_trees.components(after)
  return {
    name
    for name in before
    if any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (before[name], after[name]))))
  }


@pytest.mark.parametrize(
  ('method', 'expected'),
  [
    ('layerwise', {'block_01', 'adapter_01'}),
    ('lw_fedssl', {'embedding', 'block_00', 'block_01', 'adapter_01'}),
  ],
)
def test_a_round_moves_what_its_stage_trains_and_averages_statistics_as_parameters(method, expected, tiny_inputs):
  config = tiny_config(method=method, representation_alignment=False, client_chunk=2)
  plan, epsilon = stages.make_plans(config)[1], tiny.SMOOTH_EPSILON
  model = make_model(config.model, config.objective, SIDE)
  before = draw(jax.eval_shape(model.init_params, jax.random.key(0)))
  inputs = tiny_inputs()
  after, metrics = tiny.make_round(config, epsilon).apply(jax.tree.map(jnp.array, before), plan, inputs)
  heads = {'projector', 'predictor'}
  assert moved_parts(before, after) == expected | heads
  assert np.isfinite(metrics.client.total)
  if method == 'lw_fedssl':
    assert np.isfinite(metrics.calibration.total)
    return
  update = tiny.make_parts(config, epsilon).client_update
  global_params = stages.split(before, plan.shape, plan.start)
  train = jax.jit(lambda data, keys: update.apply(global_params, data, keys).params)
  slots, found = inputs.clients, []
  for i in range(len(slots.client_ids)):
    keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, slots.client_ids[i])
    found.append(train(ClientData(inputs.images, slots.image_ids[i], slots.num_images[i]), keys))
  weights = aggregation.client_weights(slots.num_images, slots.returned)
  mean = sum(weight * client['statistics'] for weight, client in zip(weights, found))
  aggregated = model.raveler.ravel(stages.split(after, plan.shape, plan.start).active)['statistics']
  np.testing.assert_allclose(aggregated, mean, rtol=1e-4, atol=1e-5)
  assert np.std([client['statistics'] for client in found], axis=0).max() > 1e-3


def test_a_server_optimizer_and_ldawa_leave_running_statistics_as_they_are_aggregated():
  config = tiny_config(method='layerwise', server_optimizer='fedavgm', server_momentum=0.5)
  plan, model = stages.make_plans(config)[1], make_model(config.model, config.objective, SIDE)
  state = server_optimizer.init_state(config.method, model, plan.shape)
  optimizer = server_optimizer.make_server_optimizer(config.method)
  shapes = jax.eval_shape(model.init_params, jax.random.key(0))
  before, after = (model.raveler.ravel(stages.split(draw(shapes, i), plan.shape, 1).active) for i in range(2))
  state = jax.tree.map(lambda leaf: leaf + 0.1, state)
  stepped, _ = server_optimizer.take_step(optimizer, state, after, before, jnp.float32(2))
  np.testing.assert_array_equal(stepped['statistics'], after['statistics'])
  assert np.abs(stepped['kernel'] - after['kernel']).max() > 0.01
  params = [draw(shapes, i) for i in range(2)]
  scaled = ldawa.scale_tensors(*params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(scaled):
    own = functools.reduce(lambda tree, part: tree[part.key], path, params[0])
    received = functools.reduce(lambda tree, part: tree[part.key], path, params[1])
    cosine = (own * received).sum() / (np.linalg.norm(own) * np.linalg.norm(received) + 1e-30)
    factor = 1 if path[-1].key in trees.RUNNING or not np.any(received) else cosine
    np.testing.assert_allclose(leaf, factor * own, rtol=1e-4, atol=1e-5, err_msg=str(path))


def test_micro_batches_are_exact_with_group_norm():
  def gradient(size):
    config = tiny_config(method='prog_fedssl', norm='group', micro_batch_size=size)
    options, _, state, global_params, batch = step_arguments(config, 1)
    found, losses, statistics = jax.jit(functools.partial(training_step.gradient, options))(state, global_params, batch)
    assert statistics == {}
    return found, losses

  (whole, losses), (pieces, found) = gradient(0), gradient(2)
  np.testing.assert_allclose(found, losses, rtol=1e-5)
  for name, vector in whole.items():
    assert np.abs(vector).max() > 1e-2
    np.testing.assert_allclose(pieces[name], vector, atol=2e-5 * np.abs(vector).max(), rtol=1e-4)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'micro_batch_size': 8, 'batch_size': 16}, '--micro_batch_size: expected 0 for resnet18 with --norm=batch'),
    ({'calibration_micro_batch_size': 8}, '--calibration_micro_batch_size: expected 0 for resnet18 with --norm=batch'),
    ({'new_block_init': 'previous'}, '--new_block_init: expected random for resnet18, whose blocks are unlike'),
    (
      {'depth_dropout_keep': 2, 'method': 'layerwise'},
      '--depth_dropout_keep: expected 0 for resnet18, whose blocks are unlike, got 2',
    ),
    ({'blocks_per_stage': 3}, '--blocks_per_stage: expected a divisor of the 4 blocks of resnet18, got 3'),
  ],
)
def test_what_the_blocks_or_their_statistics_do_not_allow_is_refused(values, message):
  with pytest.raises(UsageError, match=message):
    configure(encoder='resnet18', **values)
  if 'micro' in message:
    assert configure(encoder='resnet18', norm='group', **values).model.norm == 'group'


@pytest.mark.parametrize(
  ('stem', 'side', 'large'), [('auto', 64, False), ('auto', 65, True), ('large', 32, True), ('small', 224, False)]
)
def test_the_stem_follows_the_image_size_or_the_flag(stem, side, large):
  assert configure(encoder='resnet18', stem=stem).model.has_large_stem(side) is large


def test_finetuning_moves_running_statistics_and_uses_the_batch_s():
  """At a rate of zero nothing else moves, and evaluation follows the statistics of the new images."""
  encoder, params, _ = build('batch', False)
  run = EncoderFunction(encoder, SIDE)
  images = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), np.uint8)
  options = finetune.FinetuneOptions(epochs=2, warmup_epochs=0, batch_size=8, learning_rate=0.0)
  kept = {name: params[name] for name in ('embedding', 'blocks', 'norm')}
  trained, loss = finetune.train(run, kept, (images, np.arange(16, dtype=np.int32) % 2), 2, 0, options)
  assert loss == pytest.approx(np.log(2))
  for path, leaf in jax.tree_util.tree_leaves_with_path(trained['encoder']):
    before = functools.reduce(lambda tree, part: tree[part.key], path, kept)
    moves = path[-1].key in trees.RUNNING
    assert np.array_equal(leaf, before) is not moves, path
