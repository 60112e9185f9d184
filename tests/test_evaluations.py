"""What of a run is evaluated, with which weights, and what is kept; the protocol itself is stood in for."""

import types

import numpy as np
import pytest

from lwfedssl_jax import pretrained, run_evaluation
from lwfedssl_jax.data.sources import ImageDataset
from lwfedssl_jax.evaluation import finetune, protocols
from lwfedssl_jax.plots import run_plots

DATASET = ImageDataset(
  'made',
  np.zeros((20, 2, 2, 3), np.uint8),
  np.arange(20, dtype=np.int32) % 2,
  np.zeros((6, 2, 2, 3), np.uint8),
  np.arange(6, dtype=np.int32) % 2,
  ('a', 'b'),
)
FOUND = {'runs': [], 'mean': {'accuracy': 0.5}, 'std': {'accuracy': 0.0}, 'confusion': [[1, 0], [0, 1]]}


@pytest.fixture
def asked(monkeypatch):
  """Records how the protocol is called; trained weights are 'trained', random ones of seed S 'random S'."""
  recorded = {}

  def evaluate(apply, get_params, protocol, task, **options):
    recorded.update(
      apply=apply, params=[get_params(seed) for seed in options['seeds']], protocol=protocol, task=task, **options
    )
    return FOUND

  config = object()
  loaded = types.SimpleNamespace(apply='apply', params='trained', config=config, rounds_done=7)
  monkeypatch.setattr(pretrained, 'load_encoder', lambda workdir: loaded)
  monkeypatch.setattr(
    pretrained,
    'random_encoder',
    lambda given, seed: types.SimpleNamespace(
      params=f'random {seed}' if given is config else 'of another configuration'
    ),
  )
  monkeypatch.setattr(protocols, 'evaluate', evaluate)
  monkeypatch.setattr(run_plots, 'write_confusion_plot', lambda *arguments: None)
  return recorded


@pytest.mark.parametrize(
  ('from_scratch', 'params'), [(False, ['trained', 'trained']), (True, ['random 3', 'random 4'])]
)
def test_scratch_is_the_same_encoder_with_random_weights_of_each_seed(asked, tmp_path, from_scratch, params):
  run_evaluation.evaluate_run(str(tmp_path), 'knn', DATASET, seeds=(3, 4), from_scratch=from_scratch)
  assert (asked['apply'], asked['params'], asked['protocol']) == ('apply', params, 'knn')


def test_everything_asked_for_reaches_the_protocol_and_the_file(asked, tmp_path):
  options = finetune.FinetuneOptions(epochs=3, learning_rate=0.5)
  result = run_evaluation.evaluate_run(
    str(tmp_path),
    'finetune',
    DATASET,
    label_fraction=0.5,
    seeds=(1,),
    split='holdout',
    max_train_images=10,
    options=options,
  )
  assert (asked['label_fraction'], asked['seeds'], asked['options']) == (0.5, (1,), options)
  assert (len(asked['task'].train.labels), len(asked['task'].queries.labels)) == (10, 4)
  (kept,) = run_evaluation.read_evaluations(str(tmp_path))
  assert (
    kept
    == result
    == FOUND
    | {
      'name': 'finetune, made, 50 % of labels, of 10 images, on holdout',
      'protocol': 'finetune',
      'dataset': 'made',
      'label_fraction': 0.5,
      'split': 'holdout',
      'train_split': 'train',
      'from_scratch': False,
      'rounds_done': 7,
      'num_train_images': 10,
      'options': options._asdict(),
    }
  )


def test_the_split_that_is_fitted_on_reaches_the_protocol_and_the_name(asked, tmp_path):
  val = {'val_images': np.ones((8, 2, 2, 3), np.uint8), 'val_labels': np.arange(8, dtype=np.int32) % 2}
  result = run_evaluation.evaluate_run(str(tmp_path), 'knn', DATASET._replace(**val), train_split='val')
  assert asked['task'].train.images.min() == 1 and len(asked['task'].train.labels) == 8
  assert (result['train_split'], result['name']) == ('val', 'knn, made, 100 % of labels, fitted on val')


def test_another_protocol_keeps_no_options_of_finetuning(asked, tmp_path):
  assert run_evaluation.evaluate_run(str(tmp_path), 'knn', DATASET)['options'] == {}
