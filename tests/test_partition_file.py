"""Partitions that exist already: a run's partition.json, a file of one's own, and client folders."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, pretrain
from lwfedssl_jax import UsageError, configure
from lwfedssl_jax.data import federated_dataset, sources
from lwfedssl_jax.training import train

DIGITS = {'dataset': 'digits', 'image_size': 8, 'batch_size': 8}


def as_json(data):
  return train._partition_json(data)


def write(path, **values):
  path.write_text(json.dumps(values))
  return f'file:{path}'


@pytest.mark.parametrize('method', ['lw_fedssl', 'end_to_end'])
def test_what_a_run_writes_gives_the_same_federation_whatever_the_seed(tmp_path, method):
  drawn = {'partition': 'dirichlet', 'num_clients': 5, 'max_train_images': 200, 'auxiliary_fraction': 0.2}
  first = federated_dataset.load(configure(**DIGITS, **drawn, seed=3))
  path = write(tmp_path / 'partition.json', **as_json(first))
  again = federated_dataset.load(configure(**DIGITS, method=method, partition=path, num_clients=5, seed=4))
  assert as_json(again) == as_json(first)
  assert len(again.server_ids) == 40 and sum(map(len, again.client_images)) == 160
  np.testing.assert_array_equal(again.server_images, first.server_images)


def test_centralized_trains_on_the_images_of_all_clients_of_the_file(tmp_path):
  path = write(tmp_path / 'p.json', clients=[[5, 1, 9, 2], [0, 3, 4, 8]], server=[6, 7])
  data = federated_dataset.load(configure(dataset='digits', batch_size=4, method='centralized', partition=path))
  assert [ids.tolist() for ids in data.client_images] == [[0, 1, 2, 3, 4, 5, 8, 9]]
  assert data.server_ids.tolist() == [6, 7]


def test_a_server_without_images_is_named(tmp_path):
  path = write(tmp_path / 'p.json', clients=[[0, 1], [2, 3]])
  values = {'dataset': 'digits', 'batch_size': 2, 'num_clients': 2, 'auxiliary_fraction': 0.0, 'partition': path}
  data = federated_dataset.load(configure(**values, method='layerwise'))
  assert [ids.tolist() for ids in data.client_images] == [[0, 1], [2, 3]] and not len(data.server_ids)
  with pytest.raises(UsageError, match=r'--partition=file:.*p\.json: expected at least 2 images for the server, got 0'):
    federated_dataset.load(configure(**values, method='lw_fedssl'))


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (None, 'expected a JSON file, found none'),
    ('{"clients"', 'expected a JSON file'),
    ('[[0, 1]]', 'expected a JSON object with "clients"'),
    ('{"clients": []}', 'expected "clients", a list of indices for each client'),
    ('{"clients": [[0, 1], 5]}', 'expected a list of whole numbers for client 1'),
    ('{"clients": [[0, 1], [2, 3.0]]}', 'expected a list of whole numbers for client 1'),
    ('{"clients": [[0, 1], [2, true]]}', 'expected a list of whole numbers for client 1'),
    ('{"clients": [[0, 1], [2, 3]], "server": 4}', 'expected a list of whole numbers for server'),
    ('{"clients": [[0, 1], [2, 3]], "num_images": 9}', 'expected a partition of 1437 images, got one of 9'),
    ('{"clients": [[0, 1], [2, 1437]]}', 'expected indices from 0 to 1436, client 1 has 1437'),
    ('{"clients": [[0, 1], [2, -1]]}', 'expected indices from 0 to 1436, client 1 has -1'),
    ('{"clients": [[0, 1], [2]]}', 'expected at least 2 images of each client, client 1 has 1'),
    ('{"clients": [[0, 1], [2, 0]]}', 'expected each image once, 0 is at client 0 and client 1'),
    ('{"clients": [[0, 1], [2, 2]]}', 'expected each image once, 2 is at client 1 and client 1'),
    ('{"clients": [[0, 1], [2, 3]], "server": [3]}', 'expected each image once, 3 is at client 1 and server'),
    ('{"clients": [[0, 1], [2, 3], [4, 5]]}', '--num_clients: expected 3, the clients of'),
  ],
)
def test_a_file_that_is_no_partition_of_the_images_is_refused(tmp_path, content, reason):
  path = tmp_path / 'p.json'
  if content is not None:
    path.write_text(content)
  config = configure(dataset='digits', batch_size=2, num_clients=2, partition=f'file:{path}')
  with pytest.raises(UsageError) as error:
    federated_dataset.load(config)
  assert reason in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def test_max_train_images_may_not_contradict_the_file(tmp_path):
  path = write(tmp_path / 'p.json', clients=[[0, 1], [2, 3]], server=[4, 5])
  values = {'dataset': 'digits', 'batch_size': 2, 'num_clients': 2, 'partition': path}
  assert federated_dataset.load(configure(**values, max_train_images=6)).max_client_images == 2
  with pytest.raises(UsageError, match='--max_train_images: expected at least 6'):
    federated_dataset.load(configure(**values, max_train_images=5))


@pytest.mark.parametrize('value', ['', 'file', 'file:', 'fil:x', 'iid:x'])
def test_other_names_of_partitions_are_refused(value):
  with pytest.raises(UsageError, match=r'--partition: expected one of iid, dirichlet, .*, folders, file:PATH, got'):
    configure(partition=value)


def test_a_run_that_continues_keeps_its_partition(tmp_path):
  (tmp_path / 'run').mkdir()
  data = federated_dataset.load(configure(**DIGITS, num_clients=3))
  train._check_partition(data, str(tmp_path / 'run'))  # an older run has no file
  (tmp_path / 'run' / 'partition.json').write_text(json.dumps(as_json(data)))
  train._check_partition(data, str(tmp_path / 'run'))
  with pytest.raises(UsageError, match='--resume: expected the partition in'):
    train._check_partition(federated_dataset.load(configure(**DIGITS, num_clients=3, seed=1)), str(tmp_path / 'run'))


def make_client(folder: pathlib.Path, client: int, count: int, classes=('cat', 'dog')):
  """Images whose red value is the client's number, and whose green value that of the class."""
  for label, name in enumerate(classes or ['']):
    (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
      Image.new('RGB', (8, 8), (client, label, index)).save(folder / name / f'{index:03d}.png')


@pytest.fixture
def folders(tmp_path):
  for client, (name, count) in enumerate((('b', 10), ('a', 20), ('c', 15))):
    make_client(tmp_path / 'images' / name, client, count)
  return f'folder:{tmp_path / "images"}'


def load_folders(spec, **values):
  values = {'num_clients': 3, 'auxiliary_fraction': 0.2, 'batch_size': 2} | values
  return federated_dataset.load(configure(dataset=spec, partition='folders', **values))


def test_each_client_has_the_images_of_its_folder(folders):
  data = load_folders(folders)
  images, labels = data.dataset.train_images[:, 0, 0], data.dataset.train_labels
  assert [set(images[ids][:, 0].tolist()) for ids in data.client_images] == [{1}, {0}, {2}]  # a, b, c
  assert images[:, 1].tolist() == labels.tolist() and data.dataset.class_names == ('cat', 'dog')
  assert len(images) + len(data.dataset.test_images) == 90 and len(data.dataset.test_images) == 9
  held = data.dataset.test_images[:, 0, 0, :2]  # a tenth of each client's classes
  assert {tuple(row): 0 for row in held.tolist()}.keys() == {(c, k) for c in range(3) for k in range(2)}
  assert len(data.server_ids) == 16 and sum(map(len, data.client_images)) == 65
  assert len(load_folders(folders, method='centralized').client_images[0]) == 65


def test_the_partition_of_client_folders_can_be_used_again(folders, tmp_path):
  first = load_folders(folders)
  path = write(tmp_path / 'p.json', **as_json(first))
  classes = sources.load(folders)  # the same images by the other layout: another order and other classes
  assert classes.class_names == ('a', 'b', 'c')
  config = configure(dataset=folders, partition=path, num_clients=3, batch_size=2, seed=1)
  again = federated_dataset.partition_dataset(sources.load(folders, client_folders=True), config)
  assert as_json(again) == as_json(first)


def test_clients_without_classes_and_a_test_folder(tmp_path):
  for client, name in enumerate(('x', 'y')):
    make_client(tmp_path / 'train' / name, client, 6, classes=None)
  make_client(tmp_path / 'test', 9, 2)
  data = load_folders(f'folder:{tmp_path}', num_clients=2, method='layerwise')
  assert data.dataset.train_labels is None and len(data.dataset.test_images) == 4
  assert data.dataset.train_clients.tolist() == [0] * 6 + [1] * 6


def test_client_folders_are_cached_with_their_clients(folders, tmp_path, monkeypatch):
  monkeypatch.setattr('lwfedssl_jax.data.cache.MIN_BYTES', 0)
  options = {'cache_dir': str(tmp_path / 'cache'), 'client_folders': True}
  first, second = sources.load(folders, **options), sources.load(folders, **options)
  assert isinstance(second.train_images, np.memmap)
  np.testing.assert_array_equal(first.train_clients, second.train_clients)
  assert sources.load(folders, cache_dir=options['cache_dir']).train_clients is None  # an entry of its own


def test_unreadable_images_keep_clients_and_images_together(folders, tmp_path):
  (tmp_path / 'images' / 'a' / 'cat' / '000.png').write_text('no image')
  data = sources.load(folders, client_folders=True)
  assert data.train_images[:, 0, 0, 0].tolist() == [(1, 0, 2)[client] for client in data.train_clients]


def test_client_folders_that_do_not_fit_are_refused(folders, tmp_path):
  with pytest.raises(UsageError, match='--num_clients: expected 3, the client folders of folder:'):
    load_folders(folders, num_clients=4)
  with pytest.raises(UsageError, match='--partition=folders: expected --dataset=folder:PATH, got --dataset=digits'):
    load_folders('digits')
  with pytest.raises(UsageError, match='--partition=folders: expected images of --dataset=folder:PATH'):
    federated_dataset.partition_dataset(sources.load(folders), configure(partition='folders', dataset=folders))
  with pytest.raises(UsageError, match=r'expected at least 2 images in each client folder, .*; folder 2 of 3 has'):
    load_folders(folders, auxiliary_fraction=0.9)
  make_client(tmp_path / 'images' / 'd', 3, 4, classes=None)
  with pytest.raises(UsageError, match=f'{os.sep}d: expected class folders, as the other client folders have'):
    load_folders(folders)


def test_flags_accept_a_file_and_help_lists_the_choices(capsys):
  from experiments import command

  assert command.execute(pretrain.COMMAND, ['pretrain', '--help']) == 0
  assert 'shards, folders, file:PATH)' in ' '.join(capsys.readouterr().out.split())
  command.parse(pretrain.COMMAND, ['--partition=file:a/b.json'])
  assert pretrain.FLAGS.partition == 'file:a/b.json'


def test_evaluation_reads_the_classes_below_the_client_folders(monkeypatch, folders):
  """A run on client folders is evaluated on its classes; another data set has the usual layout."""
  from experiments import command
  from lwfedssl_jax import run_evaluation
  from lwfedssl_jax.workdir import run_dir

  seen = []
  monkeypatch.setattr(run_dir, 'read_config', lambda workdir: configure(dataset=folders, partition='folders'))
  monkeypatch.setattr(
    run_evaluation, 'evaluate_run', lambda workdir, protocol, dataset, **options: seen.append(dataset)
  )
  for flags in ([], [f'--dataset={folders}']):
    command.parse(evaluate.COMMAND, ['--workdir=x', *flags])
    evaluate._evaluate('x', [0], from_scratch=False)
  assert [dataset.class_names for dataset in seen] == [('cat', 'dog'), ('a', 'b', 'c')]
