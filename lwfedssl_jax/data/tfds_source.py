"""TFDS data sets prepared as array_record, read without TensorFlow, never downloaded.

The prepared folder is found by its layout, DATA_DIR/NAME[/CONFIG]/VERSION. A missing data set is therefore reported at
once, and a cached one does not import tensorflow_datasets.
"""

import difflib
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from lwfedssl_jax.data import columns, images
from lwfedssl_jax.errors import UsageError

_NAME = re.compile(r'(?P<name>[A-Za-z_]\w*)(?:/(?P<config>[\w.+-]+))?(?::(?P<version>\d+\.\d+\.\d+))?')
_VERSION = re.compile(r'\d+\.\d+\.\d+')
_VAL_SPLITS = ('validation', 'val')


def _tfds() -> Any:
  try:
    import tensorflow_datasets
  except ImportError as e:
    raise UsageError(
      "--dataset=tfds:NAME: cannot read it without TensorFlow Datasets, run pip install 'lwfedssl-jax[tfds]' "
      f'({images.one_line(e)})'
    ) from e
  return tensorflow_datasets


def _subfolders(path: str) -> list[str]:
  try:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith('.'))
  except OSError:
    return []


def _versions(path: str) -> list[str]:
  """Returns the prepared versions below a folder, newest first."""
  found = [
    v for v in _subfolders(path) if _VERSION.fullmatch(v) and os.path.isfile(os.path.join(path, v, 'dataset_info.json'))
  ]
  return sorted(found, key=lambda v: [int(n) for n in v.split('.')], reverse=True)


def prepared_names(root: str) -> list[str]:
  """Returns the data sets prepared in a TFDS folder, as NAME or NAME/CONFIG."""
  names = []
  for name in _subfolders(root):
    folder = os.path.join(root, name)
    configs = [c for c in _subfolders(folder) if _versions(os.path.join(folder, c))]
    names += ([name] if _versions(folder) else []) + [f'{name}/{config}' for config in configs]
  return names


def prepare_command(name: str, root: str) -> str:
  """Returns the shell command that prepares a stock data set as array_record."""
  code = (
    f'import tensorflow_datasets as tfds; tfds.builder("{name}", data_dir="{root}", '
    'file_format="array_record").download_and_prepare()'
  )
  return f'python -c {shlex.quote(code)}'


def _missing(name: str, full_name: str, root: str) -> UsageError:
  """Explains a data set that is not there."""
  prepared = prepared_names(root)
  there = f'prepared there: {", ".join(prepared)}' if prepared else 'nothing is prepared there'
  known = _tfds().list_builders(with_community_datasets=False)
  if name not in known:
    close = difflib.get_close_matches(name, known, 1)
    hint = f' (did you mean {close[0]}?)' if close else ''
    return UsageError(
      f'--dataset=tfds:{full_name}: not in {root} ({there}) and no stock TFDS data set{hint}; prepare your own '
      'builder there with file_format="array_record"'
    )
  return UsageError(
    f'--dataset=tfds:{full_name}: expected it in {root} ({there}), see --data_dir; to prepare it (this step alone '
    f'needs tensorflow installed): {prepare_command(full_name, root)}'
  )


def _read_json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding='utf-8') as f:
      value = json.load(f)
    if not isinstance(value, dict):
      raise ValueError('not an object')
    return value
  except (OSError, ValueError) as e:
    raise UsageError(f'{path}: expected the JSON description of a TFDS data set: {images.one_line(e)}') from e


def _find(argument: str, root: str) -> str:
  """Returns the folder of a prepared data set in array_record format."""
  match = _NAME.fullmatch(argument)
  if not match:
    raise UsageError(f'--dataset: expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION, got tfds:{argument!r}')
  name, config, version = match['name'], match['config'], match['version']
  folder = os.path.join(root, *filter(None, (name, config)))
  if not config and not _versions(folder):
    configs = [c for c in _subfolders(folder) if _versions(os.path.join(folder, c))]
    if len(configs) > 1:
      raise UsageError(f'--dataset=tfds:{argument}: expected one of {", ".join(f"{name}/{c}" for c in configs)}')
    folder = os.path.join(folder, *configs)
  versions = _versions(folder)
  if version and versions and version not in versions:
    raise UsageError(f'--dataset=tfds:{argument}: expected one of the versions {", ".join(versions)} in {folder}')
  if not versions:
    raise _missing(name, argument, root)
  formats = set()
  for candidate in [version] if version else versions:
    path = os.path.join(folder, candidate)
    info = _read_json(os.path.join(path, 'dataset_info.json'))
    found = {info.get('fileFormat') or 'tfrecord', *info.get('alternativeFileFormats', ())}
    if 'array_record' in found:
      return path
    formats |= found
  other = root.rstrip(os.sep) + '_array_record'
  raise UsageError(
    f'--dataset=tfds:{argument}: {folder} holds {", ".join(sorted(formats))}, expected array_record; prepare it in '
    f'another folder (this step alone needs tensorflow installed) and give --data_dir={other}: '
    f'{prepare_command(argument, other)}'
  )


def open_tfds(argument: str, data_dir: str) -> images.Source:
  """Finds `tfds:NAME[/CONFIG][:VERSION]` in `data_dir` (empty: $TFDS_DATA_DIR or ~/tensorflow_datasets).

  The splits are `train`, `test` and `validation` (or `val`). Labels are the feature `label`, or the only ClassLabel.

  Raises:
    UsageError: not prepared there as array_record; the message has the command that prepares it.
  """
  root = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  folder = _find(argument, os.path.abspath(os.path.expanduser(root)))
  files = tuple(sorted(entry.path for entry in os.scandir(folder) if entry.is_file()))
  return images.Source(files, lambda: _open(argument, folder))


def _open(argument: str, folder: str) -> images.Opened:
  tfds = _tfds()
  try:
    builder = tfds.builder_from_directory(folder, file_format='array_record')
    splits, features = builder.info.splits, builder.info.features
    feature_types = {key: type(feature).__name__ for key, feature in features.items()}
  except Exception as e:  # a damaged description raises nearly anything
    raise UsageError(f'{folder}: expected a TFDS data set: {images.one_line(e)}') from e
  if 'train' not in splits:
    raise UsageError(f'--dataset=tfds:{argument}: expected a split train, found {", ".join(splits) or "none"}')
  image_key, label_key = columns.find_image(feature_types), columns.find_label(feature_types)
  if image_key is None or feature_types[image_key] not in ('Image', 'Tensor'):
    raise UsageError(f'--dataset=tfds:{argument}: expected a feature "image", found {", ".join(features)}')
  if feature_types[image_key] == 'Image' and np.dtype(features[image_key].np_dtype).kind != 'u':
    raise UsageError(f'--dataset=tfds:{argument}: expected integer images, found {features[image_key].np_dtype}')
  encoded = feature_types[image_key] == 'Image'

  def make(*names):
    found = next((name for name in names if name in splits), None)
    return _to_split(tfds, builder, found, image_key, label_key, encoded) if found else images.EMPTY_SPLIT

  class_names = tuple(features[label_key].names) if label_key else ()
  return images.Opened(make('train'), make('test'), class_names, val=make(*_VAL_SPLITS))


def _to_split(tfds: Any, builder: Any, name: str, image_key: str, label_key: str | None, encoded: bool) -> images.Split:
  """Wraps one split. Encoded images are left to `images`; tensors are decoded by TFDS."""
  info = builder.info.splits[name]
  paths, ends = [str(path) for path in info.filepaths], np.cumsum(info.shard_lengths)

  def where(index):
    return f'{paths[int(np.searchsorted(ends, index, side="right"))]} (record {index} of {name})'

  for path in paths:
    if not os.path.isfile(path):
      raise UsageError(f'{path}: expected a record file of the data set, found none')
  method = tfds.decode.DeserializeMethod

  def damaged(place, e):
    return UsageError(f'{place}: expected a valid record file: {images.one_line(e)}')

  try:
    # RAW_BYTES: parsing tf.train.Example ourselves takes a tenth of the time TFDS takes to decode features.
    source = builder.as_data_source(
      name, deserialize_method=method.RAW_BYTES if encoded else method.DESERIALIZE_AND_DECODE
    )
    length = len(source)
  except Exception as e:
    raise damaged(paths[0], e) from e
  if length != info.num_examples:
    raise UsageError(f'{paths[0]}: expected {info.num_examples} records in split {name}, found {length}')
  parse = (
    _example_parser(image_key, label_key)
    if encoded
    else (lambda element: (np.asarray(element[image_key]), int(element[label_key]) if label_key else 0))
  )

  def read(indices: Sequence[int]) -> list[tuple[images.RawImage, int]]:
    try:
      return [parse(record) for record in source.__getitems__(list(indices))]
    except Exception:  # array_record raises RuntimeError, IndexError, ...: find the record, to name its file
      return [read_one(index) for index in indices]

  def read_one(index: int) -> tuple[images.RawImage, int]:
    try:
      return parse(source[index])
    except Exception as e:
      raise damaged(where(index), e) from e

  return images.Split(length, read, where, label_key is not None)


def _example_parser(image_key: str, label_key: str | None) -> Any:
  """Returns a function: serialized tf.train.Example -> (encoded image, label)."""
  from tensorflow_datasets.proto import tf_example_pb2

  def parse(record: bytes) -> tuple[bytes, int]:
    feature = tf_example_pb2.Example.FromString(record).features.feature
    return feature[image_key].bytes_list.value[0], feature[label_key].int64_list.value[0] if label_key else 0

  return parse
