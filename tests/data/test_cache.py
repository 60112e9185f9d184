"""The cache of decoded images: nothing decoded twice, nothing damaged used."""

import concurrent.futures
import os
import pathlib

import numpy as np
import pytest
from helpers import arrays, color, make_classes, prepare_tfds, refusal, save_npz

from lwfedssl_jax.data import sources


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

  def load():
    return sources.load(f'folder:{root}', cache_dir=str(tmp_path / 'cache'))

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

  def load():
    return sources.load(f'folder:{root}', cache_dir=str(tmp_path / 'cache'))

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
  (entry,) = entries(root)
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
