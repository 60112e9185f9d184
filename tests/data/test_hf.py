"""Hugging Face data sets: folders of `save_to_disk`, read offline; refusals; the Hub is never asked."""

import sys

import numpy as np
import pytest
from helpers import color, encoded, refusal

from lwfedssl_jax.data import sources


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf_home'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  loaded = pytest.importorskip('datasets', reason='extra `hf` is not installed')
  monkeypatch.setattr(loaded.config, 'HF_HUB_OFFLINE', True)
  loaded.disable_progress_bars()
  return loaded


def make(datasets, count, image='image', label='label', labels=None):
  """Images whose green value is their number and whose red value belongs to their label."""
  labels = [index % 3 for index in range(count)] if labels is None else labels
  made = {
    image: [color((10 * (labels[i] or 0) + 1, i, 0)) for i in range(count)],
    label: labels,
    'other': [f'{i}' for i in range(count)],
  }
  kinds = {
    image: datasets.Image(),
    label: datasets.ClassLabel(names=['ant', 'bee', 'fly']),
    'other': datasets.Value('string'),
  }
  return datasets.Dataset.from_dict(made, features=datasets.Features(kinds))


def save(datasets, folder, **splits):
  datasets.DatasetDict(splits).save_to_disk(str(folder))
  return f'hf:{folder}'


@pytest.mark.parametrize(('image', 'label'), [('image', 'label'), ('img', 'fine')])
def test_splits_of_a_saved_folder(datasets, tmp_path, image, label):
  made = {name: make(datasets, n, image, label) for name, n in (('train', 30), ('test', 6), ('validation', 4))}
  data = sources.load(save(datasets, tmp_path / 'd', **made))
  assert data.train_images.shape == (30, 8, 8, 3) and data.class_names == ('ant', 'bee', 'fly')
  np.testing.assert_array_equal(data.train_images[:, 3, 3, 0], 10 * data.train_labels + 1)
  assert data.train_images[:, 0, 0, 1].tolist() == list(range(30))
  assert (len(data.test_images), len(data.val_images)) == (6, 4) and data.val_labels.tolist() == [0, 1, 2, 0]


def test_one_split_is_the_training_images(datasets, tmp_path):
  make(datasets, 5).save_to_disk(str(tmp_path / 'd'))
  data = sources.load(f'hf:{tmp_path}/d', image_size=4)
  assert data.train_images.shape == (5, 4, 4, 3) and not len(data.test_images)


def test_labels_that_are_missing_or_hidden_make_a_split_unlabeled(datasets, tmp_path):
  hidden, missing = make(datasets, 3, labels=[0, -1, -1]), make(datasets, 3, labels=[0, None, 1])
  data = sources.load(save(datasets, tmp_path / 'd', train=make(datasets, 6), test=hidden, val=missing))
  assert data.train_labels is not None and data.test_labels is None and data.val_labels is None
  plain = make(datasets, 4).remove_columns('label')
  assert sources.load(save(datasets, tmp_path / 'e', train=plain)).train_labels is None


def test_a_saved_folder_is_decoded_once_and_then_read_without_the_package(datasets, tmp_path, decodes, monkeypatch):
  spec = save(datasets, tmp_path / 'd', train=make(datasets, 6))
  first = sources.load(spec)
  decodes.clear()
  monkeypatch.setitem(sys.modules, 'datasets', None)
  np.testing.assert_array_equal(sources.load(spec).train_images, first.train_images)
  assert not decodes
  assert "pip install 'lwfedssl-jax[hf]'" in refusal(spec, image_size=4)


def test_images_may_be_files_beside_the_data_set(datasets, tmp_path):
  color((7, 0, 0)).save(tmp_path / 'a.png')
  rows = datasets.Dataset.from_dict(
    {'image': [{'bytes': None, 'path': str(tmp_path / 'a.png')}, {'bytes': encoded(color((9, 0, 0))), 'path': None}]},
    features=datasets.Features({'image': datasets.Image()}),
  )
  assert sources.load(save(datasets, tmp_path / 'd', train=rows)).train_images[:, 0, 0, 0].tolist() == [7, 9]


def test_what_cannot_be_read_is_one_line(datasets, tmp_path):
  assert 'expected a split train, found test' in refusal(save(datasets, tmp_path / 'a', test=make(datasets, 3)))
  words = datasets.Dataset.from_dict({'text': ['a', 'b']})
  assert 'expected a column of type Image, found text' in refusal(save(datasets, tmp_path / 'b', train=words))
  named = save(datasets, tmp_path / 'c', train=make(datasets, 3), test=make(datasets, 3, image='img'))
  assert 'expected the column image of split train in split test too' in refusal(named)
  broken = datasets.Dataset.from_dict(
    {'image': [{'bytes': b'no image', 'path': None}]}, features=datasets.Features({'image': datasets.Image()})
  )
  assert ': train[0]: ' in refusal(save(datasets, tmp_path / 'e', train=broken))
  (tmp_path / 'a' / 'test' / 'state.json').write_text('{')
  assert 'expected a data set that can be loaded' in refusal(f'hf:{tmp_path}/a')
  (tmp_path / 'empty').mkdir()
  assert 'expected a folder written by save_to_disk, with' in refusal(f'hf:{tmp_path}/empty')
  assert 'expected a folder written by save_to_disk, found none' in refusal(f'hf:{tmp_path}/none')


def test_a_name_is_looked_up_by_the_package(datasets, monkeypatch):
  asked, made = [], make(datasets, 6)
  monkeypatch.setattr(datasets, 'load_dataset', lambda *given: asked.append(given) or datasets.DatasetDict(train=made))
  assert len(sources.load('hf:someone/birds:small').train_images) == 6
  sources.load('hf:someone/birds')
  assert asked == [('someone/birds', 'small'), ('someone/birds', None)]
  monkeypatch.undo()
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  assert 'expected a data set that can be loaded' in refusal('hf:someone/birds')
