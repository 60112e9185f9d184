"""Protocols on an encoder and images whose right answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as oracle

from lwfedssl_jax import UsageError
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.evaluation import finetune, knn, linear, metrics, protocols

CLASSES = 3


def colored_images(count, seed, noise=40):
  """Each class is a color, with noise."""
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, CLASSES, count).astype(np.int32)
  images = generator.integers(0, noise, (count, 8, 8, 3))
  images[np.arange(count), :, :, labels] += 60
  return images.astype(np.uint8), labels


@pytest.fixture(scope='module')
def dataset():
  train, test = colored_images(300, 0), colored_images(90, 1)
  return ImageDataset('colored', *train, *test, ('red', 'green', 'blue'))


PARAMS = {'kernel': jnp.eye(3), 'norm': {'scale': jnp.ones(3)}}


def mean_color(params, images):
  scaled = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
  return scaled.mean((1, 2)) @ params['kernel']


def evaluate(dataset, protocol, **options):
  task = protocols.make_task(dataset, options.pop('split', 'test'), options.pop('max_train_images', 0))
  return protocols.evaluate(mean_color, lambda seed: PARAMS, protocol, task, **options)


@pytest.mark.parametrize('protocol', ['knn', 'knn_centered', 'linear'])
def test_separable_classes_are_classified(dataset, protocol):
  found = evaluate(dataset, protocol, seeds=(0, 1))
  assert found['mean']['accuracy'] > 0.95
  assert np.sum(found['confusion']) == 2 * 90
  assert [run['num_labels'] for run in found['runs']] == [300, 300]


def test_what_all_embeddings_have_in_common_is_taken_out_by_centered_knn_alone(dataset):
  """A far origin leaves cosine next to nothing to go by; the centered vote is that of no offset at all."""
  near = evaluate(dataset, 'knn_centered')
  task = protocols.make_task(dataset)

  def far(params, images):
    return mean_color(params, images) + jnp.array([100.0, -300.0, 200.0])

  plain, centered = (
    protocols.evaluate(far, lambda seed: PARAMS, protocol, task) for protocol in ('knn', 'knn_centered')
  )
  assert centered['mean']['accuracy'] == pytest.approx(near['mean']['accuracy'], abs=0.02)
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


def test_seeds_draw_other_labels_and_the_deviation_is_the_sample_s():
  images, labels = colored_images(390, 0)
  noisy = np.random.default_rng(1).permutation(labels)  # the images tell nothing, so that accuracies differ
  dataset = ImageDataset('noise', images[:300], noisy[:300], images[300:], noisy[300:], ('red', 'green', 'blue'))
  found = evaluate(dataset, 'linear', label_fraction=0.02, seeds=(0, 1, 2))
  values = [run['accuracy'] for run in found['runs']]
  assert len(set(values)) > 1, values
  assert found['mean']['accuracy'] == pytest.approx(np.mean(values))
  assert found['std']['accuracy'] == pytest.approx(np.std(values, ddof=1))
  assert [run['num_labels'] for run in found['runs']] == [6, 6, 6]
  assert evaluate(dataset, 'linear', label_fraction=0.02, seeds=(1,))['std']['accuracy'] == 0


def test_holdout_never_shows_test_images(dataset):
  task = protocols.make_task(dataset, 'holdout')
  assert (len(task.train.labels), len(task.queries.labels)) == (240, 60)
  known = {image.tobytes() for image in dataset.train_images}
  parts = [{image.tobytes() for image in part.images} for part in (task.train, task.queries)]
  assert parts[0] | parts[1] == known and not parts[0] & parts[1]
  assert len(protocols.make_task(dataset, 'test', max_train_images=50).train.labels) == 50


def test_a_limit_takes_a_fixed_sample_not_the_first_images(dataset):
  train = protocols.make_task(dataset, max_train_images=50).train
  place = {image.tobytes(): index for index, image in enumerate(dataset.train_images)}
  ids = [place[image.tobytes()] for image in train.images]
  assert ids == sorted(set(ids)) and len(ids) == 50 and ids != list(range(50))
  np.testing.assert_array_equal(train.labels, dataset.train_labels[ids])
  np.testing.assert_array_equal(protocols.make_task(dataset, max_train_images=50).train.images, train.images)


def test_holdout_is_a_fifth_of_each_class():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3, dtype=np.int32), [200, 40, 10]))
  made = ImageDataset('made', np.zeros((250, 1, 1, 3), np.uint8), labels, np.zeros((0, 1, 1, 3), np.uint8), None, 'abc')
  task = protocols.make_task(made, 'holdout')
  assert np.bincount(task.queries.labels).tolist() == [40, 8, 2]
  assert np.bincount(task.train.labels).tolist() == [160, 32, 8]


def test_centered_knn_takes_out_the_training_images_mean(dataset):
  """Queries of one class: their own mean would leave nothing of what tells them from the others."""
  red = dataset.test_labels == 0
  one_class = dataset._replace(test_images=dataset.test_images[red], test_labels=dataset.test_labels[red])
  assert evaluate(one_class, 'knn_centered')['mean']['accuracy'] > 0.95


def test_every_seed_s_weights_are_embedded(dataset):
  """Random weights differ from seed to seed, as `from_scratch` asks for: here the second ones see nothing."""
  blind = dict(PARAMS, kernel=jnp.zeros((3, 3)))
  task = protocols.make_task(dataset)
  found = protocols.evaluate(mean_color, lambda seed: [PARAMS, blind][seed], 'knn', task, seeds=(0, 1))
  first, second = (run['accuracy'] for run in found['runs'])
  assert first > 0.95 and second < 0.6


def test_confusion_has_a_row_for_each_true_class(dataset, monkeypatch):
  monkeypatch.setattr(knn, 'knn_predict', lambda bank, labels, queries, num_classes: np.full(len(queries), 2))
  counts = np.bincount(dataset.test_labels)
  assert evaluate(dataset, 'knn', seeds=(0, 1))['confusion'] == [[0, 0, 2 * count] for count in counts]


def test_a_seed_is_the_probe_s_and_the_finetuning_s(dataset, monkeypatch):
  def nothing(images):
    return np.zeros(len(images), int)

  monkeypatch.setattr(linear, 'predict', lambda rows, labels, queries, seed: (nothing(queries), seed))
  monkeypatch.setattr(finetune, 'train', lambda apply, params, examples, classes, seed, options: (params, seed))
  monkeypatch.setattr(finetune, 'classify', lambda apply, trained, images: nothing(images))
  for protocol, figure in (('linear', 'inverse_penalty'), ('finetune', 'train_loss')):
    assert [run[figure] for run in evaluate(dataset, protocol, seeds=(3, 5))['runs']] == [3, 5]


def test_finetuning_sees_the_chosen_images_with_their_labels(dataset, monkeypatch):
  seen = []
  monkeypatch.setattr(finetune, 'train', lambda *arguments: seen.append(arguments) or (PARAMS, 0.0))
  monkeypatch.setattr(finetune, 'classify', lambda apply, trained, images: np.zeros(len(images), int))
  options = finetune.FinetuneOptions(epochs=3)
  evaluate(dataset, 'finetune', seeds=(4,), label_fraction=0.1, options=options)
  ((_, params, (images, labels), num_classes, seed, passed),) = seen
  chosen = protocols.label_subset(dataset.train_labels, 0.1, 4)
  np.testing.assert_array_equal(images, dataset.train_images[chosen])
  np.testing.assert_array_equal(labels, dataset.train_labels[chosen])
  assert (params, num_classes, seed, passed) == (PARAMS, CLASSES, 4, options)


def test_images_without_labels_cannot_be_evaluated(dataset):
  with pytest.raises(UsageError, match='--dataset=colored: expected labeled'):
    protocols.make_task(dataset._replace(train_labels=None))
  with pytest.raises(UsageError, match='--dataset=colored: expected labeled'):
    protocols.make_task(dataset._replace(test_labels=None))


def with_validation(dataset, count=40):
  """The first training images as validation images too, brighter, so that they are told apart."""
  brighter = np.maximum(dataset.train_images[:count], 255)
  return dataset._replace(val_images=brighter, val_labels=dataset.train_labels[:count])


@pytest.mark.parametrize(
  ('split', 'train_split', 'sizes'),
  [
    ('val', 'train', (300, 40)),
    ('test', 'val', (40, None)),
    ('holdout', 'val', (32, 8)),
    ('test', 'train', (300, None)),
  ],
)
def test_named_splits_are_fitted_on_and_classified(dataset, split, train_split, sizes):
  task = protocols.make_task(with_validation(dataset), split, train_split=train_split)
  assert (len(task.train.images), len(task.queries.images)) == (sizes[0], sizes[1] or len(dataset.test_images))
  assert [bool((part.images == 255).all()) for part in (task.train, task.queries)] == [
    train_split == 'val',
    split == 'val' or (split, train_split) == ('holdout', 'val'),
  ]


def test_splits_that_are_missing_or_the_same_are_refused(dataset):
  with pytest.raises(UsageError, match='--dataset=colored: expected labeled validation images'):
    protocols.make_task(dataset, 'val')
  with pytest.raises(UsageError, match='--dataset=colored: expected labeled validation images'):
    protocols.make_task(dataset, train_split='val')
  has_val = with_validation(dataset)
  with pytest.raises(UsageError, match='--split: expected other images than --train_split=val of colored, got val'):
    protocols.make_task(has_val, 'val', train_split='val')
  only_val = has_val._replace(test_images=has_val.val_images, test_labels=has_val.val_labels)  # as sources.load does
  with pytest.raises(UsageError, match='--split: expected other images than --train_split=val of colored, got test'):
    protocols.make_task(only_val, train_split='val')


def test_metrics_are_scikit_learn_s_with_documented_rules_for_absent_classes():
  generator = np.random.default_rng(0)
  labels, predicted = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
  labels[labels == 2] = 1  # class 2 never occurs, but is predicted
  found = metrics.classification_metrics(labels, predicted)
  assert found['accuracy'] == pytest.approx(oracle.accuracy_score(labels, predicted))
  recall = oracle.recall_score(labels, predicted, average=None, labels=[0, 1, 3])
  assert found['mean_per_class_accuracy'] == pytest.approx(recall.mean())
  assert found['macro_recall'] == pytest.approx(recall.sum() / 4)
  assert found['macro_f1'] == pytest.approx(oracle.f1_score(labels, predicted, average='macro'))
  assert set(found) == {'accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1'}


def test_name_of_a_result_describes_its_protocol():
  name = protocols.result_name('linear', 'digits', 0.1, split='holdout', train_split='val', from_scratch=True)
  assert name == 'linear, digits, 10 % of labels, fitted on val, on holdout, from scratch'
  name = protocols.result_name('knn', 'digits', 1, split='test', from_scratch=False, max_train_images=500)
  assert name == 'knn, digits, 100 % of labels, of 500 images'
