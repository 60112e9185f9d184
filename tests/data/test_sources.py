"""Data sets by name: what is read, what is refused, and what the cache of decoded images does."""

import concurrent.futures
import io
import json
import os
import pathlib
import pickle
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from lwfedssl_jax.base import UsageError
from lwfedssl_jax.data import cache, folder, images, sources


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
  """No test touches the user's cache, TFDS folder or temporary folder (TFDS builders leave empty folders there)."""
  (tmp_path / '.temporary').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / '.temporary'))
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds_default'))


@pytest.fixture
def decodes(monkeypatch):
  """Counts decoded images, and caches even the smallest data set."""
  monkeypatch.setattr(cache, 'MIN_BYTES', 0)
  counted, decode = [], images.decode_image

  def counting(raw, image_size=0):
    counted.append(raw)
    return decode(raw, image_size)

  monkeypatch.setattr(images, 'decode_image', counting)
  return counted


def refusal(spec, **options):
  with pytest.raises(UsageError) as error:
    sources.load(spec, **options)
  message = str(error.value)
  assert '\n' not in message and message
  return message


def color(value, size=(8, 8), mode='RGB'):
  return Image.new(mode, size, value)


def make_classes(root, per_class=10, size=8, names=('cat', 'dog')):
  for number, name in enumerate(names):
    (root / name).mkdir(parents=True)
    for i in range(per_class):
      color((100 * number + i, i, 0), (size, size)).save(root / name / f'{i:03d}.png')
  return root


# Specifications


@pytest.mark.parametrize('spec', ['', 'foo', 'foo:bar', 'tfds', 'tfds:', 'folder:', 'digits:x', 'Digits'])
def test_bad_specification_names_the_flag_and_the_choices(spec):
  assert refusal(spec) == f'--dataset: expected digits, tfds:NAME, folder:PATH or npz:PATH, got {spec!r}'


# Digits


def test_digits_split_is_fixed_stratified_and_complete():
  from sklearn import datasets
  data = sources.load('digits')
  assert data.train_images.shape == (1437, 8, 8, 3) and data.test_images.shape == (360, 8, 8, 3)
  assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
  counts = np.bincount(data.test_labels) / np.bincount(np.concatenate([data.train_labels, data.test_labels]))
  assert len(counts) == 10 and counts.min() > 0.19 and counts.max() < 0.21
  assert data.train_images.max() == 255 and data.train_images.min() == 0
  np.testing.assert_array_equal(data.train_images[..., 0], data.train_images[..., 2])
  rows = np.concatenate([data.train_images, data.test_images])[..., 0].reshape(1797, -1)
  original = np.round(datasets.load_digits().data * 255 / 16).astype(np.uint8)
  np.testing.assert_array_equal(np.sort(rows.sum(1)), np.sort(original.sum(1)))
  np.testing.assert_array_equal(data.test_images, sources.load('digits').test_images)
  # Pinned: another split would make results of two versions incomparable.
  assert data.test_labels[:12].tolist() == [3, 7, 3, 9, 0, 8, 7, 0, 8, 0, 3, 3]
  assert data.test_images.sum(dtype=int) == 5342382
  assert sources.describe(data) == 'digits: 1437 training and 360 test images, 8x8, 10 classes'


def test_digits_resized():
  assert sources.load('digits', image_size=16).train_images.shape == (1437, 16, 16, 3)


@pytest.mark.parametrize(('sizes', 'count'), [((1,), 1), ((1, 1, 1), 2), ((100, 10, 1), 11), ((3, 3), 6), ((), 1)])
def test_holdout_leaves_one_of_every_class(sizes, count):
  labels = np.repeat(np.arange(len(sizes)), sizes)
  chosen = folder.stratified_holdout(labels, count)
  assert chosen.sum() <= count
  assert set(labels[~chosen]) == set(labels)


def test_holdout_is_proportional():
  labels = np.repeat([0, 1, 2], [100, 50, 10])
  assert np.bincount(labels[folder.stratified_holdout(labels, 16)]).tolist() == [10, 5, 1]


# One image


def encoded(image, kind='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def test_exif_rotation_is_applied():
  pixels = np.zeros((8, 16, 3), np.uint8)
  pixels[:, :8] = 255  # left half white; orientation 6 says: turn it clockwise, so the upper half
  exif = Image.Exif()
  exif[0x0112] = 6
  image = images.decode_image(encoded(Image.fromarray(pixels), 'JPEG', exif=exif, quality=95))
  assert image.shape == (16, 8, 3)
  assert image[:6].min() > 200 and image[10:].max() < 50


def test_16_bit_is_scaled_not_clipped():
  values = np.array([[0, 257 * 10], [257 * 128, 65535]], np.uint16)
  image = images.decode_image(encoded(Image.fromarray(values)))
  np.testing.assert_array_equal(image[..., 1], [[0, 10], [128, 255]])
  big_endian = images.decode_image(encoded(Image.fromarray(values), 'TIFF'))
  np.testing.assert_array_equal(big_endian, image)


def test_palette_cmyk_gray_bilevel_and_alpha():
  assert images.decode_image(encoded(color((255, 0, 0)).quantize(4), 'GIF'))[0, 0].tolist() == [255, 0, 0]
  cmyk = images.decode_image(encoded(color((0, 255, 255, 0), mode='CMYK'), 'JPEG'))[4, 4]
  assert cmyk[0] > 200 and cmyk[1] < 60 and cmyk[2] < 60
  assert images.decode_image(encoded(color(77, mode='L')))[0, 0].tolist() == [77] * 3
  assert images.decode_image(encoded(color(1, mode='1')))[0, 0].tolist() == [255] * 3
  assert images.decode_image(encoded(color((0, 0, 0, 0), mode='RGBA')))[0, 0].tolist() == [255] * 3
  assert images.decode_image(encoded(color((0, 100), mode='LA')))[0, 0].tolist() == [155] * 3
  palette = color((255, 0, 0)).quantize(4)
  transparent = encoded(palette, 'PNG', transparency=palette.getpixel((0, 0)))
  assert images.decode_image(transparent)[0, 0].tolist() == [255] * 3


def test_first_frame_of_an_animation():
  frames = [color((255, 0, 0)), color((0, 0, 255))]
  for kind in ('GIF', 'WEBP'):
    options = {'lossless': True} if kind == 'WEBP' else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert images.decode_image(data)[0, 0].tolist() == [255, 0, 0]


def test_resize_is_central_and_antialiased():
  pixels = np.zeros((64, 128, 3), np.uint8)
  pixels[:, :32] = pixels[:, 96:] = [255, 0, 0]  # outside the central square
  pixels[::2, 32:96] = 200  # stripes of one pixel: antialiasing makes them even
  image = images.decode_image(pixels, 16)
  assert image.shape == (16, 16, 3)
  np.testing.assert_allclose(image[2:-2, 2:-2].astype(int), 100, atol=4)
  assert abs(image[..., 0].astype(int) - image[..., 1])[:, 1:-1].max() < 5


def test_large_jpeg_is_reduced_well():
  small = np.random.default_rng(0).integers(60, 196, (32, 32)).astype(np.uint8)
  photograph = Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC)
  image = images.decode_image(encoded(photograph, 'JPEG', quality=95), 64)  # decoded at half its size, then resized
  expected = np.asarray(photograph.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
  assert abs(image[..., 0] - expected).mean() < 3 and expected.std() > 20


def test_bombs_and_scripts_are_unreadable(monkeypatch):
  data = encoded(color(0, (64, 64), 'L'))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 3000)  # 4,096 is no more than a warning to Pillow
  with pytest.warns(Image.DecompressionBombWarning), pytest.raises(images.UnreadableImageError):
    images.decode_image(data)
  with pytest.raises(images.UnreadableImageError):
    images.decode_image(encoded(color(0, (8, 8), 'L'), 'EPS'))  # would start Ghostscript
  assert '.eps' not in images.extensions() and {'.png', '.jpg', '.webp', '.bmp', '.tif'} <= images.extensions()


# Folders


def test_class_folders_of_mixed_formats_and_sizes(tmp_path):
  for name in ('b', 'a', 'ünï — コ'):
    (tmp_path / name / 'deep').mkdir(parents=True)
  color((255, 0, 0), (20, 10)).save(tmp_path / 'a' / '1.PNG')
  color((255, 0, 0), (12, 40)).save(tmp_path / 'a' / '2.jpg', quality=95)
  color((0, 255, 0), (16, 16)).save(tmp_path / 'b' / '1.bmp')
  color((0, 255, 0), (9, 9)).save(tmp_path / 'b' / 'deep' / '2.webp', lossless=True)
  color((0, 0, 255), (9, 16)).save(tmp_path / 'ünï — コ' / '画.tiff')
  color((0, 0, 255), (9, 16)).save(tmp_path / 'ünï — コ' / 'é.gif')
  (tmp_path / 'a' / 'notes.txt').write_text('no image')
  (tmp_path / 'a' / '.hidden.png').write_text('no image')
  (tmp_path / '.git').mkdir()
  (tmp_path / 'empty').mkdir()
  data = sources.load(f'folder:{tmp_path}', image_size=8)
  assert data.class_names == ('a', 'b', 'ünï — コ')
  assert len(data.train_images) == 5 and len(data.test_images) == 1
  for pixels, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
    assert pixels.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(pixels.mean((1, 2)).argmax(-1), labels)  # red, green, blue
  again = sources.load(f'folder:{tmp_path}', image_size=8)
  np.testing.assert_array_equal(data.train_images, again.train_images)


def test_folder_holdout_is_stratified_and_disjoint(tmp_path):
  data = sources.load(f'folder:{make_classes(tmp_path, per_class=20)}')
  assert np.bincount(data.train_labels).tolist() == [18, 18] and np.bincount(data.test_labels).tolist() == [2, 2]
  reds = lambda pixels: set(pixels[:, 0, 0, 0].tolist())
  assert reds(data.train_images) | reds(data.test_images) == {*range(20), *range(100, 120)}


def test_flat_folder_has_no_labels(tmp_path):
  for i in range(5):
    color((i, i, i)).save(tmp_path / f'{i}.png')
  data = sources.load(f'folder:{tmp_path}')
  assert data.train_labels is None and data.test_labels is None and data.class_names == ()
  assert len(data.train_images) == 4 and len(data.test_images) == 1
  assert sources.describe(data).endswith('4 training and 1 test images, 8x8, no labels')


@pytest.mark.parametrize('name', ['test', 'val', 'validation'])
def test_train_and_test_folders(tmp_path, name):
  make_classes(tmp_path / 'train', 3, names=('x', 'y', 'z'))
  make_classes(tmp_path / name, 2, names=('y', 'z'))
  data = sources.load(f'folder:{tmp_path}')
  assert data.class_names == ('x', 'y', 'z')
  assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  assert data.test_labels.tolist() == [1, 1, 2, 2]  # numbered by the training classes


def test_unlabelled_test_folder_gives_way_to_a_labelled_one(tmp_path):
  make_classes(tmp_path / 'train', 2)
  make_classes(tmp_path / 'val', 1)
  (tmp_path / 'test').mkdir()
  color(0).save(tmp_path / 'test' / 'a.png')
  assert sources.load(f'folder:{tmp_path}').test_labels.tolist() == [0, 1]


def test_unknown_test_class_is_refused(tmp_path):
  make_classes(tmp_path / 'train', 2)
  make_classes(tmp_path / 'val', 1, names=('images',))
  assert str(tmp_path / 'val' / 'images') in refusal(f'folder:{tmp_path}')


def test_a_class_may_be_called_train(tmp_path):
  make_classes(tmp_path, 3, names=('car', 'train'))
  assert sources.load(f'folder:{tmp_path}').class_names == ('car', 'train')


def test_links_are_followed_once(tmp_path):
  root = make_classes(tmp_path / 'root', 3)
  (root / 'cat' / 'loop').symlink_to(root / 'cat', target_is_directory=True)
  (root / 'all').symlink_to(root, target_is_directory=True)
  (root / 'dangling').symlink_to(root / 'nowhere')
  make_classes(tmp_path / 'elsewhere', 2, names=('cow',))
  (root / 'cow').symlink_to(tmp_path / 'elsewhere' / 'cow', target_is_directory=True)
  data = sources.load(f'folder:{root}')
  assert data.class_names == ('cat', 'cow', 'dog')
  assert len(data.train_images) + len(data.test_images) == 8


def test_few_unreadable_images_are_skipped_and_many_refused(tmp_path, caplog):
  root = make_classes(tmp_path, 10)
  bad = root / 'cat' / '003.png'
  bad.write_bytes(bad.read_bytes()[:40])
  data = sources.load(f'folder:{root}')
  assert len(data.train_images) + len(data.test_images) == 19
  assert len(data.train_labels) == len(data.train_images)
  assert 3 not in set(data.train_images[:, 0, 0, 0]) | set(data.test_images[:, 0, 0, 0])
  np.testing.assert_array_equal(data.train_images[:, 0, 0, 0] >= 100, data.train_labels == 1)
  assert str(bad) in caplog.text
  (root / 'dog' / '004.png').write_text('nonsense')
  assert str(bad) in refusal(f'folder:{root}')


def test_folder_of_one_unreadable_image_is_named(tmp_path):
  (tmp_path / 'x.png').write_text('nonsense')
  assert 'x.png' in refusal(f'folder:{tmp_path}')
  assert 'found none' in refusal(f'folder:{tmp_path}', image_size=8)


def test_one_image_trains_alone(tmp_path):
  color(0).save(tmp_path / 'x.png')
  data = sources.load(f'folder:{tmp_path}')
  assert data.train_images.shape == (1, 8, 8, 3) and data.test_images.shape == (0, 8, 8, 3)


def test_mixed_sizes_need_image_size(tmp_path):
  root = make_classes(tmp_path, 4)
  color(0, (9, 9)).save(root / 'dog' / '002.png')
  message = refusal(f'folder:{root}')
  assert '--image_size' in message and '9x9' in message and '002.png' in message
  assert sources.load(f'folder:{root}', image_size=8).train_images.shape[1:] == (8, 8, 3)


def test_oblong_images_need_image_size(tmp_path):
  color(0, (9, 5)).save(tmp_path / 'x.png')
  message = refusal(f'folder:{tmp_path}')
  assert '--image_size' in message and '9x5' in message


def test_missing_and_empty_folders(tmp_path):
  assert 'nowhere' in refusal(f'folder:{tmp_path}/nowhere')
  assert 'found none' in refusal(f'folder:{tmp_path}')
  assert not (tmp_path / 'xdg').exists()  # nothing is written before the check


# npz


def arrays(number=12, shape=(8, 8), dtype=np.uint8, **replaced):
  rng = np.random.default_rng(0)
  made = {}
  for split, count in (('train', number), ('val', 4), ('test', 5)):
    made[f'{split}_images'] = rng.integers(0, 256, (count, *shape)).astype(dtype)
    made[f'{split}_labels'] = (np.arange(count) % 3)[:, None]
  made.update(replaced)
  return {k: v for k, v in made.items() if v is not None}


def save_npz(tmp_path, **made):
  np.savez(tmp_path / 'data.npz', **made)
  return f'npz:{tmp_path}/data.npz'


@pytest.mark.parametrize('shape', [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_npz_of_any_channels(tmp_path, shape):
  made = arrays(shape=shape)
  data = sources.load(save_npz(tmp_path, **made))
  expected = np.broadcast_to(made['train_images'].reshape(12, 8, 8, -1), (12, 8, 8, 3))
  np.testing.assert_array_equal(data.train_images, expected)
  assert data.train_labels.tolist() == [0, 1, 2] * 4 and data.train_labels.dtype == np.int32
  assert len(data.test_images) == 5 and data.class_names == ('0', '1', '2')


def test_npz_test_falls_back_to_val_and_to_nothing(tmp_path):
  spec = save_npz(tmp_path, **arrays(test_images=None, test_labels=None))
  assert len(sources.load(spec).test_images) == 4
  spec = save_npz(tmp_path, train_images=np.zeros((6, 4, 4), np.uint8))
  data = sources.load(spec)
  assert data.test_images.shape == (0, 4, 4, 3) and data.train_labels is None and data.class_names == ()


def test_npz_floats_and_resizing(tmp_path):
  spec = save_npz(tmp_path, train_images=np.full((3, 6, 10, 3), 0.5, np.float32))
  assert '--image_size' in refusal(spec)
  data = sources.load(spec, image_size=5)
  assert data.train_images.shape == (3, 5, 5, 3) and set(data.train_images.ravel().tolist()) == {128}


@pytest.mark.parametrize(('replaced', 'said'), [
    ({'train_images': None}, 'train_images'),
    ({'train_images': np.zeros((0, 8, 8), np.uint8), 'train_labels': None}, 'training images'),
    ({'train_images': np.full((12, 8, 8), np.nan)}, 'finite'),
    ({'train_images': np.full((12, 8, 8), 2.0)}, '[0, 1]'),
    ({'test_images': np.full((5, 8, 8), np.inf)}, 'test_images'),
    ({'train_images': np.zeros((12, 8, 8), np.int64)}, 'int64'),
    ({'train_images': np.zeros((12, 8, 8, 4), np.uint8)}, '(N, H, W, 3)'),
    ({'train_images': np.zeros((12, 64), np.uint8)}, '(N, H, W, 3)'),
    ({'train_images': np.zeros((12, 0, 8), np.uint8)}, 'pixel'),
    ({'train_labels': np.zeros((12, 14), int)}, 'one label'),
    ({'train_labels': np.zeros(11, int)}, '12 labels'),
    ({'test_labels': np.zeros(4, int)}, '5 labels'),
    ({'train_labels': np.full(12, 0.5)}, 'whole numbers'),
    ({'train_labels': np.full(12, -1)}, 'whole numbers'),
    ({'train_labels': np.full(12, 2**31)}, 'whole numbers'),
])
def test_npz_refusals(tmp_path, replaced, said):
  message = refusal(save_npz(tmp_path, **arrays(**replaced)))
  assert said in message and ('data.npz' in message)


class Trap:
  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path(os.environ['TRAP']),))


def test_npz_pickles_are_refused_unread(tmp_path, monkeypatch):
  monkeypatch.setenv('TRAP', str(tmp_path / 'sprung'))
  path = tmp_path / 'data.npz'
  np.savez(path, **arrays(train_images=np.array([Trap()] * 12, dtype=object)))
  assert 'pickle' in refusal(f'npz:{path}')
  path.write_bytes(pickle.dumps(Trap()))
  assert 'pickle' in refusal(f'npz:{path}')
  assert not (tmp_path / 'sprung').exists()


def test_npz_damaged_files(tmp_path):
  spec = save_npz(tmp_path, **arrays())
  path = tmp_path / 'data.npz'
  path.write_bytes(path.read_bytes()[:500])
  assert 'data.npz' in refusal(spec)
  path.write_bytes(b'')
  assert 'data.npz' in refusal(spec)
  np.save(tmp_path / 'one.npy', np.zeros(3))
  (tmp_path / 'one.npy').rename(path)
  assert 'data.npz' in refusal(spec)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('train_images.npy', b'\x93NUMPY\x01\x00\x10\x00{"a": __import__}')
  assert 'data.npz' in refusal(spec)
  assert 'expected an .npz file' in refusal(f'npz:{tmp_path}/missing.npz')


# TFDS


def prepare_tfds(root, size=8, sizes=None, splits=('train', 'test'), tensor=False, count=30):
  """Prepares a tiny data set named `toy` as array_record, without TensorFlow."""
  tfds = pytest.importorskip('tensorflow_datasets')
  kind = tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8) if tensor else tfds.features.Image(
      shape=(None, None, 3), encoding_format='png')

  class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
          'image': kind, 'label': tfds.features.ClassLabel(names=['ant', 'bee', 'fly'])}))

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(name) for name in splits}

    def _generate_examples(self, name):
      for i in range(count if name == 'train' else 6):
        side = sizes[i % len(sizes)] if sizes else size
        pixels = np.full((side, side, 3), (10 * (i % 3) + 1, i, 0), np.uint8)
        yield f'{i:05d}', {'image': pixels if tensor else Image.fromarray(pixels), 'label': i % 3}

  Toy(data_dir=str(root), file_format='array_record').download_and_prepare()
  return root / 'toy' / '1.0.0'


@pytest.mark.parametrize('tensor', [False, True])
def test_tfds_read(tmp_path, tensor):
  prepare_tfds(tmp_path / 'data', tensor=tensor)
  data = sources.load('tfds:toy', data_dir=str(tmp_path / 'data'))
  assert data.train_images.shape == (30, 8, 8, 3) and data.test_images.shape == (6, 8, 8, 3)
  np.testing.assert_array_equal(data.train_images[:, 3, 3, 0], 10 * data.train_labels + 1)
  assert sorted(data.train_images[:, 0, 0, 1].tolist()) == list(range(30))
  assert data.class_names == ('ant', 'bee', 'fly') and data.name == 'tfds:toy'


def test_tfds_finds_its_default_folder_and_the_validation_split(tmp_path):
  prepare_tfds(tmp_path / 'tfds_default', splits=('train', 'validation'))
  assert len(sources.load('tfds:toy:1.0.0').test_images) == 6
  assert 'versions 1.0.0' in refusal('tfds:toy:2.0.0')


def test_tfds_without_a_train_split(tmp_path):
  prepare_tfds(tmp_path, splits=('test',))
  assert 'split train' in refusal('tfds:toy', data_dir=str(tmp_path))


def test_tfds_mixed_sizes(tmp_path):
  prepare_tfds(tmp_path, sizes=(8, 12))
  assert '--image_size' in refusal('tfds:toy', data_dir=str(tmp_path))
  assert sources.load('tfds:toy', data_dir=str(tmp_path), image_size=8).train_images.shape == (30, 8, 8, 3)


def test_tfds_damaged_files_are_named(tmp_path):
  place = prepare_tfds(tmp_path, count=300)
  record, = place.glob('toy-train*')
  sound = record.read_bytes()
  damaged = bytearray(sound)
  damaged[len(sound) // 2] ^= 255
  for content in (bytes(damaged), sound[:len(sound) // 2], b''):
    record.write_bytes(content)
    assert record.name in refusal('tfds:toy', data_dir=str(tmp_path))
  record.unlink()
  assert record.name in refusal('tfds:toy', data_dir=str(tmp_path))
  (place / 'dataset_info.json').write_text('{"name"')
  assert 'dataset_info.json' in refusal('tfds:toy', data_dir=str(tmp_path))


def test_tfds_missing_names_the_command_at_once(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  prepare_tfds(tmp_path / 'data')
  start = time.monotonic()
  message = refusal('tfds:cifar10', data_dir=str(tmp_path / 'data'))
  assert time.monotonic() - start < 5
  assert 'python -c' in message and 'tfds.builder("cifar10"' in message and 'file_format="array_record"' in message
  assert str(tmp_path / 'data') in message and 'prepared there: toy' in message and 'needs tensorflow' in message
  message = refusal('tfds:cifar11', data_dir=str(tmp_path / 'nowhere'))
  assert 'cifar11' in message and 'no stock TFDS data set' in message
  assert not (tmp_path / 'nowhere').exists()
  assert 'tfds:NAME' in refusal('tfds:../data/toy', data_dir=str(tmp_path))


def test_tfds_tfrecord_is_refused_with_a_command(tmp_path):
  place = prepare_tfds(tmp_path / 'data')
  info = json.loads((place / 'dataset_info.json').read_text())
  (place / 'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
  message = refusal('tfds:toy', data_dir=str(tmp_path / 'data'))
  assert 'tfrecord' in message and 'expected array_record' in message and 'python -c' in message


def test_tfds_configurations(tmp_path):
  place = prepare_tfds(tmp_path)
  for name in ('one', 'two'):
    (tmp_path / 'many' / name).mkdir(parents=True)
    os.symlink(place, tmp_path / 'many' / name / '1.0.0')
  assert 'many/one, many/two' in refusal('tfds:many', data_dir=str(tmp_path))


def test_tfds_leaves_no_temporary_folders(tmp_path, monkeypatch):
  prepare_tfds(tmp_path / 'data')
  (tmp_path / 'temporary').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'temporary'))
  sources.load('tfds:toy', data_dir=str(tmp_path / 'data'))
  assert not list((tmp_path / 'temporary').iterdir())


def test_real_cifar10(tmp_path):
  beside = pathlib.Path(__file__).resolve().parents[3] / 'shared' / 'data' / 'tfds'
  root = pathlib.Path(os.environ.get('LWFEDSSL_DATA_DIR') or beside)
  if not (root / 'cifar10').is_dir():
    pytest.skip('no prepared cifar10: set LWFEDSSL_DATA_DIR to a TFDS folder that has it')
  pytest.importorskip('tensorflow_datasets')
  opened = sources.READERS['tfds']('cifar10', str(root)).open()
  assert (opened.train.size, opened.test.size, len(opened.class_names)) == (50_000, 10_000, 10)
  read = opened.train.read(range(0, 50_000, 500))  # all of it takes many seconds
  pixels = np.stack([images.decode_image(raw) for raw, _ in read])
  assert pixels.shape == (100, 32, 32, 3) and 80 < pixels.mean() < 160
  assert {label for _, label in read} == set(range(10))


# The cache


def same(a, b):
  for x, y in zip(a, b):
    if isinstance(x, np.ndarray):
      np.testing.assert_array_equal(x, y)
    else:
      assert x == y


def entries(root):
  return sorted(path for path in pathlib.Path(root).iterdir())


@pytest.mark.parametrize('kind', ['folder', 'flat', 'npz', 'tfds'])
def test_second_load_decodes_nothing(tmp_path, decodes, kind):
  options = {'cache_dir': str(tmp_path / 'cache')}
  if kind == 'npz':
    spec = save_npz(tmp_path, **arrays())
  elif kind == 'tfds':
    prepare_tfds(tmp_path / 'data')
    spec, options['data_dir'] = 'tfds:toy', str(tmp_path / 'data')
  else:
    spec = f'folder:{make_classes(tmp_path / "images")}' + ('/cat' if kind == 'flat' else '')
  first = sources.load(spec, **options)
  assert decodes
  decodes.clear()
  second = sources.load(spec, **options)
  assert not decodes
  same(first, second)
  assert isinstance(second.train_images, np.memmap) and not second.train_images.flags.writeable
  assert len(entries(tmp_path / 'cache')) == 1
  sources.load(spec, **options, image_size=4)
  assert decodes and len(entries(tmp_path / 'cache')) == 2


def test_small_data_and_digits_are_not_cached(tmp_path):
  sources.load(save_npz(tmp_path, **arrays()))
  sources.load('digits')
  assert not (tmp_path / 'xdg').exists()


def test_default_cache_folder(tmp_path, decodes):
  sources.load(save_npz(tmp_path, **arrays()))
  assert len(entries(tmp_path / 'xdg' / 'lwfedssl_jax')) == 1


def test_changed_added_and_removed_files_are_noticed(tmp_path, decodes):
  root = make_classes(tmp_path / 'images')
  load = lambda: sources.load(f'folder:{root}', cache_dir=str(tmp_path / 'cache'))
  load()
  changes = [
      lambda: color((9, 9, 9)).save(root / 'cat' / '001.png'),
      lambda: os.utime(root / 'cat' / '002.png', (1, 1)),
      lambda: color((9, 9, 9)).save(root / 'cat' / 'new.png'),
      lambda: (root / 'cat' / 'new.png').unlink(),
      lambda: (root / 'dog' / '000.png').rename(root / 'cat' / 'moved.png'),
  ]
  for number, change in enumerate(changes):
    decodes.clear()
    load()
    if number != 4:  # before the fifth change the fourth has restored what was cached
      assert not decodes
    change()
    data = load()
    assert bool(decodes) == (number != 3)
  assert np.bincount(data.train_labels, minlength=2)[0] > np.bincount(data.train_labels)[1]


def test_skipped_images_are_cached_too(tmp_path, decodes):
  root = make_classes(tmp_path / 'images', 10)
  (root / 'cat' / '003.png').write_text('nonsense')
  load = lambda: sources.load(f'folder:{root}', cache_dir=str(tmp_path / 'cache'))
  first = load()
  decodes.clear()
  same(first, load())
  assert not decodes and len(first.train_images) + len(first.test_images) == 19


def _truncate(entry):
  path = entry / 'train_images.npy'
  path.write_bytes(path.read_bytes()[:-100])


def _extend(entry):
  with open(entry / 'test_images.npy', 'ab') as f:
    f.write(b'more')


def _reshape(entry):
  np.save(entry / 'train_images.npy', np.zeros((3, 4, 4, 3), np.uint8))


def _lose(entry):
  (entry / 'test_labels.npy').unlink()


def _garble(entry):
  (entry / 'entry.json').write_text('[{')


def _empty(entry):
  (entry / 'entry.json').write_text('{}')


def _half(entry):
  (entry / 'entry.json').unlink()


@pytest.mark.parametrize('damage', [_truncate, _extend, _reshape, _lose, _garble, _empty, _half])
def test_damaged_entry_is_rebuilt(tmp_path, decodes, damage):
  spec, root = save_npz(tmp_path, **arrays()), tmp_path / 'cache'
  first = sources.load(spec, cache_dir=str(root))
  entry, = entries(root)
  kept = np.array(first.train_images)
  damage(entry)
  decodes.clear()
  second = sources.load(spec, cache_dir=str(root))
  assert decodes
  np.testing.assert_array_equal(second.train_images, kept)
  decodes.clear()
  sources.load(spec, cache_dir=str(root))
  assert not decodes and entries(root) == [entry]


def test_unwritable_cache_warns_and_goes_on(tmp_path, decodes, caplog):
  (tmp_path / 'file').write_text('')
  data = sources.load(save_npz(tmp_path, **arrays()), cache_dir=str(tmp_path / 'file' / 'below'))
  assert len(data.train_images) == 12 and caplog.text.count('not cached') == 1


def test_full_disk_warns_and_goes_on(tmp_path, decodes, caplog, monkeypatch):
  def full(descriptor, offset, length):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
  spec, root = save_npz(tmp_path, **arrays()), tmp_path / 'cache'
  data = sources.load(spec, cache_dir=str(root))
  assert len(data.train_images) == 12 and len(data.test_images) == 5
  assert caplog.text.count('No space left') == 1 and entries(root) == []


def test_refusal_leaves_no_entry(tmp_path, decodes):
  root = make_classes(tmp_path / 'images', 4)
  color(0, (9, 9)).save(root / 'dog' / '002.png')
  refusal(f'folder:{root}', cache_dir=str(tmp_path / 'cache'))
  assert entries(tmp_path / 'cache') == []


def test_abandoned_temporary_folders_are_removed(tmp_path, decodes):
  old, new = tmp_path / 'cache' / '.writing-old', tmp_path / 'cache' / '.writing-new'
  old.mkdir(parents=True)
  new.mkdir()
  os.utime(old, (1, 1))
  sources.load(save_npz(tmp_path, **arrays()), cache_dir=str(tmp_path / 'cache'))
  assert not old.exists() and new.exists()


def test_concurrent_writers_do_no_harm(tmp_path, decodes):
  spec, root = save_npz(tmp_path, **arrays(number=600)), tmp_path / 'cache'
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda _: sources.load(spec, cache_dir=str(root)), range(4)))
  for result in results:
    same(result, results[0])
  assert len(entries(root)) == 1
  decodes.clear()
  same(sources.load(spec, cache_dir=str(root)), results[0])
  assert not decodes
