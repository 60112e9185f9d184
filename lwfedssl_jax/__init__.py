"""Layer-wise federated self-supervised learning (LW-FedSSL, arXiv 2401.11647) in JAX and Flax.

    config = lwfedssl_jax.configure(dataset='digits', method='lw_fedssl', workdir='runs/mine')
    summary = lwfedssl_jax.train(config)
    loaded = lwfedssl_jax.load_encoder('runs/mine')
    embeddings = loaded.apply(loaded.params, images)

Names are imported on first use, so that `import lwfedssl_jax` does not load jax.
"""

import importlib
from typing import TYPE_CHECKING

from lwfedssl_jax.catalog import register_method
from lwfedssl_jax.config import Config, configure
from lwfedssl_jax.config_fields import ConfigFields
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.version import __version__

if TYPE_CHECKING:
  from lwfedssl_jax.data.federated_dataset import partition_dataset
  from lwfedssl_jax.data.sources import ImageDataset
  from lwfedssl_jax.data.sources import load as load_dataset
  from lwfedssl_jax.export import export_encoder
  from lwfedssl_jax.federated.aggregation import register_aggregator
  from lwfedssl_jax.hub import write_folder as publish_encoder
  from lwfedssl_jax.models import register_encoder
  from lwfedssl_jax.objectives import register_objective
  from lwfedssl_jax.pretrained import LoadedEncoder, load_encoder
  from lwfedssl_jax.report.files import write_report
  from lwfedssl_jax.resources.costs import method_cost
  from lwfedssl_jax.run_evaluation import evaluate_run
  from lwfedssl_jax.training.train import train

# Public name -> (module, name in it).
_LAZY = {
  'train': ('training.train', 'train'),
  'load_encoder': ('pretrained', 'load_encoder'),
  'LoadedEncoder': ('pretrained', 'LoadedEncoder'),
  'load_dataset': ('data.sources', 'load'),
  'ImageDataset': ('data.sources', 'ImageDataset'),
  'partition_dataset': ('data.federated_dataset', 'partition_dataset'),
  'evaluate_run': ('run_evaluation', 'evaluate_run'),
  'export_encoder': ('export', 'export_encoder'),
  'publish_encoder': ('hub', 'write_folder'),
  'write_report': ('report.files', 'write_report'),
  'register_aggregator': ('federated.aggregation', 'register_aggregator'),
  'register_encoder': ('models', 'register_encoder'),
  'register_objective': ('objectives', 'register_objective'),
  'method_cost': ('resources.costs', 'method_cost'),
}

__all__ = [
  'Config',
  'ConfigFields',
  'ImageDataset',
  'LoadedEncoder',
  'UsageError',
  '__version__',
  'configure',
  'evaluate_run',
  'export_encoder',
  'load_dataset',
  'load_encoder',
  'method_cost',
  'partition_dataset',
  'publish_encoder',
  'register_aggregator',
  'register_encoder',
  'register_method',
  'register_objective',
  'train',
  'write_report',
]


if not TYPE_CHECKING:  # a type checker that sees a module's __getattr__ accepts every name

  def __getattr__(name):
    if name not in _LAZY:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(f'{__name__}.{module}'), attribute)


def __dir__() -> list[str]:
  return sorted(__all__)
