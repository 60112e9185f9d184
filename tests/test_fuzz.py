"""Nonsense on the command line and damage on the disk: one line says what was expected, and nothing else is touched.

Damage is drawn from fixed seeds, so that a failure comes back; only checkpoints, whose files orbax names at random, are
damaged otherwise each time.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import lwfedssl_jax
from experiments import command, flags
from lwfedssl_jax import UsageError, catalog
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import sources
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.workdir import checkpoint, metrics_writer, run_dir

NUMBERS = ('0', '1', '-1', '2', '8', '0.5', '1e3', '1e400', 'nan', 'inf', '9' * 400, '0x10', ' 3', '1_0', '٣', '')
TUPLES = ('0.1,1', '1,0.1', '0.4,0.4,0.2,0.1', '1,1,1,1', ',', ',,,', 'a,b', '0.1,nan', '1,' + '9' * 400)
WORDS = ('true', 'false', 'None', '--', 'mean\nmedian', '\udcff', 'é', '[]', '{"a": 1}')
FIELDS = [name for group in configs.GROUPS.values() for name in group.__dataclass_fields__]
CHOICES = sorted(
  {
    choice
    for group in configs.GROUPS.values()
    for field in group.__dataclass_fields__.values()
    for choice in field.metadata['choices']
  }
)
WORKDIR_FILES = (run_dir.CONFIG, metrics_writer.METRICS, run_dir.SUMMARY)
REFUSED = 'refused'


@pytest.fixture(autouse=True)
def _watchdog():
  """What hangs fails."""

  def bark(*_):
    raise TimeoutError('a reader hangs')

  before = signal.signal(signal.SIGALRM, bark)
  signal.alarm(300)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def check_one_line(error, start=''):
  """Returns the line."""
  line = str(error)
  assert line.strip() and '\n' not in line and line.startswith(start), line
  return line


def listing(folder):
  """Everything below a folder: names, sizes, times; a link as itself."""
  return {
    str(path): (status.st_mode, status.st_size, status.st_mtime_ns)
    for path in sorted(pathlib.Path(folder).rglob('*'))
    for status in [path.lstat()]
  }


def mangle(content: bytes, generator: random.Random) -> bytes:
  """Flips, cuts, inserts, repeats or replaces bytes."""
  content = bytearray(content)
  for _ in range(generator.choice((1, 1, 2, 5))):
    where = generator.randrange(len(content) + 1)
    length = generator.choice((1, 2, 8, 64, 1000))
    kind = generator.choice(('flip', 'flip', 'cut', 'truncate', 'insert', 'repeat', 'zeros', 'replace'))
    if kind == 'flip':
      content[where : where + 1] = bytes(byte ^ (1 << generator.randrange(8)) for byte in content[where : where + 1])
    elif kind == 'cut':
      del content[where : where + length]
    elif kind == 'truncate':
      del content[where:]
    elif kind == 'insert':
      content[where:where] = generator.randbytes(length)
    elif kind == 'repeat':
      content[where:where] = content[where : where + length] * 2
    elif kind == 'zeros':
      content[where : where + length] = bytes(len(content[where : where + length]))
    else:
      content = bytearray(generator.choice((b'', b'\n', b'null\n', b'[]\n', b'{}\n', b'\xff\xfe', b'[' * 100_000)))
  return bytes(content)


# The command line.


FLAGS = absl_flags.FlagValues()
ECHO = command.Command(
  'Prints its configuration.', FLAGS, lambda: configs.flatten(flags.config_from_flags(FLAGS)), has_config=True
)


def parsed(argv):
  """Returns the configuration, or the one line that a user would see."""
  FLAGS.unparse_flags()
  shown, said = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
    code = command.execute(ECHO, ['program', *argv])
  if code == 0:
    return configs.from_flat(json.loads(shown.getvalue()))
  assert code == command.USAGE_EXIT_CODE and not shown.getvalue()
  return check_one_line(said.getvalue().removesuffix('\n'), start='error: ')


ARGUMENTS = st.builds(
  '{}{}{}'.format,
  st.sampled_from(['--', '--', '--', '-', '--no', '']),
  st.sampled_from([*FIELDS, 'flagfile', 'undefok', 'no_such_flag']),
  st.one_of(
    st.just(''),
    st.builds(
      '={}'.format,
      st.one_of(
        st.sampled_from(NUMBERS + TUPLES + WORDS),
        st.sampled_from(CHOICES),
        st.text(st.characters(exclude_characters='\0'), max_size=6),
      ),
    ),
  ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ARGUMENTS, max_size=5))
def test_any_command_line_is_a_configuration_or_a_line(argv):
  found = parsed(argv)
  if isinstance(found, configs.Config):
    assert configs.from_flat(json.loads(json.dumps(configs.flatten(found)))) == found


@pytest.mark.parametrize('value', NUMBERS + TUPLES + WORDS)
def test_any_value_of_any_flag_is_a_configuration_or_a_line(value):
  for name in FIELDS:
    parsed([f'--{name}={value}'])


@pytest.mark.parametrize('seed', range(3))
def test_any_file_of_flags_is_a_configuration_or_a_line(tmp_path, seed):
  preset = next((pathlib.Path(flags.__file__).parent / 'presets').glob('quickstart.flags')).read_bytes()
  path, generator = tmp_path / 'a.flags', random.Random(seed)
  found = set()
  for _ in range(40):
    path.write_bytes(mangle(preset, generator))
    found.add(type(parsed([f'--flagfile={path}'])))
  assert found == {configs.Config, str}
  path.write_bytes(b'--seed=1\n\xff\xfe\n')
  assert str(path) in parsed([f'--flagfile={path}'])
  assert str(tmp_path) in parsed([f'--flagfile={tmp_path}'])


# Data.


KINDS = ('u1', 'i1', '>u2', '<u8', 'i8', 'f2', '>f4', 'f8', 'c8', '?', 'U3', 'S2', 'M8[s]', 'V3', 'i4,f4')


@settings(max_examples=120, deadline=None)
@given(
  st.dictionaries(
    st.sampled_from(['train_images', 'train_labels', 'val_images', 'test_images', 'test_labels', 'other', 'a/../b']),
    st.tuples(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=5), st.sampled_from(KINDS), st.integers(0, 99)),
    max_size=5,
  ),
  st.sampled_from([0, 1, 5]),
)
def test_any_arrays_are_images_or_a_line(described, image_size):
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent) / 'given'
    folder.mkdir()
    made = {}
    for name, (shape, kind, seed) in described.items():
      count = int(np.prod(shape)) * np.dtype(kind).itemsize
      made[name] = (
        np.frombuffer(np.random.default_rng(seed).bytes(count), kind).reshape(shape)
        if count
        else (np.zeros(shape, kind))
      )
    np.savez(folder / 'data.npz', **made)
    before = listing(parent)
    try:
      data = sources.load(f'npz:{folder}/data.npz', image_size=image_size, cache_dir=f'{parent}/cache')
    except UsageError as error:
      check_one_line(error)
    else:
      assert data.train_images.dtype == np.uint8 and len(data.train_images)
      assert data.train_labels is None or len(data.train_labels) == len(data.train_images)
    assert listing(parent) == before


def write_images(folder):
  generator = np.random.default_rng(0)
  for number, name in enumerate(('a.png', 'b.jpg', 'c.bmp', 'd.gif', 'e.tiff', 'f.webp', 'g.ppm', 'h.ico', 'i.tga')):
    label = folder / f'class {number % 2}'
    label.mkdir(parents=True, exist_ok=True)
    Image.fromarray(generator.integers(0, 255, (16, 16, 3), np.uint8)).save(label / name)


@pytest.mark.parametrize('seed', range(3))
def test_any_folder_of_images_is_read_or_refused_in_a_line(tmp_path, seed):
  folder, generator, outcomes = tmp_path / 'given', random.Random(seed), set()
  write_images(tmp_path / 'sound')
  for _ in range(50):
    shutil.copytree(tmp_path / 'sound', folder)
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    for path in generator.sample(files, generator.choice((1, 1, 2, 9))):
      path.write_bytes(mangle(path.read_bytes(), generator))
    odd = generator.choice(files)
    kind = generator.choice(('none', 'none', 'link', 'loop', 'folder', 'name', 'fifo'))
    if kind in ('link', 'loop', 'folder', 'fifo'):
      odd.unlink()
    if kind == 'link':
      odd.symlink_to(tmp_path / 'nowhere')
    elif kind == 'loop':
      odd.symlink_to(odd.parent)
    elif kind == 'folder':
      odd.mkdir()
    elif kind == 'fifo':
      os.mkfifo(odd)
    elif kind == 'name':
      odd.rename(odd.with_name('\udcff\n \t.png'))
    before = listing(tmp_path)
    try:
      data = sources.load(f'folder:{folder}', image_size=generator.choice((0, 16, 5)), cache_dir=f'{tmp_path}/cache')
    except UsageError as error:
      check_one_line(error)
      outcomes.add('refused')
    else:
      assert data.train_images.dtype == np.uint8 and 4 <= len(data.train_images) <= 9
      outcomes.add('read')
    assert listing(tmp_path) == before
    shutil.rmtree(folder)
  assert outcomes == {'read', 'refused'}


# A run's folder.


CONFIG = {'encoder': 'vit_micro', 'image_size': 8, 'num_clients': 2, 'batch_size': 4, 'rounds_per_stage': 1}


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
  """What a run of two rounds leaves, without running it."""
  folder = tmp_path_factory.mktemp('sound') / 'run'
  config = configs.configure(**CONFIG, workdir=str(folder))
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(catalog.ENCODERS, 'vit_micro', catalog.VitTraits(width=8, depth=4, num_heads=2, mlp_ratio=2))
    with run_dir.claim_workdir(config):
      shapes = jax.eval_shape(make_model(config.model, config.objective, 8).init_params, jax.random.key(0))
      params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), shapes)
      with checkpoint.Checkpoints(str(folder)) as checkpoints:
        for step in (1, 2):
          checkpoints.save(jax.tree.map(lambda leaf, step=step: leaf * step, params), step)
    rows = [{'round': step, 'stage': step, 'loss': 1.5, 'participants': 2, 'rejected_clients': []} for step in range(2)]
    (folder / metrics_writer.METRICS).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    run_dir.write_json(str(folder / run_dir.SUMMARY), {'finished': False, 'final_loss': 1.5})
    yield folder


def restore(folder):
  """Returns how many rounds the newest sound checkpoint has seen; 0: there is none at all."""
  config = configs.configure(**CONFIG)
  shapes = jax.eval_shape(make_model(config.model, config.objective, 8).init_params, jax.random.key(0))
  with checkpoint.Checkpoints(str(folder), read_only=True) as checkpoints:
    restored = checkpoints.restore_newest(shapes)
  if restored is None:
    return 0
  assert (np.asarray(restored.params['norm']['scale']) == restored.rounds_done / 2).all()
  return restored.rounds_done


def load_encoder(folder):
  loaded = lwfedssl_jax.load_encoder(str(folder))
  assert (np.asarray(loaded.params['norm']['scale']) == loaded.rounds_done / 2).all()
  return loaded.rounds_done


READERS = {
  run_dir.CONFIG: lambda folder: run_dir.read_config(str(folder)),
  metrics_writer.METRICS: lambda folder: [row['round'] + 1 for row in metrics_writer.read_metrics(str(folder))],
  run_dir.SUMMARY: lambda folder: run_dir.read_json(str(folder / run_dir.SUMMARY)),
}


def read_or_refused(read, folder):
  """Returns what was read, or REFUSED where a line says why not; either way the folder and its neighbors stay."""
  before, found = listing(folder.parent), REFUSED
  try:
    found = read(folder)
  except UsageError as error:
    assert str(folder) in check_one_line(error)  # noqa: PT017 (or else something was read)
  assert listing(folder.parent) == before
  return found


@pytest.mark.parametrize('name', WORKDIR_FILES)
def test_any_bytes_in_a_run_s_file_are_read_or_refused(run_folder, tmp_path, name):
  sound, folder, generator = (run_folder / name).read_bytes(), tmp_path / 'run', random.Random(name)
  folder.mkdir()
  outcomes = []
  for _ in range(300):
    (folder / name).write_bytes(mangle(sound, generator))
    outcomes.append(read_or_refused(READERS[name], folder) is REFUSED)
  assert 10 < sum(outcomes) < 300


@pytest.mark.parametrize('name', WORKDIR_FILES)
def test_a_run_s_file_that_is_no_file_is_refused(run_folder, tmp_path, name):
  folder = tmp_path / 'run'
  (folder / name).mkdir(parents=True)
  assert read_or_refused(READERS[name], folder) is REFUSED


JSON = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.just(10**400),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(CHOICES),
  ),
  lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
  max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
  st.dictionaries(st.sampled_from([*FIELDS, 'format', 'config', 'unknown']), JSON, max_size=3),
  st.sets(st.sampled_from([*FIELDS, 'format', 'config']), max_size=2),
)
def test_any_json_in_config_json_is_a_configuration_or_a_line(run_folder, changed, rejected_clients):
  saved = json.loads((run_folder / run_dir.CONFIG).read_text())
  outside = ('format', 'config')
  saved['config'] |= {name: value for name, value in changed.items() if name not in outside}
  saved['config'] = {name: value for name, value in saved['config'].items() if name not in rejected_clients}
  saved |= {name: value for name, value in changed.items() if name in outside}
  saved = {name: value for name, value in saved.items() if name not in rejected_clients}
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent) / 'run'
    folder.mkdir()
    (folder / run_dir.CONFIG).write_text(json.dumps(saved))
    read_or_refused(READERS[run_dir.CONFIG], folder)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(JSON, st.fixed_dictionaries({'round': JSON})), max_size=3))
def test_any_json_in_metrics_is_rows_of_rounds_or_a_line(rows):
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent) / 'run'
    folder.mkdir()
    (folder / metrics_writer.METRICS).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    found = read_or_refused(READERS[metrics_writer.METRICS], folder)
    assert (found is not REFUSED) == all(isinstance(row, dict) and isinstance(row.get('round'), int) for row in rows)


def damage_checkpoints(folder, generator):
  """Damages up to eight things below checkpoints/: what files hold, whether they are there, what they are called."""
  for _ in range(generator.choice((1, 2, 4, 8))):
    path = generator.choice(sorted(folder.rglob('*')))
    kind = generator.choice(('mangle', 'mangle', 'mangle', 'delete', 'rename', 'swap', 'link', 'extra'))
    if kind == 'mangle' and path.is_file():
      path.write_bytes(mangle(path.read_bytes(), generator))
    elif kind == 'delete':
      shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif kind == 'rename':
      path.rename(path.with_name(generator.choice(('0', '3', '-1', 'x', '٣', '3.orbax-checkpoint-tmp', ' '))))
    elif kind == 'swap' and path.is_file():
      path.unlink()
      path.mkdir()
    elif kind == 'link' and path.is_file():
      path.unlink()
      path.symlink_to(generator.choice((path.parent, folder / 'nowhere')))
    elif kind == 'extra':
      extra = folder / generator.choice(('5', 'x', '7.orbax-checkpoint-tmp', '99999999999999999999'))
      extra.write_bytes(b'') if generator.random() < 0.5 else extra.mkdir()


def test_any_damage_to_checkpoints_gives_a_valid_one_or_one_line(run_folder, tmp_path):
  folder, generator, outcomes = tmp_path / 'run', random.Random(0), set()
  for _ in range(40):
    shutil.copytree(run_folder, folder)
    with contextlib.suppress(OSError, IndexError):  # two kinds of damage that exclude each other
      damage_checkpoints(folder / 'checkpoints', generator)
    outcomes.add(read_or_refused(generator.choice((restore, load_encoder)), folder))
    shutil.rmtree(folder)
  assert len(outcomes) > 1
