"""Publishes an encoder: a folder in the layout of the Hugging Face Hub that timm and `load_encoder` read.

timm reads the folder by `local-dir:PATH`, and by `hf-hub:NAME` once it is uploaded. Nothing is uploaded here.
"""

import json
import os
from typing import Any

import jax

from lwfedssl_jax import config as configs
from lwfedssl_jax import export, model_card, pretrained, run_evaluation
from lwfedssl_jax.base import ExportedEncoder
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.pretrained import LoadedEncoder
from lwfedssl_jax.resources import costs
from lwfedssl_jax.stages import make_plans
from lwfedssl_jax.version import __version__
from lwfedssl_jax.workdir import run_dir

CARD = 'README.md'


def describe(loaded: LoadedEncoder, exported: ExportedEncoder) -> dict[str, Any]:
  """Returns the content of config.json: timm's keys, and ours for `load_encoder`."""
  arguments = dict(exported.description['arguments'])
  num_classes, side = arguments.pop('num_classes'), loaded.config.model.image_size
  return {
    'architecture': exported.description['timm_architecture'],
    'num_classes': num_classes,
    'num_features': loaded.encoder.width,
    'global_pool': arguments['global_pool'],
    'model_args': arguments,
    'pretrained_cfg': {
      'tag': 'lwfedssl',
      'custom_load': False,
      'input_size': [arguments['in_chans'], side, side],
      'fixed_input_size': True,
      'interpolation': 'bicubic',
      'crop_pct': 1.0,
      'crop_mode': 'center',
      'mean': list(export.NORMALIZATION['mean']),
      'std': list(export.NORMALIZATION['std']),
      'num_classes': num_classes,
      'pool_size': None,
      'first_conv': exported.description['first_conv'],
      'classifier': exported.description['classifier'],
    },
    pretrained.OWN_KEY: {
      'version': __version__,
      'rounds_done': loaded.rounds_done,
      'config': configs.flatten(loaded.config),
    },
  }


def _without_paths(config: Config) -> Config:
  """Returns a configuration that tells nothing of the machine: no folders, and the last name of data in files."""

  def shorten(spec: str) -> str:
    kind, colon, path = spec.partition(':')
    return f'{kind}:{os.path.basename(os.path.normpath(path))}' if colon and os.path.exists(path) else spec

  return configs.with_values(
    config,
    {
      'dataset': shorten(config.data.dataset),
      'auxiliary_dataset': shorten(config.data.auxiliary_dataset),
      'partition': shorten(config.partition.partition),
      'data_dir': '',
      'cache_dir': '',
      'workdir': '',
      'resume': False,
    },
  )


def _gather_facts(workdir: str, loaded: LoadedEncoder, license: str) -> model_card.Facts:
  summary_path = os.path.join(workdir, run_dir.SUMMARY)
  cost = costs.method_cost(loaded.config, loaded.config.model.image_size, 'actual', with_memory=False)
  return model_card.Facts(
    license=license,
    config=loaded.config,
    depth=loaded.depth,
    num_parameters=sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
    rounds_done=loaded.rounds_done,
    num_rounds=sum(plan.num_rounds for plan in make_plans(loaded.config)),
    flops_per_image=cost.total_flops,
    summary=run_dir.read_json(summary_path) if os.path.exists(summary_path) else None,
    evaluations=run_evaluation.read_evaluations(workdir),
  )


def write_folder(workdir: str, folder: str, license: str) -> list[str]:
  """Writes model.safetensors, config.json and README.md, the model card; returns their paths.

  Args:
    workdir: the run, which may be unfinished.
    folder: to write to; it is created. Files of these names are replaced.
    license: of the weights, an identifier of the Hub such as `apache-2.0`.

  Raises:
    UsageError: no license; no run; an encoder that timm does not have; or the folder cannot be written.
  """
  if not license:
    raise UsageError('--license: expected the license of the weights, such as apache-2.0 or cc-by-nc-4.0')
  if os.path.exists(os.path.join(folder, run_dir.LOCK)):
    raise UsageError(f'--output: expected a folder of its own, {folder} holds a run')
  loaded = pretrained.load_encoder(workdir)
  loaded = loaded._replace(config=_without_paths(loaded.config))
  exported = export.convert(loaded)
  if 'timm_architecture' not in exported.description or loaded.encoder.restore is None:
    raise UsageError(f'--layout=hf: expected an encoder that timm has, got {loaded.config.model.encoder}')
  texts = {
    pretrained.DESCRIPTION: json.dumps(describe(loaded, exported), indent=2) + '\n',
    CARD: model_card.write(_gather_facts(workdir, loaded, license)),
  }
  weights, paths = os.path.join(folder, pretrained.WEIGHTS), [os.path.join(folder, name) for name in texts]
  try:
    os.makedirs(folder, exist_ok=True)
    export.save_tensors(exported.tensors, weights)
    for path, text in zip(paths, texts.values()):
      with open(path, 'w', encoding='utf-8') as file:
        file.write(text)
  except OSError as error:
    raise UsageError(f'--output: expected a folder that can be written, {folder}: {error.strerror}') from error
  return [weights, *paths]
