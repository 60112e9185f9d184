"""FedU, FedEMA and MOON: golden examples on three numbers, their states in rounds, and in runs that are disturbed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import UsageError, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.data import federated_dataset
from lwfedssl_jax.federated import client_state, client_update
from lwfedssl_jax.federated.client_state import ClientState
from lwfedssl_jax.federated.client_update import ClientData
from lwfedssl_jax.objectives import losses
from lwfedssl_jax.objectives.alignment import make_alignment
from lwfedssl_jax.resources import flops, memory
from lwfedssl_jax.training import train
from lwfedssl_jax.workdir import checkpoint, client_store, metrics_writer
from tests import tiny
from tests.deployment import in_process

pytestmark = pytest.mark.usefixtures('cheap_views', 'tiny_library')

FEDEMA = {'client_update': 'fedema', 'objective': 'byol'}
FEDU = {'client_update': 'fedu', 'objective': 'byol'}
ALONE = {'representation_alignment': False}  # beside the tiny rounds' values
MOON = {'alignment_kind': 'moon', 'representation_alignment': True}


def vector(*values):
  return jnp.array(values, jnp.float32)


# The rules, on three numbers.

RECEIVED = {'kernel': vector(1, 2, 3), 'online_only/kernel': vector(0, 0, 8)}
LOCAL = {'kernel': vector(3, 2, 1), 'online_only/kernel': vector(4, 4, 4)}
TARGET = {'kernel': vector(7, 7, 7)}


def keep(config, exists=1.0, divergence=0.0, scale=0.0):
  state = client_state.init(config, RECEIVED)
  return state._replace(
    exists=jnp.float32(exists),
    params=client_state.kept_groups(config, LOCAL),
    target=TARGET,
    divergence=jnp.float32(divergence),
    scale=jnp.float32(scale),
  )


def equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
  ('divergence', 'encoder', 'predictor'),
  [(0.5, (1.5, 2, 2.5), (1, 1, 7)), (0.0, (1, 2, 3), (0, 0, 8)), (9.0, (3, 2, 1), (4, 4, 4))],
)
def test_fedema_mixes_by_the_last_divergence(divergence, encoder, predictor):
  """lambda = 0.5: mu = 0.25 at a divergence of 0.5; all global at 0; at most all local."""
  config = configs.configure(**FEDEMA)
  online, target = client_state.begin(config, keep(config, divergence=divergence, scale=0.5), RECEIVED)
  equal(online, {'kernel': vector(*encoder), 'online_only/kernel': vector(*predictor)})
  equal(target, TARGET)


@pytest.mark.parametrize(('divergence', 'predictor'), [(0.39, (0, 0, 8)), (0.4, (4, 4, 4)), (5.0, (4, 4, 4))])
def test_fedu_takes_the_global_predictor_below_the_threshold_only(divergence, predictor):
  config = configs.configure(**FEDU)
  assert list(keep(config).params) == ['online_only/kernel']
  online, target = client_state.begin(config, keep(config, divergence=divergence), RECEIVED)
  equal(online, {'kernel': RECEIVED['kernel'], 'online_only/kernel': vector(*predictor)})
  equal(target, TARGET)


@pytest.mark.parametrize('values', [FEDU, FEDEMA], ids=['fedu', 'fedema'])
def test_the_first_participation_takes_the_global_model(values):
  config = configs.configure(**values)
  online, target = client_state.begin(config, keep(config, exists=0.0, divergence=9.0, scale=1.0), RECEIVED)
  equal(online, RECEIVED)
  equal(target, {'kernel': RECEIVED['kernel']})


def test_fedema_sets_its_scale_once():
  """tau = 0.7 and a first divergence of 0.35 give lambda = 2, and so mu = tau in the second round; then it stays."""
  config = configs.configure(**FEDEMA)
  state = client_state.init(config, RECEIVED)
  first = client_state.finish(config, state, LOCAL, TARGET, jnp.float32(0.35))
  assert float(first.scale) == pytest.approx(2)
  assert float(first.scale * first.divergence) == pytest.approx(0.7)
  second = client_state.finish(config, first, LOCAL, TARGET, jnp.float32(0.1))
  assert (float(second.scale), float(second.divergence)) == (float(first.scale), pytest.approx(0.1))


def test_divergence_is_the_mean_over_the_encoder_s_matrices():
  """Two blocks moved by norms of 5 and 0, the patch projection by 1; norms, biases and heads do not count: 6 / 3."""
  before = {
    'embedding': {'kernel': jnp.zeros((1, 3)), 'bias': jnp.zeros(3)},
    'blocks': {'mlp': {'kernel': jnp.zeros((2, 1, 3)), 'bias': jnp.zeros((2, 3))}},
    'projector': {'kernel': jnp.zeros((3, 1))},
  }
  after = {
    'embedding': {'kernel': vector(0, 1, 0)[None], 'bias': vector(9, 9, 9)},
    'blocks': {'mlp': {'kernel': jnp.array([[[3.0, 0, 4]], [[0, 0, 0]]]), 'bias': jnp.full((2, 3), 9.0)}},
    'projector': {'kernel': jnp.full((3, 1), 9.0)},
  }
  assert float(client_state.measure_divergence(before, after)) == pytest.approx(2)


def test_moon_s_loss_by_hand_and_against_numpy():
  """z towards g at cosine 1 and away from p at cosine 0, temperature 0.5: -log(e^2 / (e^2 + 1)) = log(1 + e^-2)."""
  mask = jnp.ones(1, bool)
  z, p = vector(2, 0, 0)[None], vector(0, 5, 0)[None]
  assert float(losses.two_way_contrast(z, z, p, 0.5, mask)) == pytest.approx(np.log(1 + np.exp(-2)))
  generator = np.random.default_rng(0)
  z, g, p = generator.normal(size=(3, 2, 5, 4))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  near, far = ((unit(z) * unit(other)).sum(-1)[:, :3] / 0.2 for other in (g, p))
  expected = -np.log(np.exp(near) / (np.exp(near) + np.exp(far))).mean()
  arrays = [jnp.asarray(x, jnp.float32) for x in (z, g)]
  padded = jnp.array([True, True, True, False, False])
  found = make_alignment('moon', 0.2)(*arrays, padded, jnp.asarray(p, jnp.float32), jnp.array(True))
  assert float(found) == pytest.approx(expected, rel=1e-5)


def test_moon_s_first_round_has_an_empty_negative_pool():
  """A cross entropy of one class: 0, with a gradient of 0."""
  views = jax.random.normal(jax.random.key(0), (3, 2, 4, 3))
  loss = lambda z: make_alignment('moon', 0.2)(z, views[1], jnp.ones(4, bool), views[2], jnp.array(False))  # noqa: E731
  value, gradient = jax.value_and_grad(loss)(views[0])
  assert float(value) == 0
  np.testing.assert_array_equal(gradient, 0)


# A client's training.


def train_client(case, inputs, state, plan=None):
  """Returns the result of client 1 on its own images, and what the training received."""
  plan = plan or case.plans[case.stage]
  global_params = stages.split(case.init(0), plan.shape, plan.start)
  parts = tiny.make_parts(case.config)
  data = ClientData(inputs.images, inputs.clients.image_ids[0], inputs.clients.num_images[0])
  keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, 1)
  result = jax.jit(parts.client_update.apply)(global_params, data, keys, None, state)
  return result, parts.client_update.options.model.raveler.ravel(global_params.active)


def fresh(case, plan=None):
  plan = plan or case.plans[case.stage]
  model = tiny.make_parts(case.config).client_update.options.model
  return jax.tree.map(lambda leaf: leaf[0], client_state.start(case.config, model, plan.shape, 1))


def same_bits(found, expected):
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


def differ(a, b):
  return any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_online_and_target_are_two_branches_from_the_first_participation_on(tiny_round, tiny_inputs):
  """The official code shares one object between them: the target branch would follow every gradient step."""
  case, plain = (
    tiny_round('layerwise', 'byol', client_update='fedema', **ALONE),
    tiny_round('layerwise', 'byol', **ALONE),
  )
  (result, received), (expected, _) = (
    train_client(each, tiny_inputs(), s) for each, s in ((case, fresh(case)), (plain, None))
  )
  same_bits(result[:2], expected[:2])  # the first participation is plain BYOL
  kept = result.state
  same_bits(kept.params, result.params)
  names = set(kept.target)
  assert names == {'kernel', 'other'}
  for name in names:
    moved, followed = (float(jnp.abs(part[name] - received[name]).max()) for part in (kept.params, kept.target))
    assert 0 < followed < 0.95 * moved


def test_fedema_s_second_round_starts_between_local_and_global(tiny_round, tiny_inputs):
  case, inputs = tiny_round('layerwise', 'byol', client_update='fedema', **ALONE), tiny_inputs()
  first, received = train_client(case, inputs, fresh(case))
  second, _ = train_client(case, inputs, first.state)
  weight = float(first.state.scale * first.state.divergence)
  assert weight == pytest.approx(0.7)
  start = jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, first.params, received)
  options = tiny.make_parts(case.config).client_update.options
  plan = case.plans[case.stage]
  global_params = stages.split(case.init(0), plan.shape, plan.start)
  mixed = global_params._replace(active=options.model.raveler.unravel(start, global_params.active))
  assert differ(second.params, first.params)
  # Plain training from that start, with the kept target branch, ends where the second round ends.
  plain = dataclasses.replace(case.config, client=dataclasses.replace(case.config.client, client_update='global'))
  data = ClientData(inputs.images, inputs.clients.image_ids[0], inputs.clients.num_images[0])
  keys = client_update.draw_keys(inputs.seed_key, inputs.round_num, 1)
  with pytest.MonkeyPatch.context() as patch:
    init = client_update.training_step.init_state
    patch.setattr(
      client_update.training_step, 'init_state', lambda *given: init(*given)._replace(target=first.state.target)
    )
    expected = jax.jit(tiny.make_parts(plain).client_update.apply)(mixed, data, keys)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), second.params, expected.params)


def test_at_share_zero_fedema_is_fedu_without_a_threshold(tiny_round, tiny_inputs):
  """Both then start from the global parameters, and keep their target branch."""
  ema = tiny_round('layerwise', 'byol', client_update='fedema', fedema_share=0.0)
  fedu = tiny_round('layerwise', 'byol', client_update='fedu', fedu_threshold=1e9)
  results = []
  for case in (ema, fedu):
    first, _ = train_client(case, tiny_inputs(), fresh(case))
    results.append(train_client(case, tiny_inputs(), first.state)[0])
  same_bits(results[0][:2], results[1][:2])
  same_bits(results[0].state.target, results[1].state.target)


def test_moon_compares_with_the_client_s_previous_model(tiny_round, tiny_inputs):
  case = tiny_round('layerwise', 'moco_v3', **MOON)
  first, received = train_client(case, tiny_inputs(), fresh(case))
  assert float(first.losses.alignment) == 0
  plain = tiny_round('layerwise', 'moco_v3', representation_alignment=False)
  expected, _ = train_client(plain, tiny_inputs(), None)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first.params, expected.params)
  assert set(first.state.params) == {'kernel', 'other'} and first.state.target == {}
  same_bits(first.state.params, {name: first.params[name] for name in first.state.params})

  second, _ = train_client(case, tiny_inputs(), first.state)
  assert float(second.losses.alignment) > 0
  away, toward = (
    sum(float(jnp.square(second.params[n] - reference[n]).sum()) for n in first.state.params)
    for reference in (first.params, received)
  )
  assert differ(second.params, first.params) and away > 0 and toward > 0
  # A previous model equal to the global one is neither near nor far: log 2.
  same = first.state._replace(params={name: received[name] for name in first.state.params})
  one_step = configs.with_values(case.config, {'local_epochs': 1, 'batch_size': 20, 'learning_rate': 1e-9})
  start, _ = train_client(case._replace(config=one_step), tiny_inputs(), same)
  assert float(start.losses.alignment) == pytest.approx(np.log(2), rel=1e-5)


def test_moon_at_weight_zero_changes_no_bit(tiny_round, tiny_inputs):
  case = tiny_round('layerwise', 'moco_v3', **MOON, alignment_weight=0.0)
  plain = tiny_round('layerwise', 'moco_v3', representation_alignment=False)
  first, _ = train_client(case, tiny_inputs(), fresh(case))
  second, _ = train_client(case, tiny_inputs(), first.state)
  same_bits(second.params, train_client(plain, tiny_inputs(), None)[0].params)


def test_micro_batches_give_moon_s_full_gradient(tiny_round, tiny_inputs):
  case = tiny_round('layerwise', 'simclr', **MOON)
  first, _ = train_client(case, tiny_inputs(), fresh(case))
  pieces = case._replace(config=configs.with_values(case.config, {'micro_batch_size': 2}))
  results = [train_client(each, tiny_inputs(), first.state)[0] for each in (case, pieces)]
  assert float(results[0].losses.alignment) > 0
  np.testing.assert_allclose(results[1].losses, results[0].losses, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), results[1].params, results[0].params)


def test_a_round_gives_each_client_its_own_state_back(tiny_round, tiny_inputs):
  case, inputs = tiny_round('layerwise', 'byol', client_update='fedema', **ALONE), tiny_inputs()
  plan = case.plans[case.stage]
  model = tiny.make_parts(case.config).client_update.options.model
  empty = client_state.start(case.config, model, plan.shape, 4)
  _, metrics = case.apply(case.init(0), plan, inputs._replace(clients=inputs.clients._replace(state=empty)))
  alone, _ = train_client(case, inputs, fresh(case))
  assert isinstance(metrics.client_states, ClientState)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, atol=2e-5), metrics.client_states, alone.state)
  assert differ(*(jax.tree.map(lambda leaf, k=k: leaf[k], metrics.client_states.params) for k in (0, 2)))


# Runs.

VALUES = {
  'method': 'layerwise',
  'blocks_per_stage': 2,
  'rounds_per_stage': 3,
  'clients_per_round': 2,
  'client_dropout': 0.2,
}


def run(workdir, **values):
  return train.train(in_process.make_config(workdir, **VALUES | values))


class KilledError(Exception):
  """Stands for SIGKILL."""


def test_a_run_that_is_killed_between_states_and_checkpoint_ends_with_the_same_bits(tmp_path):
  """The states of a round are on disk before its checkpoint: a resumed run must not see them."""
  undisturbed = run(tmp_path / 'whole', **FEDEMA)
  other = tmp_path / 'parts'
  for fatal in (1, 4):

    def kill(row, fatal=fatal):
      if row['round'] == fatal:
        raise KilledError

    with pytest.raises(KilledError):
      train.train(in_process.make_config(other, **VALUES | FEDEMA | {'resume': True}), on_row=kill)
    newest = max(int(path.name) for path in (other / client_store.FOLDER).glob('*/*'))
    assert newest <= fatal + 1
  assert run(other, resume=True, **FEDEMA)['params_sha256'] == undisturbed['params_sha256']
  assert not (other / client_store.FOLDER).exists()  # of a finished run
  stateless = run(tmp_path / 'plain', **{k: v for k, v in FEDEMA.items() if k == 'objective'})
  assert stateless['params_sha256'] != undisturbed['params_sha256']
  rows = [metrics_writer.read_metrics(str(tmp_path / name)) for name in ('whole', 'plain')]
  traffic = [[(row['client_download_bytes'], row['client_upload_bytes']) for row in each] for each in rows]
  assert traffic[0] == traffic[1]


def test_rare_checkpoints_and_a_damaged_one_resume_to_the_bit(tmp_path):
  undisturbed = run(tmp_path / 'whole', **FEDEMA)
  other = tmp_path / 'parts'
  run(other, stop_after_round=5, checkpoint_every=2, **FEDEMA)
  steps = sorted(int(path.name) for path in (other / checkpoint.FOLDER).iterdir())
  assert steps == [4, 5]
  (other / checkpoint.FOLDER / '5' / 'meta' / 'metadata').write_bytes(b'')
  assert run(other, resume=True, **FEDEMA)['params_sha256'] == undisturbed['params_sha256']


def test_only_accepted_clients_are_written_and_a_second_attempt_starts_from_the_same_states(tmp_path):
  """Nobody is accepted in the first attempt at the third round: it must leave no trace but other random numbers."""
  loaded, saved = [], []

  class Watched(client_store.ClientStore):
    def load(self, client_ids, first_round, like):
      states = super().load(client_ids, first_round, like)
      loaded.append((list(client_ids), states.exists.tolist(), states.divergence.tolist()))
      return states

    def save(self, client, rounds_done, state):
      saved.append((client, rounds_done))
      super().save(client, rounds_done, state)

  config = in_process.make_config(tmp_path, **VALUES | FEDEMA)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('lwfedssl_jax.training.simulation.ClientStore', Watched)
    _, rows, _ = in_process.run(config, federated_dataset.load(config), fail_first=(2,))
  expected = []
  for row in rows:
    back = [client for client, size in zip(row['client_ids'], row['client_upload_bytes'], strict=True) if size]
    expected += [(client, row['round'] + 1) for client in back]
  assert saved == expected
  assert len(saved) < 2 * len(rows)  # some dropped out
  assert [row['attempts'] for row in rows] == [1, 1, 2, 1, 1, 1]
  calls, seen = iter(loaded), set()
  for row in rows:
    if row['round'] == 3:  # the second stage
      seen.clear()
    attempts = [next(calls) for _ in range(row['attempts'] if row['participants'] else 0)]
    for ids, exists, _ in attempts:
      assert exists == [float(client in seen) for client in ids]
    assert all(attempt == attempts[0] for attempt in attempts)
    seen |= {client for client, done in saved if done == row['round'] + 1}
    assert row['round'] != 1 or seen  # the third round's clients have something to keep


def some_state(value):
  return ClientState(
    jnp.float32(1), {'kernel': jnp.full(5, value)}, {'kernel': jnp.full(3, value)}, jnp.float32(value), jnp.float32(0)
  )


def test_the_store_reads_and_writes_the_sampled_clients_only(tmp_path, monkeypatch):
  """What a round reads is K files of a state each, whatever the number of clients."""
  store, like = client_store.ClientStore(str(tmp_path)), some_state(0.0)
  store.rewind(0)
  for client in range(50):
    store.save(client, 1, some_state(float(client)))
  mapped = []
  memmap = np.memmap
  monkeypatch.setattr(np, 'memmap', lambda path, *rest: mapped.append(path) or memmap(path, *rest))
  states = store.load([7, -1, 30], 0, like)
  assert [path.rsplit('/', 2)[1] for path in mapped] == ['000007', '000030']
  np.testing.assert_array_equal(states.params['kernel'], np.repeat([[7], [0], [30]], 5, axis=1))
  np.testing.assert_array_equal(states.exists, [1, 0, 1])
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(states)) == 3 * 4 * 11
  assert sorted(vars(store)) == ['_folder', '_oldest', '_workdir']  # nothing grows with the clients
  sizes = {path.stat().st_size for path in (tmp_path / client_store.FOLDER).glob('*/*')}
  assert sizes == {32 + 4 * 11}
  assert store.load([7], 1, like).exists.tolist() == [0]  # of an earlier stage


def test_the_store_goes_back_and_forgets_what_no_checkpoint_needs(tmp_path):
  store, like = client_store.ClientStore(str(tmp_path)), some_state(0.0)
  store.rewind(0)
  for done in (1, 3, 5):
    store.save(2, done, some_state(float(done)))

  def versions():
    return sorted(int(path.name) for path in (tmp_path / client_store.FOLDER / '000002').iterdir())

  assert versions() == [1, 3, 5]
  store.keep_since(4)
  store.save(2, 6, some_state(6.0))
  assert versions() == [3, 5, 6]  # a checkpoint of four rounds needs the third's
  store.rewind(4)
  assert versions() == [3]
  assert store.load([2], 0, like).divergence.tolist() == [3]


@pytest.mark.parametrize('how', ['bit flipped', 'truncated', 'emptied'])
def test_a_damaged_state_is_one_line(tmp_path, how):
  store = client_store.ClientStore(str(tmp_path))
  store.rewind(0)
  store.save(2, 1, some_state(1.0))
  path = tmp_path / client_store.FOLDER / '000002' / '000001'
  content = bytearray(path.read_bytes())
  content[40] ^= 1
  path.write_bytes({'bit flipped': bytes(content), 'truncated': bytes(content[:-4]), 'emptied': b''}[how])
  with pytest.raises(UsageError, match='000001: expected the state of a client as it was saved'):
    store.load([2], 0, some_state(0.0))


def test_states_that_are_gone_are_one_line(tmp_path):
  with pytest.raises(UsageError, match="client_states: expected the clients' states of the run"):
    client_store.ClientStore(str(tmp_path)).check()
  assert not any(tmp_path.iterdir())


def test_what_cannot_be_is_refused_in_one_line(monkeypatch):
  with pytest.raises(UsageError, match='--client_update: expected global with --objective=simclr'):
    configs.configure(objective='simclr', client_update='fedu')
  for values, flag in ((FEDU, 'client_update'), (MOON, 'alignment_kind')):
    config = configs.configure(method='layerwise', **values)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(UsageError, match=f'--{flag}: expected one process'):
      client_state.check(config)
    monkeypatch.undo()
  assert not configs.configure(**MOON | {'representation_alignment': False}).uses_client_state


def test_costs_of_moon_count_its_third_branch(tiny_round):
  plain = tiny_round('layerwise', 'moco_v3', representation_alignment=True)
  moon = tiny_round('layerwise', 'moco_v3', **MOON)
  plan = plain.plans[1]
  steps = [flops.executed_flops(case.config, tiny.IMAGE_SIZE, plan, 6) for case in (plain, moon)]
  assert steps[1].global_forward_flops == 2 * steps[0].global_forward_flops > 0
  lowered = [memory.lower_client_step(case.config, tiny.IMAGE_SIZE, plan) for case in (plain, moon)]
  sizes = [sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(each.args_info)) for each in lowered]
  model = tiny.make_parts(moon.config).client_update.options.model
  own = client_state.trace(moon.config, model, plan.shape)
  assert sizes[1] - sizes[0] == sum(leaf.size for leaf in jax.tree.leaves(own.params)) + 1
