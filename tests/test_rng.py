"""Every purpose draws from a stream of its own, and every draw follows the seed."""

import ast
import collections
import itertools
import pathlib

import jax
import numpy as np
import pytest

from lwfedssl_jax import rng
from lwfedssl_jax.config_groups import PartitionConfig
from lwfedssl_jax.data import partition
from lwfedssl_jax.evaluation import protocols

LIBRARY = pathlib.Path(rng.__file__).parent


def parsed_files():
  return {path.relative_to(LIBRARY).as_posix(): ast.parse(path.read_text()) for path in LIBRARY.rglob('*.py')}


def uses_of_streams(tree):
  """Yields (name of the stream, function that uses it, or '' at module level)."""
  functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
  for node in ast.walk(tree):
    # rng.Stream.NAME, and Stream.NAME in rng.py itself
    if isinstance(node, ast.Attribute) and 'Stream' in (getattr(node.value, 'attr', ''), getattr(node.value, 'id', '')):
      around = [f for f in functions if f.lineno <= node.lineno <= f.end_lineno]
      yield node.attr, max(around, key=lambda f: f.lineno).name if around else ''


def test_every_stream_has_one_purpose():
  """A stream that two places used would make their choices depend on each other."""
  uses = collections.defaultdict(set)
  for path, tree in parsed_files().items():
    for name, function in uses_of_streams(tree):
      uses[name].add((path, function))
  # The parameters before the first round are drawn by a run, and again by what evaluates random weights.
  assert len(uses.pop('INIT')) == 2
  assert {name: places for name, places in uses.items() if len(places) != 1} == {}
  assert uses.keys() | {'INIT'} == set(rng.Stream.__members__)  # none is left over


def test_only_streams_draw_on_the_host():
  """`np.random` elsewhere would be a generator without a stream."""
  calls = {
    (path, ast.unparse(node.func))
    for path, tree in parsed_files().items()
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
  }
  found = {path for path, function in calls if function.startswith(('np.random.', 'numpy.random.'))}
  assert found == {'rng.py'}


@pytest.mark.parametrize('seed', [0, 1, 2**31 - 1])
def test_no_two_streams_draw_the_same(seed):
  pairs = list(itertools.product((seed, 5), rng.Stream))
  host = [tuple(rng.host_generator(*pair).integers(0, 2**32, 2)) for pair in pairs]
  integers = [rng.host_seed(*pair) for pair in pairs]
  device = np.asarray(jax.vmap(lambda s, stream: jax.random.key_data(rng.key(s, stream)))(*map(np.array, zip(*pairs))))
  for draws in (host, integers, list(map(tuple, device))):
    assert len(set(draws)) == len(pairs)
  assert rng.host_generator(*pairs[0]).random() == rng.host_generator(*pairs[0]).random()


def test_few_labels_do_not_follow_the_partition():
  """Of a class's labeled images, each client holds as many as its share of the class, but for chance."""
  labels, num_clients, fraction = np.repeat(np.arange(4), 200), 5, 0.1
  config = PartitionConfig(partition='dirichlet', dirichlet_beta=0.5)
  deviations = []
  for seed in range(30):
    holder = np.empty(len(labels), int)
    for client, ids in enumerate(partition.partition_images(labels, len(labels), num_clients, config, seed)):
      holder[ids] = client
    subset = protocols.label_subset(labels, fraction, seed)
    for label in range(4):
      members = labels == label
      share = np.bincount(holder[members], minlength=num_clients) / members.sum()
      found = np.bincount(holder[subset[labels[subset] == label]], minlength=num_clients) / (fraction * members.sum())
      variance = share * (1 - share) / (fraction * members.sum()) * (1 - fraction)  # hypergeometric
      deviations += list((found - share)[variance > 1e-3] ** 2 / variance[variance > 1e-3])
  assert np.mean(deviations) == pytest.approx(1, abs=0.25)  # of several hundred; 8 where both share a stream
