"""Folders of images: splits, classes, what is skipped and what is refused."""

import numpy as np
import pytest
from helpers import color, make_classes, refusal

from lwfedssl_jax.data import sources


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

  def reds(pixels):
    return set(pixels[:, 0, 0, 0].tolist())

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


def test_unlabeled_test_folder_gives_way_to_a_labeled_one(tmp_path):
  make_classes(tmp_path / 'train', 2)
  make_classes(tmp_path / 'val', 1)
  (tmp_path / 'test').mkdir()
  color(0).save(tmp_path / 'test' / 'a.png')
  assert sources.load(f'folder:{tmp_path}').test_labels.tolist() == [0, 1]


def test_validation_folder_beside_a_test_folder_is_kept(tmp_path):
  for name, count in (('train', 3), ('val', 2), ('test', 1)):
    make_classes(tmp_path / name, count)
  data = sources.load(f'folder:{tmp_path}')
  assert data.test_labels.tolist() == [0, 1] and data.val_labels.tolist() == [0, 0, 1, 1]
  assert len(data.train_images) == 6  # no further images are held out


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
