"""Runs as training leaves them, written by hand, and their costs without compiling anything."""

import html.parser
import json

import numpy as np

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages
from lwfedssl_jax.report import runs
from lwfedssl_jax.report.tables import Entry, make_entries
from lwfedssl_jax.resources import costs
from lwfedssl_jax.workdir import metrics_writer, run_dir

MONITORED = {'knn_accuracy': 0.5, 'random_knn_accuracy': 0.2, 'effective_rank': 5.0, 'embedding_std': 0.8}
ENVIRONMENT = {
  'started': '2026-03-04T05:06:07+00:00',
  'command': 'python -m experiments.sweep --seeds=0,1',
  'host_kind': 'a host',
  'device_kind': 'cpu',
  'num_devices': 1,
  'git_revision': 'abcdef0123',
  'versions': {'jax': '0.10'},
}


def config_of(**values) -> configs.Config:
  return configs.configure(
    **{
      'dataset': 'digits',
      'image_size': 8,
      'patch_size': 4,
      'batch_size': 4,
      'num_clients': 2,
      'rounds_per_stage': 1,
      'blocks_per_stage': 2,
      **values,
    }
  )


def _rows(accuracy):
  for index in range(2):
    measured = MONITORED | {'knn_accuracy': None if accuracy is None else accuracy - 0.1 * (1 - index)}
    yield {
      'round': index,
      'stage': index,
      'loss': 3.0 - index,
      'client_divergence': 0.01 * (1 + index),
      'download_bytes': 1e6,
      'upload_bytes': 2e6,
      'client_ids': [1, 0],
      'client_losses': [None, 2.5 - index],
      'client_download_bytes': [1e6, 1e6],
      'client_upload_bytes': [0, 4e6],
      'rejected_clients': [1] * index,
      **measured,
    }


def write_run(folder, seed=0, accuracy=0.6, environment=None, finished=True, **values) -> str:
  """Writes two rounds of two stages: client 1 does not return in the first, and is rejected in the second."""
  config = config_of(seed=seed, workdir=str(folder), **values)
  folder.mkdir(parents=True)
  run_dir.write_json(
    str(folder / run_dir.CONFIG),
    {'format': run_dir.FORMAT, 'config': configs.flatten(config), **(ENVIRONMENT | (environment or {}))},
  )
  (folder / metrics_writer.METRICS).write_text(''.join(json.dumps(row) + '\n' for row in _rows(accuracy)))
  (folder / 'partition.json').write_text(json.dumps({'clients': [[1, 2, 3], [4, 5]], 'server': []}))
  if not finished:
    return str(folder)
  run_dir.write_json(
    str(folder / run_dir.SUMMARY),
    {
      'method': config.method.method,
      'objective': 'moco_v3',
      'encoder': 'vit_micro',
      'dataset': config.data.dataset,
      'seed': seed,
      'num_clients': 2,
      'num_rounds': 2,
      'final_knn_accuracy': accuracy,
      'random_init_knn_accuracy': None if accuracy is None else 0.2,
      'raw_pixel_knn_accuracy': None if accuracy is None else 0.9,
      'download_bytes': 2e6,
      'upload_bytes': 4e6 + seed,
      'seconds': 10.0,
      'params_sha256': f'{seed:064d}',
    },
  )
  return str(folder)


def add_embeddings(folder, class_names=('3', 'cat', 'dog')):
  generator, labels = np.random.default_rng(0), np.arange(40) % 3 if class_names else np.full(40, -1)
  run_dir.write_arrays(
    str(folder / run_dir.EMBEDDINGS),
    {
      'trained': generator.normal(size=(40, 8)) + labels[:, None],
      'random': generator.normal(size=(40, 8)),
      'labels': labels,
      'class_names': np.array(class_names, np.str_),
    },
  )


def add_evaluation(folder, accuracy):
  (folder / 'evaluations').mkdir()
  metrics = {
    'accuracy': accuracy,
    'mean_per_class_accuracy': 0.5,
    'macro_precision': 0.5,
    'macro_recall': 0.5,
    'macro_f1': 0.5,
  }
  run_dir.write_json(
    str(folder / 'evaluations' / 'linear.json'),
    {'name': 'linear, digits, 10 % of labels', 'from_scratch': False, 'runs': [{'seed': 0, **metrics}]},
  )


def fake_costs(monkeypatch, megabytes):
  """Replaces costs of convention "actual": `megabytes` {method: memory}; FLOPs are 1e9 a megabyte."""
  counted = costs.method_cost

  def method_cost(config, image_size, convention):
    if convention != 'actual':
      return counted(config, image_size, convention)
    peak = int(megabytes[config.method.method] * 1e6)
    parts = dict.fromkeys(costs.PARTS, 1e6)
    return costs.MethodCost(
      config.method.method,
      convention,
      tuple(
        costs.StageCost(
          plan.stage,
          plan.num_rounds,
          3,
          plan.start,
          plan.stop,
          parts,
          parts,
          1000.0 * peak / len(stages.make_plans(config)),
          None,
          peak,
          0,
        )
        for plan in stages.make_plans(config)
      ),
    )

  monkeypatch.setattr(costs, 'method_cost', method_cost)


def read_entries(folders) -> list[Entry]:
  return make_entries(runs.group([runs.read_run(folder) for folder in folders]))


class Page(html.parser.HTMLParser):
  """Collects tags with their attributes, and the text inside each."""

  def __init__(self, text):
    super().__init__()
    self.found, self.open, self.texts = [], [], []
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    self.found.append((tag, dict(attributes)))
    if tag not in ('meta', 'link', 'img', 'br'):
      self.open.append((tag, len(self.texts)))
      self.texts.append([tag, ''])

  def handle_endtag(self, tag):
    while self.open and self.open.pop()[0] != tag:
      pass

  def handle_data(self, data):
    for _, index in self.open:
      self.texts[index][1] += data

  def all(self, tag):
    return [attributes for name, attributes in self.found if name == tag]

  def text(self, tag):
    return [text for name, text in self.texts if name == tag]
