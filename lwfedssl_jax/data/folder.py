"""Image folders: one sub-folder per class, or images only; with or without train and test, or client folders."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from lwfedssl_jax import rng
from lwfedssl_jax.data import images
from lwfedssl_jax.errors import UsageError

VAL_FOLDERS = ('val', 'validation')
HOLDOUT_SHARE = 0.1
UNREADABLE_SHARE = 0.01


class _Listing(NamedTuple):
  paths: list[str]
  labels: list[int]  # all 0 without classes
  class_names: tuple[str, ...]  # empty without classes
  clients: list[int] | None = None  # number of each image's client folder


def stratified_holdout(labels: np.ndarray, count: int) -> np.ndarray:
  """Chooses `count` items, stratified by class, always the same ones.

  At least one item of every class stays.

  Args:
    labels: int (N,).
    count: number of items wanted; fewer are chosen where the classes are too small.

  Returns:
    bool (N,), True for the chosen items.
  """
  generator = rng.host_generator(0, rng.Stream.FOLDER_HOLDOUT)
  classes, sizes = np.unique(labels, return_counts=True)
  quota = count * sizes / max(1, sizes.sum())
  taken = np.minimum(np.floor(quota).astype(int), sizes - 1)
  for index in np.argsort(-(quota - taken), kind='stable'):
    if taken.sum() < count and taken[index] < sizes[index] - 1:
      taken[index] += 1
  chosen = np.zeros(len(labels), bool)
  for label, number in zip(classes, taken):
    chosen[generator.permutation(np.flatnonzero(labels == label))[:number]] = True
  return chosen


def _scan(folder: str) -> tuple[list[str], list[str]]:
  """Returns (sub-folders, image files) of a folder, sorted by name, without hidden ones."""
  try:
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    visible = [e for e in entries if not e.name.startswith(('.', '__MACOSX'))]
    folders = [e.path for e in visible if e.is_dir()]
    suffixes = images.extensions()
    files = [e.path for e in visible if os.path.splitext(e.name)[1].lower() in suffixes and e.is_file()]
  except OSError as e:
    raise UsageError(f'{_shown(folder)}: expected a folder that can be read: {e.strerror}') from e
  return folders, files


def _images_below(folder: str, visited: set[str]) -> list[str]:
  """Returns all images below a folder; links are followed, and no real folder is visited twice."""
  found, pending = [], [folder]
  while pending:
    current = pending.pop()
    real = os.path.realpath(current)
    if real in visited:
      continue
    visited.add(real)
    folders, files = _scan(current)
    found += files
    pending += folders
  return sorted(found)


def _list(folder: str) -> _Listing:
  """Lists one split."""
  folders, files = _scan(folder)
  root = os.path.realpath(folder)
  by_class = {os.path.basename(path): _images_below(path, {root}) for path in folders}
  by_class = {name: paths for name, paths in by_class.items() if paths}
  if not by_class:
    return _Listing(files, [0] * len(files), ())
  if files:
    logging.warning('%s: ignored %d images beside the class folders', folder, len(files))
  paths = [path for paths in by_class.values() for path in paths]
  labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
  return _Listing(paths, labels, tuple(by_class))


def _list_clients(folder: str) -> _Listing:
  """Lists a folder that holds a folder for each client; class folders of the same name are one class."""
  folders, files = _scan(folder)
  if files:
    logging.warning('%s: ignored %d images beside the client folders', folder, len(files))
  listed = [(path, found) for path in folders if (found := _list(path)).paths]
  without = next((path for path, found in listed if not found.class_names), None)
  if without and any(found.class_names for _, found in listed):
    raise UsageError(f'{_shown(without)}: expected class folders, as the other client folders have')
  class_names = tuple(sorted({name for _, found in listed for name in found.class_names}))
  numbers = {name: number for number, name in enumerate(class_names)}
  return _Listing(
    [path for _, found in listed for path in found.paths],
    [numbers[found.class_names[label]] if class_names else 0 for _, found in listed for label in found.labels],
    class_names,
    [client for client, (_, found) in enumerate(listed) for _ in found.paths],
  )


def _split_folders(path: str) -> tuple[str, str | None, str | None]:
  """Returns the folders of the training, test and validation images."""
  names = {os.path.basename(folder): folder for folder in _scan(path)[0]}
  test, val = names.get('test'), next((names[name] for name in VAL_FOLDERS if name in names), None)
  if 'train' in names and (test or val or len(names) == 1):
    return names['train'], test, val
  return path, None, None


def _list_matched(folder: str | None, train: _Listing) -> _Listing:
  """Lists a split other than the training split, with that one's class numbers; no folder: no images."""
  if folder is None:
    return _Listing([], [], ())
  test = _list(folder)
  unknown = sorted(set(test.class_names) - set(train.class_names))
  if unknown and train.class_names:
    raise UsageError(f'{_shown(os.path.join(folder, unknown[0]))}: expected the class folders of the training images')
  numbers = {name: number for number, name in enumerate(train.class_names)}
  labels = [numbers.get(test.class_names[label], 0) if test.class_names else 0 for label in test.labels]
  return test._replace(labels=labels)


def _to_split(listing: _Listing, labeled: bool) -> images.Split:
  paths, labels = listing.paths, listing.labels
  clients = None if listing.clients is None else tuple(listing.clients)
  return images.Split(
    len(paths), lambda indices: [(paths[i], labels[i]) for i in indices], lambda i: _shown(paths[i]), labeled, clients
  )


def _shown(path: str) -> str:
  """Returns a path that is printable in a message: names may contain line breaks or undecodable bytes."""
  return path if path.isprintable() else ascii(path)


def open_folder(argument: str, data_dir: str) -> images.Source:
  """Lists the images of `folder:PATH`; `data_dir` is not used.

  PATH holds a sub-folder per class (with images at any depth), or images only (no labels); or it holds `train` and
  `test`, `val` (or `validation`), or both, each with either layout. Without one of them a fixed tenth of the training
  images is held out for testing. Hidden files and files other than images are ignored.

  Raises:
    UsageError: the folder does not exist or is empty, or has test classes that the training images lack.
  """
  del data_dir
  return _open(argument, _list)


def open_client_folders(argument: str) -> images.Source:
  """As `open_folder`, but the training images lie in a folder for each client, which has either layout of a split.

  Raises:
    UsageError: as `open_folder`; or only some of the clients have class folders.
  """
  return _open(argument, _list_clients)


def _open(argument: str, list_train: Callable[[str], _Listing]) -> images.Source:
  path = os.path.abspath(os.path.expanduser(argument))
  if not os.path.isdir(path):
    raise UsageError(f'--dataset=folder:{argument}: expected a folder of images, found none')
  train_folder, test_folder, val_folder = _split_folders(path)
  train = list_train(train_folder)
  if not train.paths:
    raise UsageError(f'--dataset=folder:{argument}: expected images (png, jpg, ...) in {train_folder}, found none')
  test, val = _list_matched(test_folder, train), _list_matched(val_folder, train)
  if not test.paths and not val.paths:
    train, test = _hold_out(train)
  train_split, test_split, val_split = (
    _to_split(listing, bool(train.class_names and listing.class_names)) for listing in (train, test, val)
  )
  opened = images.Opened(train_split, test_split, train.class_names, UNREADABLE_SHARE, val_split)
  return images.Source((*train.paths, *test.paths, *val.paths), lambda: opened)


def _hold_out(listing: _Listing) -> tuple[_Listing, _Listing]:
  """Splits a listing into (training, test), by class and by client."""
  number = len(listing.paths)
  strata = np.array(listing.labels)
  if listing.clients is not None:
    strata = strata + np.array(listing.clients) * (1 + strata.max())
  held = stratified_holdout(strata, max(1, round(HOLDOUT_SHARE * number)))

  def pick(mask):
    kept = np.flatnonzero(mask)
    return _Listing(
      [listing.paths[i] for i in kept],
      [listing.labels[i] for i in kept],
      listing.class_names,
      None if listing.clients is None else [listing.clients[i] for i in kept],
    )

  return pick(~held), pick(held)
