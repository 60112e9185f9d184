"""Evaluates a run and stores the result: evaluations/NAME.json and a confusion matrix in the run's folder."""

import os
import re
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax import pretrained
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.evaluation import finetune, protocols
from lwfedssl_jax.plots import run_plots
from lwfedssl_jax.workdir import run_dir

FOLDER = 'evaluations'


def evaluate_run(
  workdir: str,
  protocol: str,
  dataset: ImageDataset,
  *,
  label_fraction: float = 1.0,
  seeds: Sequence[int] = (0,),
  split: str = 'test',
  train_split: str = 'train',
  max_train_images: int = 0,
  from_scratch: bool = False,
  options: finetune.FinetuneOptions = finetune.FinetuneOptions(),
) -> dict[str, Any]:
  """Evaluates a run's encoder, or the same architecture with random weights, and stores the result with the run.

  Args:
    workdir: the run's folder.
    protocol: `knn`, `knn_centered`, `linear` or `finetune`.
    dataset: labeled, images of the run's size.
    label_fraction: in (0, 1].
    seeds: at least one; one result each. With `from_scratch` they are also the seeds of the weights.
    split: images to classify, see `protocols.make_task`.
    train_split: images to fit on.
    max_train_images: see `protocols.make_task`.
    from_scratch: use random weights.
    options: of finetuning.

  Returns:
    As `protocols.evaluate`, and `name`, `protocol`, `dataset`, `label_fraction`, `split`, `train_split`,
    `from_scratch`.

  Raises:
    UsageError: no such run, no labels, or no seeds.
  """
  if not seeds:
    raise UsageError('--seeds: expected at least one whole number')
  loaded = pretrained.load_encoder(workdir)
  task = protocols.make_task(dataset, split, max_train_images, train_split)

  def get_params(seed):
    return pretrained.random_encoder(loaded.config, seed).params if from_scratch else loaded.params

  name = protocols.result_name(
    protocol,
    dataset.name,
    label_fraction,
    split=split,
    train_split=train_split,
    from_scratch=from_scratch,
    max_train_images=max_train_images,
  )
  found = protocols.evaluate(
    loaded.apply, get_params, protocol, task, label_fraction=label_fraction, seeds=seeds, options=options
  )
  result = {
    'name': name,
    'protocol': protocol,
    'dataset': dataset.name,
    'label_fraction': label_fraction,
    'split': split,
    'train_split': train_split,
    'from_scratch': from_scratch,
    'rounds_done': loaded.rounds_done,
    'num_train_images': len(task.train.images),
    'options': options._asdict() if protocol == 'finetune' else {},
    **found,
  }
  folder = os.path.join(workdir, FOLDER)
  os.makedirs(folder, exist_ok=True)
  path = os.path.join(folder, re.sub(r'[^\w.]+', '_', name))
  run_dir.write_json(f'{path}.json', result)
  run_plots.write_confusion_plot(f'{path}.png', result['confusion'], task.class_names, name)
  return result


def read_evaluations(workdir: str) -> list[dict[str, Any]]:
  """Returns the results stored in a run's folder, by name."""
  folder = os.path.join(workdir, FOLDER)
  files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
  return [run_dir.read_json(os.path.join(folder, file)) for file in files if file.endswith('.json')]
