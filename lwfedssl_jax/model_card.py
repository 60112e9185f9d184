"""The model card of a published encoder: what it is, how it was trained, what that cost, what it reaches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lwfedssl_jax import tables
from lwfedssl_jax.config import Config
from lwfedssl_jax.version import __version__


class Facts(NamedTuple):
  """What a card states.

  Attributes:
    license: of the weights.
    config: of the run.
    depth: blocks of the exported encoder.
    num_parameters: of the exported encoder.
    rounds_done: rounds of training.
    num_rounds: rounds that the run was to have.
    flops_per_image: of a client's training, over the run, a multiply-add counted as two.
    summary: the run's summary.json, None if it is unfinished.
    evaluations: results of `experiments.evaluate`.
  """

  license: str
  config: Config
  depth: int
  num_parameters: int
  rounds_done: int
  num_rounds: int
  flops_per_image: float | None
  summary: dict[str, Any] | None
  evaluations: Sequence[dict[str, Any]]


_HEADER = """---
license: {license}
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- self-supervised-learning
- federated-learning
- lw-fedssl
---
"""

_USE = """## Use

The encoder takes RGB images of {side}x{side} pixels and returns {width} numbers for each. Replace FOLDER by the path of
this folder, or `local-dir:FOLDER` by `hf-hub:NAME` once it is uploaded. `num_classes=10` adds a head to finetune.

```python
import timm
import torch

model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
embeddings = model(torch.rand(8, 3, {side}, {side}) * 2 - 1)  # in use: transform(image) of Pillow images
```

```python
import lwfedssl_jax

loaded = lwfedssl_jax.load_encoder('FOLDER')
embeddings = loaded.apply(loaded.params, images)  # uint8 (B, {side}, {side}, 3)
```
"""

_CITATION = """## Citation

Layer-wise federated self-supervised learning: Tun et al., [arXiv 2401.11647](https://arxiv.org/abs/2401.11647).
Trained with lwfedssl_jax {version}.
"""


def _table(heading: str, rows: Sequence[Sequence[str]]) -> str:
  return f'## {heading}\n\n{tables.markdown(rows)}\n'


def _training(facts: Facts) -> str:
  config = facts.config
  clients = f'{config.effective_num_clients}, {config.effective_clients_per_round} a round'
  server = 'calibration on its own images' if config.uses_calibration else 'no training of its own'
  rows = [
    ['what', 'value'],
    ['data', f'`{config.data.dataset}`, labels not used'],
    ['method', f'`{config.method.method}`, objective `{config.objective.objective}`'],
    ['clients', clients if config.is_federated else 'one, with all the data'],
    ['partition', f'`{config.partition.partition}`' if config.is_federated else '-'],
    ['server', server],
    ['rounds', f'{facts.rounds_done} of {facts.num_rounds}, {config.client.local_epochs} local epochs each'],
    ['batch size, base learning rate', f'{config.client.batch_size}, {config.client.learning_rate:g} per 256 images'],
    ['seed', str(config.run.seed)],
  ]
  return _table('Training', rows)


def _costs(facts: Facts) -> str:
  rows = [['what', 'value'], ['parameters of the encoder', f'{facts.num_parameters:,}']]
  if facts.flops_per_image is not None:
    rows.append(['training of a client, whole run', f'{facts.flops_per_image / 1e9:,.2f} GFLOPs per image'])
  if facts.summary is not None:
    rows += [
      ['downloaded by a client, mean', f'{facts.summary["download_bytes"] / 1e6:,.2f} MB'],
      ['uploaded by a client, mean', f'{facts.summary["upload_bytes"] / 1e6:,.2f} MB'],
      ['time of all rounds on the machine of the simulation', f'{facts.summary["seconds"]:,.0f} s'],
    ]
  units = 'FLOPs of both views and all branches, a multiply-add counts two. 1 MB is 10^6 bytes.'
  return f'{_table("Costs", rows)}\n{units}\n'


def _accuracies(facts: Facts) -> str:
  rows = [['protocol', 'seeds', 'accuracy']]
  summary = facts.summary or {}
  for name, key in (
    ('kNN monitor of the run, test images', 'final_knn_accuracy'),
    ('the same, random weights', 'random_init_knn_accuracy'),
    ('the same, raw pixels', 'raw_pixel_knn_accuracy'),
  ):
    if summary.get(key) is not None:
      rows.append([name, '1', f'{summary[key]:.3f}'])
  for found in facts.evaluations:
    deviation = f' ± {found["std"]["accuracy"]:.3f}' if len(found['runs']) > 1 else ''
    rows.append([found['name'], str(len(found['runs'])), f'{found["mean"]["accuracy"]:.3f}{deviation}'])
  if len(rows) == 1:
    return '## Accuracy\n\nNot measured.\n'
  note = '± is the standard deviation over seeds of the evaluation; the encoder is that of one run.'
  return f'{_table("Accuracy", rows)}\n{note}\n'


def write(facts: Facts) -> str:
  """Returns the card, Markdown with the Hub's metadata at its top."""
  config, width = facts.config, getattr(facts.config.model.traits, 'width', '-')
  title = f'{config.model.encoder}, {config.method.method} on {config.data.dataset}'
  unfinished = '' if facts.rounds_done >= facts.num_rounds else ' The run was not finished when it was exported.'
  blocks = 'one block' if facts.depth == 1 else f'{facts.depth} blocks'
  about = (
    f'A vision transformer of {blocks} of width {width}, patches of {config.model.patch_size} pixels, pretrained '
    f'without labels over simulated clients that keep their images.{unfinished} License of the weights: '
    f'{facts.license}.'
  )
  use = _USE.format(side=config.model.image_size, width=width)
  sections = [use, _training(facts), _costs(facts), _accuracies(facts), _CITATION.format(version=__version__)]
  return _HEADER.format(license=facts.license) + '\n' + '\n'.join([f'# {title}\n\n{about}\n', *sections])
