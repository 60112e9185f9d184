"""Finetuning against a loop in NumPy float64: rates, decay, order, views, gradients and AdamW are written out here.

Shared with the library: random draws by key (`rng.key`), and the operations of RandAugment, which have tests of their
own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import rng
from lwfedssl_jax.data import randaugment
from lwfedssl_jax.evaluation import finetune

CLASSES, WIDTH, COUNT, PIXELS = 3, 4, 11, 3 * 3 * 3

# Two steps an epoch and three images left over; rates and decay so large that each shows.
OPTIONS = finetune.FinetuneOptions(epochs=5, warmup_epochs=2, batch_size=4, learning_rate=3.2, weight_decay=0.3)
PEAK = 3.2 * 4 / 256


def make_params(seed=0):
  """A linear encoder with one leaf of every kind of name; none of them zero."""
  generator = np.random.default_rng(seed)

  def draw(*shape):
    return (0.3 + 0.3 * generator.normal(size=shape)).astype(np.float32)

  return {'position': draw(PIXELS), 'kernel': draw(PIXELS, WIDTH), 'bias': draw(WIDTH), 'norm': {'scale': draw(WIDTH)}}


def apply(params, images):
  pixels = images.reshape(len(images), -1) / (255 if images.dtype == 'uint8' else 1) + params['position']
  return (pixels @ params['kernel'] + params['bias']) * params['norm']['scale']


@pytest.fixture(scope='module')
def examples():
  generator = np.random.default_rng(1)
  return generator.integers(0, 256, (COUNT, 3, 3, 3), np.uint8), generator.integers(0, CLASSES, COUNT).astype(np.int32)


def numpy_rate(step, peak, warmup, total):
  return peak * (step / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * (step - warmup) / (total - warmup))))


def numpy_order(seed, epoch):
  key = jax.random.fold_in(rng.key(seed, rng.Stream.FINETUNE_SHUFFLE, epoch), 0)
  return np.argsort(jax.random.uniform(key, (COUNT,)))


def numpy_gradients(p, views, labels):
  """Loss, and its gradients by hand; `p` is flat: the encoder's leaves, 'head/kernel' and 'head/bias'."""
  pixels = views.reshape(len(views), -1) + p['position']
  hidden = pixels @ p['kernel'] + p['bias']
  logits = hidden * p['scale'] @ p['head/kernel'] + p['head/bias']
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  of_logits = (shares - np.eye(CLASSES)[labels]) / len(labels)
  of_embedding = of_logits @ p['head/kernel'].T
  of_hidden = of_embedding * p['scale']
  return -np.log(shares[np.arange(len(labels)), labels]).mean(), {
    'head/kernel': (hidden * p['scale']).T @ of_logits,
    'head/bias': of_logits.sum(0),
    'scale': (of_embedding * hidden).sum(0),
    'kernel': pixels.T @ of_hidden,
    'bias': of_hidden.sum(0),
    'position': (of_hidden @ p['kernel'].T).sum(0),
  }


def flatten(trained):
  encoder = trained['encoder']
  flat = {
    'position': encoder['position'],
    'kernel': encoder['kernel'],
    'bias': encoder['bias'],
    'scale': encoder['norm']['scale'],
    'head/kernel': trained['head']['kernel'],
    'head/bias': trained['head']['bias'],
  }
  return {name: np.asarray(leaf, np.float64) for name, leaf in flat.items()}


def numpy_finetune(params, images, labels, seed):
  """Returns the trained parameters, flat, and the last epoch's mean loss."""
  p = flatten({'encoder': params, 'head': {'kernel': np.zeros((WIDTH, CLASSES)), 'bias': np.zeros(CLASSES)}})
  first, second, steps = dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), COUNT // 4
  augmented = jax.jit(randaugment.rand_augment)
  for epoch in range(OPTIONS.epochs):
    order, losses = numpy_order(seed, epoch), []
    for step in range(steps):
      ids, count = order[4 * step : 4 * step + 4], epoch * steps + step
      key = jax.random.fold_in(rng.key(seed, rng.Stream.FINETUNE_AUGMENT, epoch), step)
      loss, gradients = numpy_gradients(p, np.asarray(augmented(key, images[ids]), np.float64), labels[ids])
      losses.append(loss)
      rate = numpy_rate(count, PEAK, 2 * steps, 5 * steps)
      for name, gradient in gradients.items():
        first[name] = 0.9 * first[name] + 0.1 * gradient
        second[name] = 0.999 * second[name] + 0.001 * gradient**2
        direction = first[name] / (1 - 0.9 ** (count + 1))
        direction = direction / (np.sqrt(second[name] / (1 - 0.999 ** (count + 1))) + 1e-8)
        decay = 0.3 * p[name] if name.endswith('kernel') else 0
        p[name] = p[name] - rate * (direction + decay)
  return p, np.mean(losses)


def test_finetuning_is_numpy_s(examples):
  params = make_params()
  trained, loss = finetune.train(apply, params, examples, CLASSES, 3, OPTIONS)
  expected, expected_loss = numpy_finetune(params, *examples, 3)
  found, before = flatten(trained), flatten(finetune.init_params(params, WIDTH, CLASSES))
  assert found.keys() == expected.keys()
  for name, leaf in expected.items():
    assert np.abs(leaf - before[name]).max() > 0.02, name
    np.testing.assert_allclose(found[name], leaf, atol=3e-5, err_msg=name)
  assert loss == pytest.approx(expected_loss, abs=1e-5)


def test_seeds_train_differently_and_repeat(examples):
  kernels = [
    finetune.train(apply, make_params(), examples, CLASSES, seed, OPTIONS)[0]['head']['kernel'] for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert np.abs(kernels[0] - kernels[2]).max() > 0.01


def test_defaults_are_the_paper_s():
  assert finetune.FinetuneOptions() == (40, 10, 256, 1e-3, 1e-5, 0.5)


@pytest.mark.parametrize(('batch_size', 'steps'), [(256, 7), (100, 1)])
def test_rate_rises_for_ten_epochs_and_falls_to_zero_by_the_fortieth(batch_size, steps):
  schedule = finetune.make_schedule(finetune.FinetuneOptions(), batch_size, steps)
  peak = 1e-3 * batch_size / 256
  expected = [numpy_rate(step, peak, 10 * steps, 40 * steps) for step in range(40 * steps + 1)]
  np.testing.assert_allclose([schedule(step) for step in range(40 * steps + 1)], expected, rtol=1e-5, atol=1e-9)
  assert expected[0] == 0 and expected[10 * steps] == peak and expected[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('num_images', [9, 3])
def test_without_gradient_only_kernels_move_and_by_the_scheduled_decay(num_images):
  """A set smaller than a batch is one batch, and the rate follows what a batch really holds."""
  adamw = finetune.make_optimizer(OPTIONS, num_images)
  trained = jax.tree.map(lambda leaf: leaf + 1, finetune.init_params(make_params(), WIDTH, CLASSES))
  nothing, state, before = jax.tree.map(jnp.zeros_like, trained), adamw.init(trained), flatten(trained)
  for _ in range(2):  # the rate of the first step is zero
    updates, state = adamw.update(nothing, state, trained)
    trained = jax.tree.map(jnp.add, trained, updates)
  batch = min(4, num_images)
  rate = 3.2 * batch / 256 / (2 * (num_images // batch))
  for name, leaf in flatten(trained).items():
    kept = 1 - rate * 0.3 if name.endswith('kernel') else 1
    np.testing.assert_allclose(leaf, kept * before[name], rtol=1e-6, err_msg=name)


def test_every_epoch_has_an_order_of_its_own():
  def plan(seed, epoch):
    return np.asarray(finetune.plan_epoch(jax.random.key(seed), epoch, COUNT, 4))

  epochs = [plan(0, epoch) for epoch in range(8)]
  for ids in epochs:
    assert ids.shape == (2, 4)
    assert len(np.unique(ids)) == 8 and set(ids.ravel()) <= set(range(COUNT))
  assert len({ids.tobytes() for ids in [*epochs, plan(1, 0)]}) == 9
  assert set(np.concatenate(epochs).ravel()) == set(range(COUNT))  # what is dropped differs too


def test_a_set_smaller_than_a_batch_is_one_batch(examples):
  few = tuple(part[:3] for part in examples)
  trained, loss = finetune.train(apply, make_params(), few, CLASSES, 0, OPTIONS)
  assert np.isfinite(loss)
  assert np.abs(flatten(trained)['head/kernel']).max() > 0.05


def test_the_head_s_product_is_float32_at_full_precision(examples):
  trained = finetune.init_params(make_params(), WIDTH, CLASSES)

  embedded = jnp.ones((len(examples[0]), WIDTH))
  equations = jax.make_jaxpr(lambda p: finetune.compute_logits(p['head'], embedded))(trained).eqns
  (product,) = (equation for equation in equations if equation.primitive.name == 'dot_general')
  assert set(product.params['precision']) == {jax.lax.Precision.HIGHEST}
  assert {variable.aval.dtype for variable in (*product.invars, *product.outvars)} == {jnp.dtype('float32')}


def test_classes_are_those_of_the_trained_parameters(examples):
  trained = finetune.init_params(make_params(), WIDTH, CLASSES)
  trained['head'] = {
    'kernel': jnp.asarray(np.random.default_rng(5).normal(size=(WIDTH, CLASSES)), jnp.float32),
    'bias': jnp.array([0.0, 0.5, 1.0]),
  }
  images = np.random.default_rng(6).integers(0, 256, (300, 3, 3, 3), np.uint8)
  p = flatten(trained)
  hidden = (images.reshape(300, -1) / 255 + p['position']) @ p['kernel'] + p['bias']
  logits = hidden * p['scale'] @ p['head/kernel'] + p['head/bias']
  found = finetune.classify(apply, trained, images)
  assert len(set(found)) > 1
  np.testing.assert_array_equal(found, logits.argmax(1))
