"""Protocols on an encoder and images whose right answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as oracle

from lwfedssl_jax import UsageError
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.evaluation import finetune, linear, metrics, protocols

CLASSES = 3


def coloured_images(count, seed, noise=40):
  """Each class is a colour, with noise."""
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, CLASSES, count).astype(np.int32)
  images = generator.integers(0, noise, (count, 8, 8, 3))
  images[np.arange(count), :, :, labels] += 60
  return images.astype(np.uint8), labels


@pytest.fixture(scope='module')
def dataset():
  train, test = coloured_images(300, 0), coloured_images(90, 1)
  return ImageDataset('coloured', *train, *test, ('red', 'green', 'blue'))


PARAMS = {'kernel': jnp.eye(3), 'norm': {'scale': jnp.ones(3)}}


def mean_colour(params, images):
  scaled = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
  return scaled.mean((1, 2)) @ params['kernel']


def evaluate(dataset, protocol, **options):
  task = protocols.make_task(dataset, options.pop('split', 'test'), options.pop('max_train_images', 0))
  return protocols.evaluate(mean_colour, lambda seed: PARAMS, protocol, task, **options)


@pytest.mark.parametrize('protocol', ['knn', 'knn_centred', 'linear'])
def test_what_can_be_told_apart_is(dataset, protocol):
  found = evaluate(dataset, protocol, seeds=(0, 1))
  assert found['mean']['accuracy'] > 0.95
  assert np.sum(found['confusion']) == 2 * 90
  assert [run['num_labels'] for run in found['runs']] == [300, 300]


def test_what_all_embeddings_have_in_common_is_taken_out_by_centred_knn_alone(dataset):
  """A far origin leaves cosine next to nothing to go by; the centred vote is that of no offset at all."""
  near = evaluate(dataset, 'knn_centred')
  task = protocols.make_task(dataset)
  far = lambda params, images: mean_colour(params, images) + jnp.array([100.0, -300.0, 200.0])
  plain, centred = (
      protocols.evaluate(far, lambda seed: PARAMS, protocol, task) for protocol in ('knn', 'knn_centred'))
  assert centred['mean']['accuracy'] == pytest.approx(near['mean']['accuracy'], abs=0.02)
  assert plain['mean']['accuracy'] < 0.8


def test_finetuning_learns_and_keeps_the_parameters_it_was_given(dataset):
  options = finetune.FinetuneOptions(epochs=12, warmup_epochs=2, batch_size=32, learning_rate=0.5, flip_probability=0)
  before = jax.tree.map(np.array, PARAMS)
  found = evaluate(dataset, 'finetune', options=options)
  assert found['mean']['accuracy'] > 0.8
  assert found['runs'][0]['train_loss'] < np.log(CLASSES)
  jax.tree.map(np.testing.assert_array_equal, before, PARAMS)


def test_finetuning_without_epochs_to_speak_of_guesses(dataset):
  options = finetune.FinetuneOptions(epochs=1, warmup_epochs=0, learning_rate=0.0)
  found = evaluate(dataset, 'finetune', options=options)
  assert found['runs'][0]['train_loss'] == pytest.approx(np.log(CLASSES), rel=1e-5)
  assert found['mean']['mean_per_class_accuracy'] == pytest.approx(1 / CLASSES)  # every query gets one class


def test_labels_are_drawn_by_class_and_seed():
  labels = np.repeat(np.arange(4), [100, 50, 10, 3])
  chosen = protocols.label_subset(labels, 0.1, seed=0)
  assert np.bincount(labels[chosen]).tolist() == [10, 5, 1, 1]
  assert len(np.unique(chosen)) == len(chosen)
  assert chosen.tolist() == protocols.label_subset(labels, 0.1, seed=0).tolist()
  assert chosen.tolist() != protocols.label_subset(labels, 0.1, seed=1).tolist()
  assert protocols.label_subset(labels, 1.0, seed=5).tolist() == list(range(163))


def test_seeds_draw_other_labels_and_spread_is_the_sample_s(dataset):
  found = evaluate(dataset, 'linear', label_fraction=0.02, seeds=(0, 1, 2))
  values = [run['accuracy'] for run in found['runs']]
  assert found['mean']['accuracy'] == pytest.approx(np.mean(values))
  assert found['std']['accuracy'] == pytest.approx(np.std(values, ddof=1))
  assert [run['num_labels'] for run in found['runs']] == [6, 6, 6]
  assert evaluate(dataset, 'linear', label_fraction=0.02, seeds=(1,))['std']['accuracy'] == 0


def test_validation_split_never_shows_test_images(dataset):
  task = protocols.make_task(dataset, 'validation')
  assert (len(task.train.labels), len(task.queries.labels)) == (240, 60)
  known = {image.tobytes() for image in dataset.train_images}
  parts = [{image.tobytes() for image in part.images} for part in (task.train, task.queries)]
  assert parts[0] | parts[1] == known and not parts[0] & parts[1]
  assert len(protocols.make_task(dataset, 'test', max_train_images=50).train.labels) == 50


def test_images_without_labels_cannot_be_evaluated(dataset):
  with pytest.raises(UsageError, match='--dataset=coloured: expected labelled'):
    protocols.make_task(dataset._replace(train_labels=None))
  with pytest.raises(UsageError, match='--dataset=coloured: expected labelled'):
    protocols.make_task(dataset._replace(test_labels=None))


def test_probe_chooses_its_penalty_without_the_queries():
  """A weak signal in many dimensions: a strong penalty is right, and the choice is the same whatever is asked."""
  generator = np.random.default_rng(0)
  labels = np.repeat([0, 1], 60)
  rows = generator.normal(size=(120, 60)).astype(np.float32) + 0.3 * labels[:, None]
  queries = generator.normal(size=(200, 60)).astype(np.float32)
  _, chosen = linear.predict(rows, labels, queries, seed=0)
  _, again = linear.predict(rows, labels, -queries[:50], seed=0)
  assert chosen == again < linear.DEFAULT_INVERSE_PENALTY
  assert linear.choose_inverse_penalty(rows[::30], labels[::30], seed=0) == linear.DEFAULT_INVERSE_PENALTY
  assert linear.predict(rows[:5], labels[:5], queries, seed=0)[0].tolist() == [0] * 200  # one class is all there is


def test_metrics_are_scikit_learn_s_and_count_absent_classes_as_said():
  generator = np.random.default_rng(0)
  labels, predicted = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
  labels[labels == 2] = 1  # class 2 never occurs, but is predicted
  found = metrics.classification_metrics(labels, predicted, 5)
  assert found['accuracy'] == pytest.approx(oracle.accuracy_score(labels, predicted))
  recall = oracle.recall_score(labels, predicted, average=None, labels=[0, 1, 3])
  assert found['mean_per_class_accuracy'] == pytest.approx(recall.mean())
  assert found['macro_recall'] == pytest.approx(recall.sum() / 4)
  assert found['macro_f1'] == pytest.approx(oracle.f1_score(labels, predicted, average='macro'))
  assert set(found) == {'accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1'}


def test_name_says_how_a_result_came_about():
  name = protocols.result_name('linear', 'digits', 0.1, split='validation', from_scratch=True)
  assert name == 'linear, digits, 10 % of labels, validation split, from scratch'
  name = protocols.result_name('knn', 'digits', 1, split='test', from_scratch=False, max_train_images=500)
  assert name == 'knn, digits, 100 % of labels, of 500 images'
