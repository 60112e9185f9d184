"""Bytes: the paper's published numbers, hand-computed examples, and the ledger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.catalog import HEAD_HIDDEN, PROJECTION_SIZE
from lwfedssl_jax.config import Config, with_values
from lwfedssl_jax.errors import UsageError
from lwfedssl_jax.models import make_encoder
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.resources import communication as comm

TINY = {'encoder': 'vit_tiny'}


def configure(**values):
  return with_values(Config(), values)


def traffic(config, image_size=32, convention='paper_v4', **options):
  return comm.total_traffic(comm.stage_traffic(config, image_size, convention, **options))


# Parameters.


@pytest.mark.parametrize('encoder', ['vit_tiny', 'vit_micro'])
@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr'])
def test_component_params_are_those_of_the_model(encoder, objective):
  config = configure(encoder=encoder, objective=objective)

  def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  params = jax.eval_shape(make_encoder(config.model, 32).init, jax.random.key(0))
  depth = config.model.traits.depth
  expected = {'embedding': count(params['embedding'])}
  expected |= {stages.block_name(i): count(params['blocks']) // depth for i in range(depth)}
  expected['norm'] = count(params['norm'])
  heads = {'projector': Head((HEAD_HIDDEN, HEAD_HIDDEN), PROJECTION_SIZE)}
  if objective != 'simclr':
    heads['predictor'] = Head((HEAD_HIDDEN,), PROJECTION_SIZE)
  for name, head in heads.items():
    width = config.model.traits.width if name == 'projector' else PROJECTION_SIZE
    expected[name] = count(jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((2, width)), jnp.ones(2, bool)))
  assert comm.component_params(config, 32) == expected
  assert list(comm.component_params(config, 32)) == list(expected)
  assert comm.make_payload(config, 32).head_names == tuple(heads)


def test_block_of_vit_tiny_is_as_published():
  assert comm.component_params(configure(**TINY), 32)['block_00'] == 444_864


@pytest.mark.parametrize(
  ('image_size', 'patch_size', 'embedding'),
  [
    (32, 4, 48 * 192 + 192 + 64 * 192),
    (64, 4, 58_560),  # 48 * 192 + 192 + 256 * 192
    (128, 8, 86_208),  # 192 * 192 + 192 + 256 * 192
    (224, 16, 185_280),  # 768 * 192 + 192 + 196 * 192
  ],
)
def test_only_the_embedding_depends_on_the_image(image_size, patch_size, embedding):
  params = comm.component_params(configure(patch_size=patch_size, **TINY), image_size)
  small = comm.component_params(configure(**TINY), 32)
  assert params.pop('embedding') == embedding
  small.pop('embedding')
  assert params == small


def test_patch_size_must_divide_the_image():
  with pytest.raises(UsageError, match='--patch_size'):
    comm.component_params(configure(patch_size=5), 32)


# The paper's conventions.


@pytest.mark.parametrize(
  ('method', 'objective', 'published'),
  [
    ('end_to_end', 'moco_v3', 8.40),
    ('layerwise', 'moco_v3', 1.66),
    ('prog_fedssl', 'moco_v3', 5.04),
    ('end_to_end', 'byol', 8.40),
    ('layerwise', 'byol', 1.66),
    ('prog_fedssl', 'byol', 5.04),
    ('end_to_end', 'simclr', 8.03),
    ('layerwise', 'simclr', 1.29),
    ('prog_fedssl', 'simclr', 4.68),
  ],
)
def test_published_gigabytes(method, objective, published):
  total = traffic(configure(method=method, objective=objective, **TINY))
  assert total.total_paper_gb == pytest.approx(published, abs=0.01)
  assert total.total_bytes == total.download_bytes + total.upload_bytes
  assert isinstance(total.total_bytes, int)


@pytest.mark.parametrize(
  ('method', 'ratio'), [('lw_fedssl', 24 / 7.5), ('prog_fedssl', 24 / 13), ('layerwise', 24 / 2)]
)
@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr'])
def test_ratios_of_the_first_versions(method, ratio, objective):
  total = {
    m: traffic(configure(method=m, objective=objective, **TINY), convention='paper_v1').total_bytes
    for m in ('end_to_end', method)
  }
  assert total['end_to_end'] / total[method] == pytest.approx(ratio, rel=1e-12)


def test_published_ratios():
  """3.20 and 1.846 (v1-v3), and 5.07 and 1.67 (v4; within its rounding of 8.40 GB / 1.66 GB)."""

  def total(m, c):
    return traffic(configure(method=m, **TINY), convention=c).total_bytes

  def ratio(m, c):
    return total('end_to_end', c) / total(m, c)

  assert round(ratio('lw_fedssl', 'paper_v1'), 2) == 3.20
  assert round(ratio('prog_fedssl', 'paper_v1'), 3) == 1.846
  assert round(ratio('prog_fedssl', 'paper_v4'), 2) == 1.67
  assert ratio('layerwise', 'paper_v4') == pytest.approx(5.07, abs=0.02)


@pytest.mark.parametrize(
  ('blocks_per_stage', 'total_bytes'),
  [
    # 2 directions * rounds * 4 bytes * (21,696 + 12 * 444,864 + stages * 757,120): norm and heads in every stage
    (1, 120 * (5_360_064 + 12 * 757_120)),
    (2, 240 * (5_360_064 + 6 * 757_120)),
    (3, 360 * (5_360_064 + 4 * 757_120)),
    (4, 480 * (5_360_064 + 3 * 757_120)),
    (6, 720 * (5_360_064 + 2 * 757_120)),
    (12, 1440 * (5_360_064 + 757_120)),
  ],
)
def test_blocks_per_stage(blocks_per_stage, total_bytes):
  config = configure(
    method='layerwise', blocks_per_stage=blocks_per_stage, rounds_per_stage=15 * blocks_per_stage, **TINY
  )
  assert traffic(config).total_bytes == total_bytes
  assert len(comm.stage_traffic(config, 32, 'paper_v4')) == 12 // blocks_per_stage


def test_methods_agree_when_one_stage_has_all_blocks():
  totals = {
    traffic(configure(method=m, blocks_per_stage=12, rounds_per_stage=180, **TINY)).total_bytes
    for m in ('end_to_end', 'layerwise', 'lw_fedssl', 'prog_fedssl')
  }
  assert len(totals) == 1


@pytest.mark.parametrize(('image_size', 'patch_size'), [(64, 4), (128, 8), (224, 16)])
def test_a_larger_embedding_costs_as_often_as_it_travels(image_size, patch_size):
  extra = comm.component_params(configure(patch_size=patch_size, **TINY), image_size)['embedding'] - 21_696
  for method, rounds in (('end_to_end', 180), ('layerwise', 15), ('prog_fedssl', 180)):
    small = traffic(configure(method=method, **TINY)).total_bytes
    large = traffic(configure(method=method, patch_size=patch_size, **TINY), image_size).total_bytes
    assert large - small == 2 * rounds * 4 * extra > 0


MICRO = {'encoder': 'vit_micro', 'objective': 'simclr', 'rounds_per_stage': 2}
# vit_micro at 16x16, patch 4, in parameters: embedding 48 * 64 + 64 + 16 * 64 = 4,160; block 12 * 64**2 + 13 * 64 =
# 49,984; norm 128; projector 64 * 512 + 512 * 512 + 512 * 256 + 4 * 512 = 428,032.


def test_worst_case_download():
  config = configure(method='layerwise', **MICRO)
  third = comm.stage_traffic(config, 16, 'paper_v4', worst_case_download=True)[2]
  assert third.round_downloads == {
    'embedding': 16_640,
    'block_00': 199_936,
    'block_01': 199_936,
    'block_02': 199_936,
    'norm': 512,
    'projector': 1_712_128,
  }
  assert third.round_uploads == {'block_02': 199_936, 'norm': 512, 'projector': 1_712_128}
  assert (third.download_bytes, third.upload_bytes) == (2 * 2_329_088, 2 * 1_912_576)
  total = traffic(config, 16, worst_case_download=True)
  assert total.download_bytes == 2 * 4 * (4 * (4_160 + 128 + 428_032) + 10 * 49_984) == 17_832_960
  assert total.upload_bytes == traffic(config, 16).upload_bytes == 2 * 4 * (4_160 + 4 * (49_984 + 128 + 428_032))


def test_worst_case_of_blocks_only_is_that_of_lw_fedssl():
  """Without calibration a client that downloads everything pays what calibration makes all clients pay."""
  worst = traffic(configure(method='layerwise', **TINY), 32, 'paper_v1', worst_case_download=True)
  assert worst == traffic(configure(method='lw_fedssl', **TINY), 32, 'paper_v1')


def test_unknown_convention():
  with pytest.raises(UsageError, match='--convention: expected one of paper_v4, paper_v1'):
    comm.stage_traffic(configure(), 32, 'actual')


def test_centralized_exchanges_nothing():
  config = configure(method='centralized', **MICRO)
  assert traffic(config, 16).total_bytes == 0
  payload = comm.make_payload(config, 16)
  run = comm.charge_run(payload, stages.make_plans(config), 1, *comm.full_participation(config))
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
  ledger, charged = comm.start_ledger(DIGITS, 3), []
  for plan, (ids, returned) in zip(plans, rounds):
    before = jax.tree.map(np.copy, ledger)
    after, result = comm.charge_round(ledger, DIGITS, plan, ids, returned)
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
  run = comm.charge_run(DIGITS, plans, 3, ids, returned)
  expected = np.zeros((2, 4, 3), np.int64)
  for r in range(8):
    for k in range(2):
      expected[:, r // 2, ids[r, k]] += downs[r, k], ups[r, k]
  np.testing.assert_array_equal(run.download_bytes, expected[0])
  np.testing.assert_array_equal(run.upload_bytes, expected[1])
  assert run.download_bytes.dtype == np.int64
  half = comm.charge_run(DIGITS, plans, 3, ids[:4], returned[:4])
  np.testing.assert_array_equal(half.download_bytes[:2], expected[0, :2])
  assert not half.download_bytes[2:].any()
  after, _ = comm.charge_round(half.ledger, DIGITS, plans[2], ids[4], returned[4])
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
  """Only the hand-over of finished blocks, which the paper leaves out, is extra; and only `layerwise` has one."""
  config = configure(method=method, **TINY)
  payload = comm.make_payload(config, 32)
  run = comm.charge_run(payload, stages.make_plans(config), 10, *comm.full_participation(config))
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
    comm.charge_round(comm.start_ledger(DIGITS, 3), DIGITS, plan, ids, returned)


def test_more_rounds_than_planned():
  plans = stages.make_plans(configure(method='layerwise', **MICRO))
  with pytest.raises(ValueError, match='up to 8 rounds'):
    comm.charge_run(DIGITS, plans, 1, np.zeros((9, 1), int), np.ones((9, 1), bool))


# The expectation.


def test_expected_catch_up_by_hand():
  """Two clients, one a round, two rounds a stage: what stage 1 left behind is fetched late or not at all."""
  config = configure(method='layerwise', num_clients=2, clients_per_round=1, blocks_per_stage=2, **MICRO)
  found = comm.expected_traffic(config, 16)
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


@pytest.mark.parametrize('method', ['lw_fedssl', 'layerwise', 'prog_fedssl'])
def test_expectation_is_the_mean_of_the_ledger_over_draws(method):
  config = configure(
    method=method, num_clients=6, clients_per_round=2, client_dropout=0.5, encoder='vit_micro', rounds_per_stage=3
  )
  plans, payload = stages.make_plans(config), comm.make_payload(config, 16)
  generator = np.random.default_rng(0)
  downloads, sent = [], []
  for _ in range(400):
    ids = np.array([generator.choice(6, 2, replace=False) for _ in range(12)])
    traffic_of_run = comm.charge_run(payload, plans, 6, ids, generator.random((12, 2)) >= 0.5)
    downloads.append(traffic_of_run.download_bytes.mean(axis=1))
    sent.append(traffic_of_run.upload_bytes.mean(axis=1))
  found = comm.expected_traffic(config, 16)
  for draws, expected in ((downloads, found.download_bytes), (sent, found.upload_bytes)):
    error = np.std(draws, axis=0, ddof=1) / 20
    assert (np.abs(np.mean(draws, axis=0) - expected.sum(axis=1)) < 4 * error).all()


@pytest.mark.parametrize('method', ['lw_fedssl', 'layerwise', 'prog_fedssl', 'end_to_end', 'centralized'])
def test_expectation_of_full_participation_is_exact(method):
  config = configure(method=method, **MICRO)
  payload = comm.make_payload(config, 16)
  exact = comm.charge_run(
    payload, stages.make_plans(config), config.effective_num_clients, *comm.full_participation(config)
  )
  found = comm.expected_traffic(config, 16)
  np.testing.assert_array_equal(found.download_bytes.sum(axis=1), exact.download_bytes[:, 0])
  np.testing.assert_array_equal(found.upload_bytes.sum(axis=1), exact.upload_bytes[:, 0])
