"""Decoding: any image of a source becomes a square uint8 RGB image."""

import concurrent.futures
import functools
import io
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from lwfedssl_jax.errors import UsageError

# Pillow's plug-ins that may open a file. Excluded: EPS, which runs Ghostscript, and formats without photographs.
FORMATS = (
  'PNG',
  'JPEG',
  'MPO',
  'WEBP',
  'BMP',
  'DIB',
  'GIF',
  'TIFF',
  'PPM',
  'JPEG2000',
  'AVIF',
  'TGA',
  'ICO',
  'QOI',
  'PCX',
  'SGI',
)
_BATCH = 256  # images per task of a worker: large enough to hide the overhead, small enough to balance
_SMALL_BYTES = 8192

RawImage = str | bytes | np.ndarray  # a path, an encoded file, or pixels (H, W), (H, W, 1), (H, W, 3), uint8 or float
Allocate = Callable[[str, tuple[int, ...], Any], np.ndarray]  # (name, shape, dtype) -> an array to fill


class UnreadableImageError(ValueError):
  """One image cannot be decoded; the message says why, in one line."""


class Split(NamedTuple):
  """Images of one split, not yet decoded.

  Attributes:
    size: number of images.
    read: consecutive indices -> [(raw image, label)]; any label where the split has none. Called from threads.
    where: index -> the file (or record) of that image, for messages.
    labeled: whether the split has labels. A negative label makes the whole split unlabeled.
    clients: the number of each image's client folder, if there are such folders.
  """

  size: int
  read: Callable[[Sequence[int]], list[tuple[RawImage, int]]]
  where: Callable[[int], str]
  labeled: bool
  clients: tuple[int, ...] | None = None


EMPTY_SPLIT = Split(0, lambda indices: [], lambda index: '', False)


class Opened(NamedTuple):
  """Splits of a source, ready to be decoded."""

  train: Split
  test: Split
  class_names: tuple[str, ...]
  unreadable_share: float = 0.0  # share of all images that may be skipped (at least one, if it is not 0)
  val: Split = EMPTY_SPLIT


class Source(NamedTuple):
  """A source before decoding: the files that determine its content, and a function that opens it."""

  files: tuple[str, ...]  # empty: cheap to create, never cached
  open: Callable[[], Opened]


class Decoded(NamedTuple):
  """uint8 images (N, S, S, 3) and int32 labels (N,) or None, per split; int32 client folders (N,) of the first.

  `val_images` are None if there is no validation split.
  """

  train_images: np.ndarray
  train_labels: np.ndarray | None
  test_images: np.ndarray
  test_labels: np.ndarray | None
  val_images: np.ndarray | None = None
  val_labels: np.ndarray | None = None
  train_clients: np.ndarray | None = None


def one_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its type."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


@functools.cache
def _formats() -> tuple[str, ...]:
  Image.init()
  return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def extensions() -> frozenset[str]:
  """Returns the lower-case file extensions ('.png', ...) that count as images."""
  formats = _formats()
  return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def to_rgb(image: Image.Image) -> Image.Image:
  """Converts any Pillow image to 8-bit RGB, upright by its EXIF orientation.

  Integers of 16 bits (and Pillow's mode I, which holds them) are scaled by 255 / 65535; floats must lie in
  [0, 1]. Transparency is composited on white. Of an animation this is the current (first) frame.

  Raises:
    UnreadableImageError: values out of range.
  """
  if image.mode.startswith('I'):
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
      raise UnreadableImageError('expected 16-bit values, 0 to 65535')
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert('RGB')
  if image.mode == 'F':
    return Image.fromarray(to_uint8(np.asarray(image))).convert('RGB')
  image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
  return image if image.mode == 'RGB' else image.convert('RGB')


def to_uint8(values: np.ndarray) -> np.ndarray:
  """Returns pixels as uint8; floats in [0, 1] are multiplied by 255 and rounded.

  Raises:
    UnreadableImageError: another type, or floats that are not finite or not in [0, 1].
  """
  if values.dtype == np.uint8:
    return values
  if not np.issubdtype(values.dtype, np.floating):
    raise UnreadableImageError(f'expected uint8 pixels, or floats in [0, 1], got {values.dtype}')
  if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
    raise UnreadableImageError('expected uint8 pixels, or finite floats in [0, 1]')
  return np.round(values * 255.0).astype(np.uint8)


def decode_image(raw: RawImage, image_size: int = 0) -> np.ndarray:
  """Decodes one image.

  Args:
    raw: a path, the bytes of a file, or pixels.
    image_size: 0: no resizing; else the shorter side is resized to it (bicubic, antialiased) and the image is
      center-cropped.

  Returns:
    uint8 (H, W, 3).

  Raises:
    UnreadableImageError: the image cannot be decoded.
  """
  try:
    if isinstance(raw, np.ndarray):
      pixels = to_uint8(raw)
      if not image_size or pixels.shape[:2] == (image_size, image_size):
        return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))
      image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[2:] == (1,) else pixels)
    else:
      image = Image.open(raw if isinstance(raw, str) else io.BytesIO(raw), formats=_formats())
    with image:
      limit = Image.MAX_IMAGE_PIXELS
      if limit and image.width * image.height > limit:
        raise UnreadableImageError(f'{image.width}x{image.height} is more than {limit} pixels')
      if image_size and image.format == 'JPEG':
        image.draft(None, (2 * image_size, 2 * image_size))  # decode a large photograph at a fraction of its size
      return np.asarray(_fit(to_rgb(image), image_size))
  except UnreadableImageError:
    raise
  except Exception as e:  # a damaged file makes Pillow raise nearly anything
    raise UnreadableImageError(one_line(e)) from e


def _fit(image: Image.Image, size: int) -> Image.Image:
  """Resizes the central square of an image to `size`; 0: no change."""
  if not size or image.size == (size, size):
    return image
  side = min(image.size)
  left, top = (image.width - side) / 2, (image.height - side) / 2
  return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


class _Skipped:
  """Counts unreadable images and raises UsageError beyond the allowed number."""

  def __init__(self, share: float, total: int):
    self.allowed = max(1, int(share * total)) if share else 0
    self.count, self.first = 0, ''

  def add(self, where: str, why: str) -> None:
    self.count += 1
    self.first = self.first or f'{where}: {why}'
    if self.count > self.allowed:
      more = f' (and {self.count - 1} more)' if self.count > 1 else ''
      raise UsageError(f'{self.first}{more}: expected a readable image')
    logging.warning('skipped an unreadable image: %s: %s', where, why)


def image_side(split: Split) -> int:
  """Returns the side of the first readable image of a split, which must be square; 0 for an empty split.

  Raises:
    UsageError: that image is not square, or no image can be read.
  """
  first = ''
  for index in range(split.size):
    ((raw, _),) = split.read([index])
    try:
      height, width = decode_image(raw).shape[:2]
    except UnreadableImageError as e:
      first = first or f'{split.where(index)}: {e}'
      continue
    if height != width:
      raise UsageError(f'--image_size: expected a size, as {split.where(index)} is not square: {width}x{height}')
    return height
  if first:
    raise UsageError(f'{first}: expected a readable image')
  return 0


def _num_threads(split: Split) -> int:
  """Returns 1 for small files: Pillow then runs mostly Python code, and threads compete for the GIL."""
  if not split.size:
    return 1
  ((raw, _),) = split.read([0])
  num_bytes = raw.nbytes if isinstance(raw, np.ndarray) else os.path.getsize(raw) if isinstance(raw, str) else len(raw)
  return 1 if num_bytes < _SMALL_BYTES else min(16, os.cpu_count() or 1)


def _decode_split(
  name: str, split: Split, side: int, resize: bool, allocate: Allocate, skipped: _Skipped
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
  """Returns (images, labels or None, client folders or None) of one split, in order, without the unreadable ones."""
  images = allocate(f'{name}_images', (split.size, side, side, 3), np.uint8)
  labels = np.zeros(split.size, np.int32)
  clients = None if split.clients is None else np.array(split.clients, np.int32)

  def work(start: int) -> list[tuple[int, str]]:
    failed = []
    indices = range(start, min(start + _BATCH, split.size))
    for index, (raw, label) in zip(indices, split.read(indices)):
      labels[index] = label
      try:
        image = decode_image(raw, side if resize else 0)
      except UnreadableImageError as e:
        failed.append((index, str(e)))
        continue
      if image.shape[:2] != (side, side):
        height, width = image.shape[:2]
        raise UsageError(
          f'--image_size: expected a size, as the images are of mixed sizes: {side}x{side} and '
          f'{split.where(index)} with {width}x{height}'
        )
      images[index] = image
    return failed

  keep = np.ones(split.size, bool)
  with concurrent.futures.ThreadPoolExecutor(_num_threads(split)) as pool:
    jobs = [pool.submit(work, start) for start in range(0, split.size, _BATCH)]
    try:
      for job in jobs:  # in order, so that the same invalid input always gives the same message
        for index, why in job.result():
          skipped.add(split.where(index), why)
          keep[index] = False
    finally:
      pool.shutdown(cancel_futures=True)
  if not keep.all():
    kept = np.flatnonzero(keep)
    for to, source in enumerate(kept):  # in place: the array may be a file larger than memory
      images[to] = images[source]
    images, labels, clients = images[: len(kept)], labels[kept], None if clients is None else clients[kept]
  return images, (labels if split.labeled and not (labels < 0).any() else None), clients


def decode_all(opened: Opened, side: int, resize: bool, allocate: Allocate) -> Decoded:
  """Decodes the splits with threads.

  Args:
    opened: the splits.
    side: side of every image in the result, pixels.
    resize: whether images are resized to that side; else they must have it.
    allocate: creates the arrays of images.

  Raises:
    UsageError: images of mixed sizes, or more unreadable ones than `opened` allows.
  """
  skipped = _Skipped(opened.unreadable_share, opened.train.size + opened.test.size + opened.val.size)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', module='PIL')
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)
    images, labels, clients = _decode_split('train', opened.train, side, resize, allocate, skipped)
    test_images, test_labels, _ = _decode_split('test', opened.test, side, resize, allocate, skipped)
    decoded = Decoded(images, labels, test_images, test_labels, train_clients=clients)
    if not opened.val.size:
      return decoded
    val_images, val_labels, _ = _decode_split('val', opened.val, side, resize, allocate, skipped)
  return decoded._replace(val_images=val_images, val_labels=val_labels)
