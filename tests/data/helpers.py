"""Small data sets on disk, and what a refusal looks like."""

import io

import numpy as np
import pytest
from PIL import Image

from lwfedssl_jax.data import sources
from lwfedssl_jax.errors import UsageError


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


def encoded(image, kind='PNG', **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


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


def prepare_tfds(root, size=8, sizes=None, splits=('train', 'test'), tensor=False, count=30):
  """Prepares a tiny data set named `toy` as array_record, without TensorFlow."""
  tfds = pytest.importorskip('tensorflow_datasets')
  kind = (
    tfds.features.Tensor(shape=(size, size, 3), dtype=np.uint8)
    if tensor
    else tfds.features.Image(shape=(None, None, 3), encoding_format='png')
  )

  class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {'image': kind, 'label': tfds.features.ClassLabel(names=['ant', 'bee', 'fly'])}
        ),
      )

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(name) for name in splits}

    def _generate_examples(self, name):
      for i in range(count if name == 'train' else 6):
        side = sizes[i % len(sizes)] if sizes else size
        pixels = np.full((side, side, 3), (10 * (i % 3) + 1, i, 0), np.uint8)
        yield f'{i:05d}', {'image': pixels if tensor else Image.fromarray(pixels), 'label': i % 3}

  Toy(data_dir=str(root), file_format='array_record').download_and_prepare()
  return root / 'toy' / '1.0.0'
