"""Data sets by name, `digits` or KIND:NAME (see READERS), as uint8 images in one shape."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.data import cache, folder, hf_source, images, tfds_source
from lwfedssl_jax.errors import UsageError

_DIGITS_TEST_IMAGES = 360
_MAX_CLASSES = 1 << 16
_SPLITS = ('train', 'test', 'val')


class ImageDataset(NamedTuple):
  """A decoded data set. Its arrays are read-only and may be memory-mapped.

  Attributes:
    name: the specification it was loaded from, e.g. 'tfds:cifar10'.
    train_images: uint8 (N, S, S, 3), N at least 1.
    train_labels: int32 (N,), 0 .. len(class_names) - 1; None without labels.
    test_images: uint8 (M, S, S, 3); M may be 0. The validation images, if the data set has no test images, or if only
      its validation images have labels.
    test_labels: int32 (M,), or None.
    class_names: empty without labels.
    val_images: uint8 (V, S, S, 3), the validation split of the data set; None if it has none. Not used in training.
    val_labels: int32 (V,), or None.
    train_clients: int32 (N,), the number of each training image's client folder, in the order of the folders' names;
      None unless it was loaded with `client_folders`.
  """

  name: str
  train_images: np.ndarray
  train_labels: np.ndarray | None
  test_images: np.ndarray
  test_labels: np.ndarray | None
  class_names: tuple[str, ...]
  val_images: np.ndarray | None = None
  val_labels: np.ndarray | None = None
  train_clients: np.ndarray | None = None


def load(
  spec: str, *, data_dir: str = '', cache_dir: str = '', image_size: int = 0, client_folders: bool = False
) -> ImageDataset:
  """Loads a data set, from the cache of decoded images if possible.

  Nothing is downloaded, except by `hf:NAME`. Gray images have three equal channels; transparency becomes white.

  Args:
    spec: `digits`, `folder:PATH`, `npz:PATH`, `tfds:NAME` or `hf:NAME_OR_PATH`.
    data_dir: folder of prepared TFDS data sets; empty for TFDS's default.
    cache_dir: folder of the cache of decoded images; empty for the user's cache folder.
    image_size: side of the images, pixels: the shorter side is resized to it, then the center is cropped. 0: that of
      the data set, whose images must then have one square size.
    client_folders: `folder:PATH` holds a folder for each client, which holds a folder for each class or images only.

  Raises:
    UsageError: one line that names the flag or the file and what was expected.
  """
  kind, colon, argument = spec.partition(':')
  if kind not in READERS or (kind == 'digits') == bool(colon) or (colon and not argument):
    raise UsageError(f'--dataset: expected digits, folder:PATH, npz:PATH, tfds:NAME or hf:NAME_OR_PATH, got {spec!r}')
  if client_folders and kind != 'folder':
    raise UsageError(f'--partition=folders: expected --dataset=folder:PATH, got --dataset={spec}')
  source = folder.open_client_folders(argument) if client_folders else READERS[kind](argument, data_dir)
  path = ''
  if source.files:
    identity = (spec, data_dir and os.path.abspath(data_dir), image_size, client_folders)
    path = cache.entry_path(cache.cache_root(cache_dir), identity, source.files)
    if cached := cache.load(path):
      return _to_dataset(spec, *cached)
  opened = source.open()
  side = image_size or images.image_side(opened.train)
  if not opened.train.size or not side:
    raise UsageError(f'--dataset={spec}: expected training images, found none')
  num_bytes = (opened.train.size + opened.test.size + opened.val.size) * side * side * 3

  def decode(allocate):
    return images.decode_all(opened, side, bool(image_size), allocate)

  dataset = _to_dataset(spec, cache.decode_into(path, decode, opened.class_names, num_bytes), opened.class_names)
  if not len(dataset.train_images):
    raise UsageError(f'--dataset={spec}: expected training images, found none that can be read')
  return dataset


def _to_dataset(spec: str, decoded: images.Decoded, class_names: tuple[str, ...]) -> ImageDataset:
  for array in decoded:
    if array is not None:
      array.flags.writeable = False
  if decoded.val_images is not None and (
    not len(decoded.test_images) or (decoded.test_labels is None and decoded.val_labels is not None)
  ):
    decoded = decoded._replace(test_images=decoded.val_images, test_labels=decoded.val_labels)
  labeled = any(labels is not None for labels in (decoded.train_labels, decoded.test_labels, decoded.val_labels))
  return ImageDataset(name=spec, class_names=class_names if labeled else (), **decoded._asdict())


def describe(dataset: ImageDataset) -> str:
  """Returns one plain line: name, numbers of images, size, classes."""
  side = dataset.train_images.shape[1]
  classes = f'{len(dataset.class_names)} classes' if dataset.class_names else 'no labels'
  validation = ''
  if dataset.val_images is dataset.test_images:
    validation = ' (its validation split)'
  elif dataset.val_images is not None:
    validation = f', {len(dataset.val_images)} validation images'
  return (
    f'{dataset.name}: {len(dataset.train_images)} training and {len(dataset.test_images)} test images{validation}, '
    f'{side}x{side}, {classes}'
  )


def _array_split(values: np.ndarray, labels: np.ndarray | None, name: str) -> images.Split:
  numbers = np.zeros(len(values), np.int32) if labels is None else labels
  return images.Split(
    len(values),
    lambda indices: [(values[i], int(numbers[i])) for i in indices],
    lambda i: f'{name}[{i}]',
    labels is not None,
  )


def _open_digits(argument: str, data_dir: str) -> images.Source:
  """Opens scikit-learn's 1,797 digits, 8x8; 360 of them, fixed and stratified by class, are the test images."""
  del argument, data_dir
  try:
    from sklearn import datasets
  except ImportError as e:
    raise UsageError('--dataset=digits: expected the package scikit-learn (pip install scikit-learn)') from e
  bunch = datasets.load_digits()
  values, labels = np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target
  test = folder.stratified_holdout(labels, _DIGITS_TEST_IMAGES)
  opened = images.Opened(
    _array_split(values[~test], labels[~test], 'digits'),
    _array_split(values[test], labels[test], 'digits'),
    tuple(str(name) for name in bunch.target_names),
  )
  return images.Source((), lambda: opened)


def _open_npz(argument: str, data_dir: str) -> images.Source:
  """Opens `npz:PATH` in MedMNIST's layout: train_images, train_labels, and the same for val and test."""
  del data_dir
  path = os.path.abspath(os.path.expanduser(argument))
  if not os.path.isfile(path):
    raise UsageError(f'--dataset=npz:{argument}: expected an .npz file, found none')
  return images.Source((path,), lambda: _read_npz(path))


def _read_npz(path: str) -> images.Opened:
  try:
    with np.load(path, allow_pickle=False) as archive:
      names = [f'{split}_{what}' for split in _SPLITS for what in ('images', 'labels')]
      arrays = {name: archive[name] for name in names if name in archive}
  except Exception as e:  # a damaged or malicious file raises many types of error
    why = images.one_line(e)
    why = 'it holds pickled objects, which may run code' if 'pickle' in why else why
    raise UsageError(f'{path}: expected an .npz file of plain arrays: {why}') from e
  if 'train_images' not in arrays:
    raise UsageError(f'{path}: expected an array train_images, found none')
  for split in _SPLITS:
    _check_npz_split(path, split, arrays)
  splits = {
    split: _array_split(arrays[f'{split}_images'], arrays.get(f'{split}_labels'), f'{path}: {split}_images')
    for split in _SPLITS
    if f'{split}_images' in arrays
  }
  largest = max((int(v.max()) for k, v in arrays.items() if k.endswith('labels') and v.size), default=-1)
  return images.Opened(
    splits['train'],
    splits.get('test', images.EMPTY_SPLIT),
    tuple(str(number) for number in range(largest + 1)),
    val=splits.get('val', images.EMPTY_SPLIT),
  )


def _check_npz_split(path: str, split: str, arrays: dict[str, Any]) -> None:
  """Checks one split's arrays and replaces its labels by int32 (N,)."""
  values, labels = arrays.get(f'{split}_images'), arrays.get(f'{split}_labels')
  if values is None:
    arrays.pop(f'{split}_labels', None)
    return
  name = f'{path}: {split}_images'
  if values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] not in (1, 3)):
    raise UsageError(f'{name}: expected shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {values.shape}')
  if len(values) and not values.size:
    raise UsageError(f'{name}: expected images of at least one pixel, got {values.shape}')
  if values.size:
    try:
      for start in range(0, len(values), 1024):
        images.to_uint8(values[start : start + 1024])
    except images.UnreadableImageError as e:
      raise UsageError(f'{name}: {e}') from e
  if labels is None:
    return
  name = f'{path}: {split}_labels'
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim != 1:
    raise UsageError(f'{name}: expected one label an image, shape (N,) or (N, 1), got {labels.shape}')
  if len(labels) != len(values):
    raise UsageError(f'{name}: expected {len(values)} labels, as many as images, got {len(labels)}')
  if labels.dtype.kind not in 'iub' or (labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < _MAX_CLASSES):
    raise UsageError(f'{name}: expected whole numbers from 0 to {_MAX_CLASSES - 1}')
  arrays[f'{split}_labels'] = labels.astype(np.int32)


# Each maps the text after the colon and the TFDS folder to a source that is listed and not yet decoded.
READERS: dict[str, Callable[[str, str], images.Source]] = {
  'digits': _open_digits,
  'tfds': tfds_source.open_tfds,
  'hf': hf_source.open_hf,
  'folder': folder.open_folder,
  'npz': _open_npz,
}
