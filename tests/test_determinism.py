"""Every random choice of a run follows its seed, and nothing that has no business with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import rng, stages
from lwfedssl_jax.data import federated_dataset, sources
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.round_types import ClientSlots

# Part of the identity of all runs there are: a resumed run draws what it would have drawn.
NUMBERS = {
  'INIT': 0,
  'SERVER_SPLIT': 1,
  'SAMPLING': 2,
  'DROPOUT': 3,
  'SHUFFLE': 4,
  'AUGMENT': 5,
  'CALIBRATION_SHUFFLE': 6,
  'CALIBRATION_AUGMENT': 7,
  'CONTACT_SHEET': 8,
  'FINETUNE_SHUFFLE': 9,
  'FINETUNE_AUGMENT': 10,
  'RETRY': 11,
  'PARTITION': 12,
  'LABEL_SUBSET': 13,
  'TRAIN_SUBSET': 14,
  'MONITOR_SUBSET': 15,
  'EVALUATION_SUBSET': 16,
  'VALIDATION_SPLIT': 17,
  'PROBE_SPLIT': 18,
  'MEASUREMENT': 19,
  'FOLDER_HOLDOUT': 20,
}
DRAWN = ('kernel', 'position')  # everything else starts at zero or one

LABELS = np.arange(200, dtype=np.int32) % 5
DATASET = sources.ImageDataset(
  'made', np.zeros((200, 8, 8, 3), np.uint8), LABELS, np.zeros((0, 8, 8, 3), np.uint8), None, tuple('abcde')
)


def test_streams_keep_their_numbers_and_share_none():
  """An alias would go unseen where streams are iterated over: hence the members by name."""
  found = {name: int(stream) for name, stream in rng.Stream.__members__.items()}
  assert {name: found.get(name) for name in NUMBERS} == NUMBERS
  assert len(set(found.values())) == len(found)


def test_a_second_attempt_draws_nothing_that_a_first_one_draws():
  streams = jnp.array([int(stream) for stream in rng.Stream])
  keys_of = jax.jit(
    jax.vmap(lambda seed, stream, round_num: jax.random.key_data(rng.key(seed, stream, round_num)), (None, 0, None))
  )
  keys = []
  for seed in (0, 1):
    again = rng.key(jax.random.key(seed), rng.Stream.RETRY)
    for round_num in range(3):
      keys += keys_of(jax.random.key(seed), streams, round_num).tolist() + keys_of(again, streams, round_num).tolist()
  assert len(set(map(tuple, keys))) == len(keys) == 2 * 3 * 2 * len(rng.Stream)


def initial(seed, **values):
  config = configs.with_values(configs.Config(), values)
  init = jax.jit(make_model(config.model, config.objective, 8).init_params)
  leaves = jax.tree_util.tree_leaves_with_path(init(rng.key(seed, rng.Stream.INIT)))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.usefixtures('tiny_library')
def test_initial_weights_follow_the_seed_and_not_the_method_nor_the_clients():
  """So methods are compared from the same start."""
  first, other = initial(0, method='lw_fedssl', batch_size=4), initial(1, method='lw_fedssl', batch_size=4)
  for name, leaf in first.items():
    if name.endswith(DRAWN):
      assert (leaf == other[name]).mean() < 0.01, name
    else:
      np.testing.assert_array_equal(leaf, other[name])
      assert len(np.unique(leaf)) == 1, name
  assert any(name.endswith('position') for name in first)
  same = initial(0, method='end_to_end', batch_size=8, num_clients=3, learning_rate=0.5, weight_decay=0.1)
  assert same.keys() == first.keys()
  for name, leaf in first.items():
    np.testing.assert_array_equal(leaf, same[name], err_msg=name)


@pytest.mark.usefixtures('tiny_library')
def test_no_two_tensors_have_equal_initial_values():
  """Blocks and heads are drawn apart: a key used twice would show as a common beginning."""
  pieces = []
  for name, leaf in initial(0).items():
    if name.endswith(DRAWN):
      pieces += [row.ravel()[:20] for row in (leaf if name.startswith('blocks') else [leaf])]
  beginnings = np.array([piece / np.abs(piece).max() for piece in pieces])
  similarity = np.abs(np.corrcoef(beginnings))[~np.eye(len(pieces), dtype=bool)]
  assert similarity.max() < 0.95


def held(**values):
  config = configs.configure(num_clients=6, batch_size=4, auxiliary_fraction=0.2, **values)
  return federated_dataset.partition_dataset(DATASET, config)


def equal(some, others):
  return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize('partition', ['iid', 'dirichlet', 'shards'])
def test_who_holds_what_follows_the_seed_and_not_the_method(partition):
  first, other = (held(seed=seed, partition=partition) for seed in (0, 1))
  assert not equal(first.client_images, other.client_images)
  assert not np.array_equal(first.server_ids, other.server_ids)
  for method in ('end_to_end', 'layerwise', 'prog_fedssl'):
    found = held(seed=0, partition=partition, method=method, local_epochs=1, learning_rate=0.5, clients_per_round=2)
    assert equal(found.client_images, first.client_images)
    np.testing.assert_array_equal(found.server_ids, first.server_ids)
  alone = held(seed=0, partition=partition, method='centralized')
  np.testing.assert_array_equal(alone.server_ids, first.server_ids)  # and so all clients' images together
  np.testing.assert_array_equal(alone.client_images[0], np.sort(np.concatenate(first.client_images)))


def test_a_limited_set_of_images_is_the_same_under_every_seed():
  used = [
    np.sort(np.concatenate([*found.client_images, found.server_ids]))
    for found in (held(seed=seed, max_train_images=90) for seed in (0, 1))
  ]
  np.testing.assert_array_equal(*used)
  assert len(used[0]) == 90 and not np.array_equal(used[0], np.arange(90))


def test_a_client_s_training_does_not_depend_on_other_sampled_clients(tiny_round, tiny_inputs):
  """To the bit: its losses in a round, and what the server makes of it where it returns alone."""
  tiny, inputs = tiny_round('layerwise', 'moco_v3'), tiny_inputs()
  plan, params = tiny.plans[2], tiny.init(0)

  def run(ids, image_ids, num_images):
    clients = ClientSlots(jnp.array(ids, jnp.int32), image_ids, num_images, jnp.arange(4) == 2)
    after, metrics = tiny.apply(params, plan, inputs._replace(clients=clients))
    return stages.split(after, plan.shape, plan.start)[0], float(metrics.client_losses[2])

  image_ids, num_images = inputs.clients.image_ids, inputs.clients.num_images
  expected, loss = run([1, 3, 4, 8], image_ids, num_images)
  others = jnp.array([3, 0, 2, 1])  # the same images in other hands, and client 4 in its place
  found, same_loss = run([0, 2, 4, 5], image_ids[others], num_images[others])
  assert same_loss == loss
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert run([1, 3, 5, 8], image_ids, num_images)[1] != loss  # another client with these images draws otherwise
