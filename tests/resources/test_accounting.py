"""The exact account of a run's bytes: hand-computed examples, and its mean over draws."""

import jax
import numpy as np
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.config import Config, with_values
from lwfedssl_jax.federated import depth_dropout
from lwfedssl_jax.resources import accounting
from lwfedssl_jax.resources import communication as comm

MICRO = {'encoder': 'vit_micro', 'objective': 'simclr', 'rounds_per_stage': 2}
# vit_micro at 16x16, patch 4, in parameters: embedding 48 * 64 + 64 + 16 * 64 = 4,160; block 12 * 64**2 + 13 * 64 =
# 49,984; norm 128; projector 64 * 512 + 512 * 512 + 512 * 256 + 4 * 512 = 428,032.


def configure(**values):
  return with_values(Config(), values)


def everybody(config):
  """Returns (client ids, returned), (rounds, clients), of a run whose clients all take part and return."""
  shape = (sum(plan.num_rounds for plan in stages.make_plans(config)), config.effective_num_clients)
  return np.broadcast_to(np.arange(shape[1]), shape), np.ones(shape, bool)


def test_centralized_exchanges_nothing():
  config = configure(method='centralized', **MICRO)
  assert all(s.download_bytes == s.upload_bytes == 0 for s in comm.stage_traffic(config, 16, 'paper_v4'))
  payload = comm.make_payload(config, 16)
  run = accounting.charge_run(payload, stages.make_plans(config), 1, *everybody(config))
  assert run.download_bytes.sum() == run.upload_bytes.sum() == 0


# The ledger. Sizes are powers of ten, so that every digit of a sum says how often a component was counted.

DIGITS = comm.Payload(
  {
    'embedding': 1,
    'block_00': 10,
    'block_01': 100,
    'block_02': 1000,
    'block_03': 10_000,
    'norm': 100_000,
    'projector': 1_000_000,
  },
  ('projector',),
)


def charge(method, rounds):
  """Charges [(ids, returned)] round by round; returns [(downloads, uploads)] summed over components."""
  plans = [p for p in stages.make_plans(configure(method=method, **MICRO)) for _ in range(p.num_rounds)]
  ledger, charged = accounting.start_ledger(DIGITS, 3), []
  for plan, (ids, returned) in zip(plans, rounds):
    before = jax.tree.map(np.copy, ledger)
    after, result = accounting.charge_round(ledger, DIGITS, plan, ids, returned)
    np.testing.assert_array_equal(ledger.held, before.held)
    np.testing.assert_array_equal(ledger.version, before.version)
    assert result.download_bytes.shape == result.upload_bytes.shape == (len(ids), 7)
    assert result.download_bytes.dtype == result.upload_bytes.dtype == np.int64
    charged.append((result.download_bytes.sum(1).tolist(), result.upload_bytes.sum(1).tolist()))
    ledger = after
  return charged


LATE_CLIENTS = [  # clients, returned, downloads, uploads
  ([0, 1], [True, True], [1_100_011, 1_100_011], [1_100_011, 1_100_011]),
  ([1, 2], [True, False], [1_100_011, 1_100_011], [1_100_011, 0]),  # client 2 drops out: it has paid its download
  # Stage 2: both lack the finished block and embedding, and the new block. Nobody returns.
  ([0, 1], [False, False], [1_100_111, 1_100_111], [0, 0]),
  ([0, 2], [True, True], [0, 1_100_111], [1_100_100, 1_100_100]),  # client 0 holds the unchanged model
  ([2, 1], [False, True], [1_101_100, 1_101_100], [0, 1_101_000]),  # stage 3; block 1 finished
  ([0, 1], [True, False], [1_101_100, 1_101_000], [1_101_000, 0]),  # client 0 catches up on block 1
  ([2, 0], [False, True], [1_111_000, 1_111_000], [0, 1_110_000]),  # stage 4
  ([1, 2], [True, True], [1_111_000, 1_110_000], [1_110_000, 1_110_000]),
]


def test_ledger_of_late_clients_and_dropouts():
  charged = charge('layerwise', [(ids, back) for ids, back, _, _ in LATE_CLIENTS])
  assert charged == [(down, up) for _, _, down, up in LATE_CLIENTS]


def test_run_totals_are_those_of_its_rounds():
  ids, returned, downs, ups = (np.array(column) for column in zip(*LATE_CLIENTS))
  plans = stages.make_plans(configure(method='layerwise', **MICRO))
  run = accounting.charge_run(DIGITS, plans, 3, ids, returned)
  expected = np.zeros((2, 4, 3), np.int64)
  for r in range(8):
    for k in range(2):
      expected[:, r // 2, ids[r, k]] += downs[r, k], ups[r, k]
  np.testing.assert_array_equal(run.download_bytes, expected[0])
  np.testing.assert_array_equal(run.upload_bytes, expected[1])
  assert run.download_bytes.dtype == np.int64
  half = accounting.charge_run(DIGITS, plans, 3, ids[:4], returned[:4])
  np.testing.assert_array_equal(half.download_bytes[:2], expected[0, :2])
  assert not half.download_bytes[2:].any()
  after, _ = accounting.charge_round(half.ledger, DIGITS, plans[2], ids[4], returned[4])
  np.testing.assert_array_equal(after.version, [2, 2, 1, 1, 0, 3 + 1, 3 + 1])


def test_calibration_makes_a_client_download_everything_again():
  every = ([0, 1, 2], [True] * 3)
  charged = charge('lw_fedssl', [every] * 8)
  assert [down[0] for down, _ in charged] == [
    1_100_011,
    1_100_011,
    1_100_111,
    1_100_111,
    1_101_111,
    1_101_111,
    1_111_111,
    1_111_111,
  ]
  assert [up[0] for _, up in charged] == [
    1_100_011,
    1_100_011,
    1_100_100,
    1_100_100,
    1_101_000,
    1_101_000,
    1_110_000,
    1_110_000,
  ]


@pytest.mark.parametrize('method', ['end_to_end', 'layerwise', 'lw_fedssl', 'prog_fedssl'])
def test_full_participation_against_the_paper(method):
  """Only the transfer of finished blocks, which the paper leaves out, is extra; and only `layerwise` has one."""
  config = configure(method=method, encoder='vit_tiny')
  payload = comm.make_payload(config, 32)
  run = accounting.charge_run(payload, stages.make_plans(config), 10, *everybody(config))
  paper = comm.stage_traffic(config, 32, 'paper_v4')
  extra = np.zeros(len(paper), np.int64)
  if method == 'layerwise':
    extra[1:] = payload.sizes_bytes['block_00']
    extra[1] += payload.sizes_bytes['embedding']
  for client in range(10):
    np.testing.assert_array_equal(run.download_bytes[:, client], [s.download_bytes for s in paper] + extra)
    np.testing.assert_array_equal(run.upload_bytes[:, client], [s.upload_bytes for s in paper])


@pytest.mark.parametrize(
  ('ids', 'returned', 'message'),
  [
    ([1, 1], [True, True], 'sampled twice'),
    ([0, 3], [True, True], 'from 0 to 2'),
    ([-1, 0], [True, True], 'from 0 to 2'),
    ([0, 1], [True], 'expected'),
  ],
)
def test_bad_participation(ids, returned, message):
  plan = stages.make_plans(configure(method='layerwise', **MICRO))[0]
  with pytest.raises(ValueError, match=message):
    accounting.charge_round(accounting.start_ledger(DIGITS, 3), DIGITS, plan, ids, returned)


def test_more_rounds_than_planned():
  plans = stages.make_plans(configure(method='layerwise', **MICRO))
  with pytest.raises(ValueError, match='up to 8 rounds'):
    accounting.charge_run(DIGITS, plans, 1, np.zeros((9, 1), int), np.ones((9, 1), bool))


# The expectation.


def test_expected_catch_up_by_hand():
  """Two clients, one a round, two rounds a stage: what stage 1 left behind is fetched late or not at all."""
  config = configure(method='layerwise', num_clients=2, clients_per_round=1, blocks_per_stage=2, **MICRO)
  found = accounting.expected_traffic(config, 16)
  embedding, block, norm, projector = 16_640, 199_936, 512, 1_712_128
  first, second = (dict(zip(comm.component_params(config, 16), row)) for row in found.download_bytes)
  # Stage 1: either client is asked with probability 1/2 in each of two rounds, and everything has changed by then.
  assert first == {
    'embedding': embedding,
    'block_00': block,
    'block_01': block,
    'block_02': 0,
    'block_03': 0,
    'norm': norm,
    'projector': projector,
  }
  # Stage 2: what is frozen by now is fetched once, if at all: 1/2 in its first round, 1/2 * 1/2 in its second.
  assert second == {
    'embedding': 0.75 * embedding,
    'block_00': 0.75 * block,
    'block_01': 0.75 * block,
    'block_02': block,
    'block_03': block,
    'norm': norm,
    'projector': projector,
  }
  sent = dict(zip(comm.component_params(config, 16), found.upload_bytes[1]))
  assert sent == {
    'embedding': 0,
    'block_00': 0,
    'block_01': 0,
    'block_02': block,
    'block_03': block,
    'norm': norm,
    'projector': projector,
  }


def test_depth_dropout_by_hand():
  """Third stage of prog_fedssl, two blocks kept: the clients exchange the block that each keeps beside the new one."""
  plan = stages.make_plans(configure(method='prog_fedssl', depth_dropout_keep=2, **MICRO))[2]
  ledger = accounting.start_ledger(DIGITS, 2)
  keeps = np.array([[True, False, True, False], [False, True, True, False]])
  ledger, first = accounting.charge_round(ledger, DIGITS, plan, [0, 1], [True, False], keeps)
  np.testing.assert_array_equal(first.download_bytes.sum(axis=1), [1_101_011, 1_101_101])
  np.testing.assert_array_equal(first.upload_bytes.sum(axis=1), [1_101_011, 0])
  np.testing.assert_array_equal(ledger.version, [1, 1, 0, 1, 0, 1, 1])  # nobody returned block_01
  # The second client still holds block_01, and lacks what the first one changed.
  _, second = accounting.charge_round(ledger, DIGITS, plan, [1], [True], keeps[1:])
  np.testing.assert_array_equal(second.download_bytes.sum(axis=1), [1_101_001])
  again = accounting.second_attempt(DIGITS, plan, [True, True], keeps)
  np.testing.assert_array_equal(again.upload_bytes.sum(axis=1), [1_101_011, 1_101_101])


def test_expected_downloads_with_depth_dropout_by_hand():
  """Both clients take part in two rounds a stage and keep the new block and one earlier block at random.

  A frozen block is fetched in the first round that keeps it. A client that does not keep it in a round still holds it.
  """
  config = configure(method='layerwise', num_clients=2, depth_dropout_keep=2, **MICRO)
  columns = accounting.expected_traffic(config, 16).download_bytes.T
  fetched = dict(zip(comm.component_params(config, 16), columns / columns.max(axis=1, keepdims=True)))
  # Stage 3 keeps blocks 0 and 1 with probability 1/2, stage 4 keeps blocks 0 to 2 with 1/3. An active block is fetched
  # in both rounds of its stage.
  np.testing.assert_allclose(2 * fetched['block_00'], [2, 1, 0, 0])
  np.testing.assert_allclose(2 * fetched['block_01'], [0, 2, 1 / 2 + 1 / 4, 1 / 4 * (1 / 3 + 2 / 9)])
  np.testing.assert_allclose(2 * fetched['block_02'], [0, 0, 2, 1 / 3 + 2 / 9])


@pytest.mark.parametrize('keep', [0, 2])
@pytest.mark.parametrize('method', ['lw_fedssl', 'layerwise', 'prog_fedssl'])
def test_expectation_is_the_mean_of_the_ledger_over_draws(method, keep):
  config = configure(
    method=method,
    num_clients=6,
    clients_per_round=2,
    client_dropout=0.5,
    encoder='vit_micro',
    rounds_per_stage=3,
    depth_dropout_keep=keep,
  )
  plans, payload = stages.make_plans(config), comm.make_payload(config, 16)
  generator = np.random.default_rng(0)
  downloads, sent = [], []
  for seed in range(400):
    ids = np.array([generator.choice(6, 2, replace=False) for _ in range(12)])
    keeps = depth_dropout.plan_kept(with_values(config, {'seed': seed}), ids)
    traffic_of_run = accounting.charge_run(payload, plans, 6, ids, generator.random((12, 2)) >= 0.5, keeps)
    downloads.append(traffic_of_run.download_bytes.mean(axis=1))
    sent.append(traffic_of_run.upload_bytes.mean(axis=1))
  found = accounting.expected_traffic(config, 16)
  for draws, expected in ((downloads, found.download_bytes), (sent, found.upload_bytes)):
    error = np.std(draws, axis=0, ddof=1) / 20
    assert (np.abs(np.mean(draws, axis=0) - expected.sum(axis=1)) < 4 * error).all()


@pytest.mark.parametrize('method', ['lw_fedssl', 'layerwise', 'prog_fedssl', 'end_to_end', 'centralized'])
def test_expectation_of_full_participation_is_exact(method):
  config = configure(method=method, **MICRO)
  payload = comm.make_payload(config, 16)
  exact = accounting.charge_run(payload, stages.make_plans(config), config.effective_num_clients, *everybody(config))
  found = accounting.expected_traffic(config, 16)
  np.testing.assert_array_equal(found.download_bytes.sum(axis=1), exact.download_bytes[:, 0])
  np.testing.assert_array_equal(found.upload_bytes.sum(axis=1), exact.upload_bytes[:, 0])
