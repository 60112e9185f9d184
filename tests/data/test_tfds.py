"""TFDS folders without TensorFlow: read, or refused at once with the command that prepares them."""

import json
import os
import pathlib
import sys
import time

import numpy as np
import pytest
from helpers import prepare_tfds, refusal

from lwfedssl_jax.data import images, sources


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
  data = sources.load('tfds:toy:1.0.0')
  assert len(data.test_images) == 6 and data.val_images is data.test_images
  assert 'versions 1.0.0' in refusal('tfds:toy:2.0.0')


def test_tfds_keeps_validation_beside_test(tmp_path):
  prepare_tfds(tmp_path, splits=('train', 'validation', 'test'))
  data = sources.load('tfds:toy', data_dir=str(tmp_path))
  assert len(data.val_images) == len(data.test_images) == 6 and data.val_images is not data.test_images


def test_tfds_without_a_train_split(tmp_path):
  prepare_tfds(tmp_path, splits=('test',))
  assert 'split train' in refusal('tfds:toy', data_dir=str(tmp_path))


def test_tfds_mixed_sizes(tmp_path):
  prepare_tfds(tmp_path, sizes=(8, 12))
  assert '--image_size' in refusal('tfds:toy', data_dir=str(tmp_path))
  assert sources.load('tfds:toy', data_dir=str(tmp_path), image_size=8).train_images.shape == (30, 8, 8, 3)


def test_tfds_damaged_files_are_named(tmp_path):
  place = prepare_tfds(tmp_path, count=300)
  (record,) = place.glob('toy-train*')
  sound = record.read_bytes()
  damaged = bytearray(sound)
  damaged[len(sound) // 2] ^= 255
  for content in (bytes(damaged), sound[: len(sound) // 2], b''):
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


@pytest.mark.parametrize('prepared', [True, False])
def test_without_the_package_one_line_names_the_extra(tmp_path, monkeypatch, prepared):
  if prepared:
    prepare_tfds(tmp_path)
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  message = refusal('tfds:toy', data_dir=str(tmp_path))
  assert message.startswith('--dataset=tfds:NAME: ') and "pip install 'lwfedssl-jax[tfds]'" in message
