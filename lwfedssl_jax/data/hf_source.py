"""Hugging Face data sets, `hf:NAME_OR_PATH`, read by the package datasets (extra `hf`).

PATH is a folder written by `save_to_disk`; it is read offline. A NAME on the Hub is downloaded by that package into its
own cache, the only source that uses the network.
"""

import os
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax.data import columns, images
from lwfedssl_jax.errors import UsageError

_VAL_SPLITS = ('validation', 'val', 'valid')
_MARKS = ('dataset_dict.json', 'state.json')  # files of `save_to_disk`, of several splits or one


def _datasets() -> Any:
  try:
    import datasets
  except ImportError as e:
    raise UsageError(
      "--dataset=hf:NAME_OR_PATH: cannot read it without the package datasets, run pip install 'lwfedssl-jax[hf]' "
      f'({images.one_line(e)})'
    ) from e
  return datasets


def open_hf(argument: str, data_dir: str) -> images.Source:
  """Finds `hf:PATH`, a folder of `save_to_disk`, or `hf:NAME[:CONFIG]` on the Hub; `data_dir` is not used.

  The splits are `train`, `test` and `validation` (or `val`, `valid`); a folder of one split is `train`. Images are the
  column `image`, or the first of type Image. Labels are the column `label` of type ClassLabel, or the only one of that
  type.

  Raises:
    UsageError: the package is missing, or the data set cannot be loaded or has no images.
  """
  del data_dir
  path = os.path.abspath(os.path.expanduser(argument))
  if any(os.path.isfile(os.path.join(path, mark)) for mark in _MARKS):
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return images.Source(tuple(files), lambda: _open(argument, _load(argument, path)))
  if os.path.isdir(path):
    raise UsageError(f'--dataset=hf:{argument}: expected a folder written by save_to_disk, with {" or ".join(_MARKS)}')
  if argument.startswith(('.', '/', '~')):
    raise UsageError(f'--dataset=hf:{argument}: expected a folder written by save_to_disk, found none')
  splits = _load(argument)
  files = sorted({found['filename'] for split in splits.values() for found in split.cache_files})
  return images.Source(tuple(files), lambda: _open(argument, splits))


def _load(argument: str, path: str = '') -> dict[str, Any]:
  """Returns {split: datasets.Dataset}, from a folder or, without one, from the Hub."""
  datasets = _datasets()
  name, _, config = argument.partition(':')
  try:
    found = datasets.load_from_disk(path) if path else datasets.load_dataset(name, config or None)
  except Exception as e:  # of the network, the Hub or a damaged file: nearly anything
    raise UsageError(f'--dataset=hf:{argument}: expected a data set that can be loaded: {images.one_line(e)}') from e
  return dict(found) if isinstance(found, dict) else {'train': found}


def _open(argument: str, splits: dict[str, Any]) -> images.Opened:
  if 'train' not in splits:
    raise UsageError(f'--dataset=hf:{argument}: expected a split train, found {", ".join(splits) or "none"}')
  features = splits['train'].features
  kinds = {name: type(feature).__name__ for name, feature in features.items()}
  image_key, label_key = columns.find_image(kinds), columns.find_label(kinds)
  if image_key is None or kinds[image_key] != 'Image':
    raise UsageError(f'--dataset=hf:{argument}: expected a column of type Image, found {", ".join(features) or "none"}')

  def make(*names):
    found = next((name for name in names if name in splits), None)
    return _to_split(argument, found, splits[found], image_key, label_key) if found else images.EMPTY_SPLIT

  class_names = tuple(features[label_key].names) if label_key else ()
  return images.Opened(make('train'), make('test'), class_names, val=make(*_VAL_SPLITS))


def _to_split(argument: str, name: str, split: Any, image_key: str, label_key: str | None) -> images.Split:
  """Wraps one split; its images are left encoded."""
  datasets = _datasets()
  wanted = [key for key in (image_key, label_key) if key]
  missing = [key for key in wanted if key not in split.features]
  if missing:
    raise UsageError(f'--dataset=hf:{argument}: expected the column {missing[0]} of split train in split {name} too')
  encoded = split.select_columns(wanted).cast_column(image_key, datasets.Image(decode=False))

  def where(index):
    return f'hf:{argument}: {name}[{index}]'

  def read(indices: Sequence[int]) -> list[tuple[images.RawImage, int]]:
    rows = encoded[list(indices)]
    labels = rows[label_key] if label_key else [0] * len(rows[image_key])
    return [(_raw(image), -1 if label is None else label) for image, label in zip(rows[image_key], labels)]

  return images.Split(len(encoded), read, where, label_key is not None)


def _raw(image: dict[str, Any] | None) -> images.RawImage:
  """Returns the bytes of an image file, its path where the data set has no bytes, or nothing for a missing image."""
  return (image or {}).get('bytes') or (image or {}).get('path') or b''
