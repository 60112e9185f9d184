"""MedMNIST's layout: channels, splits, refusals, no pickles."""

import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from helpers import arrays, refusal, save_npz

from lwfedssl_jax.data import sources


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
  data = sources.load(spec)
  assert len(data.test_images) == 4 and data.val_images is data.test_images
  assert sources.describe(data).endswith('12 training and 4 test images (its validation split), 8x8, 3 classes')
  spec = save_npz(tmp_path, train_images=np.zeros((6, 4, 4), np.uint8))
  data = sources.load(spec)
  assert data.test_images.shape == (0, 4, 4, 3) and data.train_labels is None and data.class_names == ()


@pytest.mark.parametrize('labeled', [True, False])
def test_npz_keeps_val_beside_test(tmp_path, labeled):
  """Test images without labels give way to labeled validation images."""
  made = arrays(**({} if labeled else {'test_labels': None}))
  data = sources.load(save_npz(tmp_path, **made))
  np.testing.assert_array_equal(data.val_images[..., 0], made['val_images'])
  assert data.val_labels.tolist() == [0, 1, 2, 0] and len(data.test_labels) == (5 if labeled else 4)
  assert labeled == ('12 training and 5 test images, 4 validation images, 8x8' in sources.describe(data))


def test_npz_floats_and_resizing(tmp_path):
  spec = save_npz(tmp_path, train_images=np.full((3, 6, 10, 3), 0.5, np.float32))
  assert '--image_size' in refusal(spec)
  data = sources.load(spec, image_size=5)
  assert data.train_images.shape == (3, 5, 5, 3) and set(data.train_images.ravel().tolist()) == {128}


@pytest.mark.parametrize(
  ('replaced', 'said'),
  [
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
    ({'val_labels': np.zeros(5, int)}, '4 labels'),
    ({'val_images': np.full((4, 8, 8), np.nan)}, 'val_images'),
    ({'train_labels': np.full(12, 0.5)}, 'whole numbers'),
    ({'train_labels': np.full(12, -1)}, 'whole numbers'),
    ({'train_labels': np.full(12, 2**31)}, 'whole numbers'),
  ],
)
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
