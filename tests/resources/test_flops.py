"""Operations: the paper's published numbers, and our count against the products in the traced program."""

import math

import jax
import jax.numpy as jnp
import pytest

from lwfedssl_jax import stages
from lwfedssl_jax.catalog import HEAD_HIDDEN, PROJECTION_SIZE
from lwfedssl_jax.config import Config, with_values
from lwfedssl_jax.models import make_encoder
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.objectives import losses
from lwfedssl_jax.resources import flops

TINY = {'encoder': 'vit_tiny'}


def configure(**values):
  return with_values(Config(), values)


def paper_total(image_size=32, **values):
  return flops.total_flops(flops.paper_stage_flops(configure(**TINY, **values), image_size))


# The paper's convention.


@pytest.mark.parametrize(
  ('method', 'objective', 'published', 'tolerance'),
  [
    ('end_to_end', 'moco_v3', 586, 1),
    ('layerwise', 'moco_v3', 139, 1),
    ('prog_fedssl', 'moco_v3', 318, 1),
    ('end_to_end', 'byol', 586, 1),
    ('layerwise', 'byol', 139, 1),
    ('prog_fedssl', 'byol', 318, 1),
    ('end_to_end', 'simclr', 1169, 2),
    ('layerwise', 'simclr', 278, 2),
    ('prog_fedssl', 'simclr', 635, 2),
  ],
)
def test_published_gflops(method, objective, published, tolerance):
  total = paper_total(method=method, objective=objective)
  assert isinstance(total, int)
  assert total / 1e9 == pytest.approx(published, abs=tolerance)


def test_published_ratios():
  total = {m: paper_total(method=m) for m in ('end_to_end', 'layerwise', 'prog_fedssl')}
  assert round(total['end_to_end'] / total['layerwise'], 2) == 4.20
  assert round(total['end_to_end'] / total['prog_fedssl'], 2) == 1.84


@pytest.mark.parametrize(('method', 'published'), [('layerwise', 111), ('prog_fedssl', 233)])
def test_published_depth_dropout(method, published):
  assert paper_total(method=method, depth_dropout_keep=6) / 1e9 == pytest.approx(published, abs=1)


def test_what_the_server_does_is_not_the_clients_cost():
  assert paper_total(method='lw_fedssl') == paper_total(method='layerwise')


def test_a_stage_by_hand():
  """ViT-Tiny at 32x32/4: per block 64 * 12 * 192**2 + 2 * 64**2 * 192 + 2 * 5 * 64 * 192; norm 61,440."""
  block, ends, embedding = 28_311_552 + 1_572_864 + 122_880, 61_440 + 491_520 + 262_144, 64 * 48 * 192
  first, second, *_ = flops.paper_stage_flops(configure(method='layerwise', **TINY), 32)
  assert first == flops.StageFlops(0, 45, embedding + block + ends, 2 * (embedding + block + ends))
  assert second == flops.StageFlops(1, 45, embedding + 2 * block + ends, 2 * (block + ends))
  assert second.total_flops == 45 * (embedding + 4 * block + 3 * ends)


@pytest.mark.parametrize(
  ('image_size', 'patch_size', 'forward'),
  [
    # 12 blocks of (linear + attention + norms), embedding, final norm, heads
    (64, 4, 12 * (113_246_208 + 25_165_824 + 491_520) + 2_359_296 + 245_760 + 753_664),
    (128, 8, 12 * (113_246_208 + 25_165_824 + 491_520) + 9_437_184 + 245_760 + 753_664),
    (224, 16, 12 * (86_704_128 + 14_751_744 + 376_320) + 28_901_376 + 188_160 + 753_664),
  ],
)
def test_image_sizes(image_size, patch_size, forward):
  assert paper_total(image_size, method='end_to_end', patch_size=patch_size) == 540 * 3 * forward
  ordered = [
    paper_total(image_size, method=m, patch_size=patch_size) for m in ('layerwise', 'prog_fedssl', 'end_to_end')
  ]
  assert ordered == sorted(ordered)
  assert all(big > paper_total(method=m) for big, m in zip(ordered, ('layerwise', 'prog_fedssl', 'end_to_end')))


@pytest.mark.parametrize('method', ['layerwise', 'prog_fedssl'])
def test_more_blocks_a_stage_cost_more_in_the_same_rounds(method):
  steps = (1, 2, 3, 4, 6, 12)
  totals = [paper_total(method=method, blocks_per_stage=n, rounds_per_stage=15 * n) for n in steps]
  assert totals == sorted(set(totals))
  assert totals[-1] == paper_total(method='end_to_end')


def test_six_blocks_a_stage_by_hand():
  block, ends, embedding = 30_007_296, 815_104, 589_824
  total = paper_total(method='layerwise', blocks_per_stage=6, rounds_per_stage=90)
  assert total == 270 * (3 * (embedding + 6 * block + ends) + embedding + 6 * block + 3 * (6 * block + ends))


# What is executed: the count must equal the matrix products in the traced program, to the last one.

IMAGE_SIZE, BATCH = 16, 6


def product_flops(jaxpr):
  """Sums 2 * multiply-adds over all dot_general in a jaxpr, loops unrolled."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    assert eqn.primitive.name not in ('while', 'conv_general_dilated')
    inner = [p for p in jax.tree.leaves(eqn.params, is_leaf=is_jaxpr) if is_jaxpr(p)]
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    total += times * sum(product_flops(getattr(p, 'jaxpr', p)) for p in inner)
  return total


def is_jaxpr(value):
  return hasattr(value, 'eqns') or hasattr(getattr(value, 'jaxpr', None), 'eqns')


def traced_flops(config, plan, shape, start, aligned, num_frozen=None):
  """Traces one plainly written step: shared prefix, online branch with gradient, target and received branches."""
  encoder = make_encoder(config.model, IMAGE_SIZE)
  name = config.objective.objective
  projector, predictor = Head((HEAD_HIDDEN, HEAD_HIDDEN), PROJECTION_SIZE), Head((HEAD_HIDDEN,), PROJECTION_SIZE)
  mask = jnp.ones(BATCH, bool)

  def branch(active, images_or_tokens):
    tokens = images_or_tokens
    if shape.trains_embedding:
      tokens = encoder.embed(active['embedding'], tokens)
    pooled = encoder.pool(active['norm'], encoder.blocks(active['blocks'], tokens))
    return projector.apply({'params': active['projector']}, pooled.reshape(2, BATCH, -1), mask)

  def loss(active, target, received, tokens):
    z = branch(active, tokens)
    total = 0.0
    if name == 'simclr':
      total += losses.nt_xent(z, 0.1, mask)
    elif name == 'simsiam':
      q = predictor.apply({'params': active['predictor']}, z, mask)
      total += losses.negative_cosine(q[0], z[1], mask) + losses.negative_cosine(q[1], z[0], mask)
    else:
      q, k = predictor.apply({'params': active['predictor']}, z, mask), branch(target, tokens)
      pair = losses.cosine_distance if name == 'byol' else lambda a, b, m: losses.info_nce(a, b, 0.1, m)
      total += pair(q[0], k[1], mask) + pair(q[1], k[0], mask)
    if aligned:
      g = branch(received, tokens)
      pair = (
        losses.cosine_distance
        if config.objective.alignment_kind == 'cosine'
        else (lambda a, b, m: losses.info_nce(a, b, 0.1, m))
      )
      total += pair(z[0], g[0], mask) + pair(z[1], g[1], mask)
    return total

  def step(params, target, received, images):
    active, frozen, *_ = stages.split(params, shape, start)
    tokens = images
    if not shape.trains_embedding:
      count = start if num_frozen is None else num_frozen
      tokens = encoder.prefix(frozen['blocks'], encoder.embed(frozen['embedding'], images), count)

    def cut(tree):
      return stages.split(tree, shape, start)[0]

    return jax.grad(loss)(active, cut(target), cut(received), tokens)

  key = jax.random.key(0)
  params = jax.eval_shape(encoder.init, key)
  # A calibrated stage trains what exists: the absent blocks are cut off.
  params['blocks'] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((plan.stop, *x.shape[1:]), x.dtype), params['blocks'])

  def init(head, width):
    return jax.eval_shape(head.init, key, jnp.zeros((2, width)), mask[:2])['params']

  params['projector'] = init(projector, config.model.traits.width)
  if name != 'simclr':
    params['predictor'] = init(predictor, PROJECTION_SIZE)
  images = jax.ShapeDtypeStruct((2 * BATCH, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
  return product_flops(jax.make_jaxpr(step)(params, params, params, images).jaxpr)


@pytest.mark.parametrize('objective', ['moco_v3', 'byol', 'simclr', 'simsiam'])
@pytest.mark.parametrize(
  ('method', 'stage', 'options'),
  [
    ('end_to_end', 0, {}),
    ('layerwise', 0, {}),
    ('layerwise', 2, {}),
    ('layerwise', 1, {'blocks_per_stage': 2}),
    ('prog_fedssl', 1, {}),
    ('lw_fedssl', 0, {}),
    ('lw_fedssl', 3, {}),
    ('lw_fedssl', 1, {'alignment_kind': 'cosine'}),
  ],
)
def test_executed_flops_are_the_products_of_the_traced_step(objective, method, stage, options):
  config = configure(method=method, objective=objective, **options)
  plan = stages.make_plans(config)[stage]
  traced = traced_flops(config, plan, plan.shape, plan.start, config.uses_alignment)
  step = flops.executed_flops(config, IMAGE_SIZE, plan, BATCH)
  assert step.total_flops == traced
  assert all(isinstance(part, int) for part in step)


@pytest.mark.parametrize(
  ('method', 'stage', 'frozen'), [('layerwise', 3, 1), ('layerwise', 0, 0), ('prog_fedssl', 3, 0)]
)
def test_depth_dropout_executes_the_kept_blocks(method, stage, frozen):
  config = configure(method=method, depth_dropout_keep=2)
  plan = stages.make_plans(config)[stage]
  assert plan.num_frozen == frozen
  traced = traced_flops(config, plan, plan.shape, plan.start, False, num_frozen=frozen)
  assert flops.executed_flops(config, IMAGE_SIZE, plan, BATCH).total_flops == traced


@pytest.mark.parametrize('objective', ['moco_v3', 'simclr'])
def test_calibration_flops_are_the_products_of_the_traced_step(objective):
  config = configure(method='lw_fedssl', objective=objective)
  plan = stages.make_plans(config)[2]
  traced = traced_flops(config, plan, stages.StageShape(plan.stop, True), 0, aligned=False)
  assert flops.calibration_flops(config, IMAGE_SIZE, plan, BATCH).total_flops == traced


def test_parts_of_a_step():
  """MoCo v3 with alignment, third stage of four: width 64, 16 tokens, multiply-adds of one image in brackets."""
  config = configure(method='lw_fedssl')
  step = flops.executed_flops(config, IMAGE_SIZE, stages.make_plans(config)[2], BATCH)
  images = 2 * 2 * BATCH
  block, embedding = 16 * 12 * 64**2 + 2 * 16 * 16 * 64, 16 * 48 * 64
  projector, predictor = 64 * 512 + 512 * 512 + 512 * 256, 2 * 256 * 512
  assert step == flops.StepFlops(
    prefix_flops=images * (embedding + 2 * block),
    online_forward_flops=images * block,
    online_backward_flops=images * 2 * block,
    target_forward_flops=images * block,
    global_forward_flops=images * block,
    heads_forward_flops=images * (3 * projector + predictor),
    heads_backward_flops=images * 2 * (projector + predictor),
    similarity_flops=2 * (2 + 2) * 2 * BATCH * BATCH * 256,
    recomputed_flops=0,
  )


def test_the_saving_is_in_the_count():
  """At batch 512 a layer-wise step of ViT-Tiny executes less than a third of an end-to-end one in any stage."""

  def count(method, stage):
    config = configure(method=method, **TINY)
    return flops.executed_flops(config, 32, stages.make_plans(config)[stage], 512).total_flops

  layerwise = [count('layerwise', stage) for stage in range(12)]
  assert layerwise[1:] == sorted(layerwise[1:])
  assert 3 * max(layerwise) < count('end_to_end', 0)
