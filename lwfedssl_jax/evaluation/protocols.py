"""Evaluation by the field's protocols: kNN, linear probe, finetuning, on all labels or few, over seeds.

The protocol is part of a result's name. No setting is chosen on the images that are reported.

`knn_centered` subtracts the mean embedding of the training images first. Heads that normalize over the batch remove the
common mean of embeddings: it is unconstrained by the loss, and it dominates cosine similarity (docs/results.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import model_selection
from sklearn.metrics import confusion_matrix

from lwfedssl_jax import rng
from lwfedssl_jax.base import Apply, Float, Int, Params, UInt8
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.evaluation import embeddings, finetune, knn, linear, metrics

HOLDOUT_SHARE = 0.2
FROM_SCRATCH = ', from scratch'  # ends the name of a result of random weights


class Labeled(NamedTuple):
  """Images and labels."""

  images: UInt8[np.ndarray, 'N H W C']
  labels: Int[np.ndarray, ' N']


class Task(NamedTuple):
  """An evaluation task: labeled images to train on, queries, class names, and a name for results."""

  train: Labeled
  queries: Labeled
  class_names: tuple[str, ...]
  name: str

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


def _get_split(dataset: ImageDataset, split: str) -> Labeled:
  """Returns the labeled images of `train`, `val` or `test`. Raises UsageError."""
  images, labels = {
    'train': (dataset.train_images, dataset.train_labels),
    'val': (dataset.val_images, dataset.val_labels),
    'test': (dataset.test_images, dataset.test_labels),
  }[split]
  if images is None or labels is None or not len(labels):
    kind = {'train': 'training', 'val': 'validation', 'test': 'test'}[split]
    raise UsageError(f'--dataset={dataset.name}: expected labeled {kind} images')
  return Labeled(images, labels)


def make_task(
  dataset: ImageDataset, split: str = 'test', max_train_images: int = 0, train_split: str = 'train'
) -> Task:
  """Splits a data set for evaluation.

  Args:
    dataset: labeled.
    split: images to classify: `test`; `val`, the data set's own validation images; or `holdout`, a fixed, stratified
      fifth of the images of `train_split`, for choosing settings.
    max_train_images: number of training images to use, drawn by a fixed seed; 0: all.
    train_split: images to fit on, `train` or `val`.

  Raises:
    UsageError: the data set lacks one of the splits, or its labels; or both splits are the same images.
  """
  fitted = _get_split(dataset, train_split)
  ids = np.arange(len(fitted.images))
  if split == 'holdout':
    ids, held = model_selection.train_test_split(
      ids,
      test_size=HOLDOUT_SHARE,
      stratify=fitted.labels,
      random_state=rng.host_seed(0, rng.Stream.VALIDATION_SPLIT),
    )
    queries = Labeled(fitted.images[np.sort(held)], fitted.labels[np.sort(held)])
  else:
    queries = _get_split(dataset, split)
    if queries.images is fitted.images:
      raise UsageError(
        f'--split: expected other images than --train_split={train_split} of {dataset.name}, got {split}'
      )
  if max_train_images:
    ids = rng.host_generator(0, rng.Stream.EVALUATION_SUBSET).permutation(ids)[:max_train_images]
  ids = np.sort(ids)
  return Task(Labeled(fitted.images[ids], fitted.labels[ids]), queries, dataset.class_names, dataset.name)


def label_subset(labels: Int[np.ndarray, ' N'], fraction: float, seed: int) -> Int[np.ndarray, ' _']:
  """Returns sorted indices of a share of each class, rounded, at least one image a class; all of them if it is 1."""
  if fraction == 1:
    return np.arange(len(labels))
  generator = rng.host_generator(seed, rng.Stream.LABEL_SUBSET)
  chosen = [
    generator.permutation(ids)[: max(1, round(fraction * len(ids)))]
    for ids in (np.flatnonzero(labels == label) for label in np.unique(labels))
  ]
  return np.sort(np.concatenate(chosen))


def result_name(
  protocol: str,
  dataset: str,
  label_fraction: float,
  *,
  split: str = 'test',
  train_split: str = 'train',
  from_scratch: bool = False,
  max_train_images: int = 0,
) -> str:
  """Returns the name of a result, which describes its protocol: 'linear, digits, 10 % of labels'."""
  parts = [protocol, dataset, f'{100 * label_fraction:g} % of labels']
  parts += [f'of {max_train_images} images'] * bool(max_train_images)
  parts += [f'fitted on {train_split}'] * (train_split != 'train') + [f'on {split}'] * (split != 'test')
  return ', '.join(parts) + FROM_SCRATCH * from_scratch


def evaluate(
  apply: Apply,
  get_params: Callable[[int], Params],
  protocol: str,
  task: Task,
  *,
  label_fraction: float = 1.0,
  seeds: Sequence[int] = (0,),
  options: finetune.FinetuneOptions = finetune.FinetuneOptions(),
) -> dict[str, Any]:
  """Evaluates an encoder.

  Args:
    apply: (params, images) -> embeddings, as `LoadedEncoder.apply`.
    get_params: seed -> parameters; the same object for every seed if they are pretrained.
    protocol: one of catalog.PROTOCOLS.
    task: see `make_task`.
    label_fraction: in (0, 1], of each class's training labels, drawn by the seed.
    seeds: of the label subset, the probe's held-out part, the finetuning; one result each.
    options: of finetuning.

  Returns:
    `runs`, a dict of metrics (see metrics.py), `seed`, `num_labels` and the protocol's own figure for each seed; `mean`
    and `std` (over seeds, of the sample; 0 for one seed) of the metrics; `confusion`, counts (C, C) summed over seeds,
    rows the true classes.
  """
  embedded: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by identity of the parameters

  def embed_rows(params: Params) -> tuple[Float[np.ndarray, 'N D'], Float[np.ndarray, 'Q D']]:
    if id(params) not in embedded:
      embedded.clear()
      embedded[id(params)] = embed(apply, params, task.train.images), embed(apply, params, task.queries.images)
    return embedded[id(params)]

  runs: list[dict[str, Any]] = []
  confusion = np.zeros((task.num_classes, task.num_classes), int)
  for seed in seeds:
    chosen, params = label_subset(task.train.labels, label_fraction, seed), get_params(seed)
    labels, extra = task.train.labels[chosen], {}
    if protocol == 'finetune':
      examples = (task.train.images[chosen], labels)
      trained, extra['train_loss'] = finetune.train(apply, params, examples, task.num_classes, seed, options)
      predicted = finetune.classify(apply, trained, task.queries.images)
    else:
      rows, queries = embed_rows(params)
      if protocol == 'linear':
        predicted, extra['inverse_penalty'] = linear.predict(rows[chosen], labels, queries, seed)
      else:
        origin = rows.mean(axis=0) if protocol == 'knn_centered' else np.float32(0)
        predicted = knn.knn_predict(rows[chosen] - origin, labels, queries - origin, task.num_classes)
    found = metrics.classification_metrics(task.queries.labels, predicted)
    confusion += confusion_matrix(task.queries.labels, predicted, labels=np.arange(task.num_classes))
    runs.append({'seed': seed, 'num_labels': len(chosen), **found, **extra})
  over_seeds = {name: np.array([run[name] for run in runs]) for name in found}

  def deviation(values):
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0

  return {
    'runs': runs,
    'mean': {name: float(values.mean()) for name, values in over_seeds.items()},
    'std': {name: deviation(values) for name, values in over_seeds.items()},
    'confusion': confusion.tolist(),
  }


def embed(apply: Apply, params: Params, images: UInt8[np.ndarray, 'N H W C']) -> Float[np.ndarray, 'N D']:
  """Returns embeddings, float32, batch by batch."""
  compiled = embeddings.jitted(apply)
  return embeddings.in_batches(lambda batch: compiled(params, batch), images)
