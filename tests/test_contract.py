"""What every objective and every method owe each other: what moves, what does not, what exists, what is retraced."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lwfedssl_jax import config as configs
from lwfedssl_jax import stages, trees
from lwfedssl_jax.federated import optimizer, training_step
from lwfedssl_jax.federated.client_update import make_step_options
from lwfedssl_jax.federated.training_step import Batch
from lwfedssl_jax.stages import ABSENT, ACTIVE, FROZEN
from tests.tiny import cheap_two_views, make_round

pytestmark = pytest.mark.usefixtures('tiny_library')

METHODS = ('end_to_end', 'layerwise', 'lw_fedssl', 'prog_fedssl', 'centralized')
OBJECTIVES = ('moco_v3', 'byol', 'simclr', 'simsiam')

# A vector added to every final norm is taken out again by the batch normalization behind it: exactly no gradient.
WITHOUT_GRADIENT = 'norm/bias'


def by_name(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def pieces(params, plan):
  """Yields (name, value, label): blocks one by one, everything else leaf by leaf."""
  labels = by_name(stages.labels(params, plan.start, plan.stop, plan.trains_embedding))
  for name, leaf in by_name(params).items():
    if name.startswith('blocks/'):
      yield from ((f'{name}[{i}]', np.asarray(part), int(labels[name][i])) for i, part in enumerate(leaf))
    else:
      yield name, np.asarray(leaf), int(labels[name])


def moved(before, after, plan):
  """{label: set of moved?} over all pieces but the one without a gradient."""
  found = {ABSENT: set(), FROZEN: set(), ACTIVE: set()}
  for (name, old, label), (_, new, _) in zip(pieces(before, plan), pieces(after, plan)):
    if name != WITHOUT_GRADIENT:
      found[label].add(not np.array_equal(old, new))
  return found


# One round.


@pytest.mark.parametrize('objective', OBJECTIVES)
@pytest.mark.parametrize('method', METHODS)
def test_round(tiny_round, tiny_inputs, method, objective):
  tiny = tiny_round(method, objective)
  plan, inputs, params = tiny.plans[tiny.stage], tiny_inputs(method, objective), tiny.init(0)
  after, metrics = tiny.apply(params, plan, inputs)

  chex.assert_trees_all_equal_structs(after, params)
  assert metrics.accepted.tolist() == inputs.clients.returned.tolist()
  metrics = metrics._replace(accepted=None)
  assert {leaf.dtype for leaf in jax.tree.leaves((after, metrics))} == {jnp.dtype('float32')}
  chex.assert_tree_all_finite((after, metrics))
  assert metrics.client_losses.shape == inputs.clients.client_ids.shape
  assert (metrics.calibration is not None) == tiny.config.uses_calibration
  assert (metrics.client.alignment != 0) == tiny.config.uses_alignment

  changed = moved(params, after, plan)
  assert changed[ACTIVE] == {True}
  assert changed[ABSENT] <= {False}
  assert changed[FROZEN] <= {tiny.config.uses_calibration}
  assert ('predictor' in after) == (objective != 'simclr')

  # What depends on the round, the clients and the stage is data: nothing is traced again.
  traced = len(tiny.traces)
  later, _ = tiny.apply(after, plan, tiny_inputs(method, objective, round_num=6))
  assert moved(after, later, plan)[ACTIVE] == {True}
  if plan.start > 0:
    others = [other for other in tiny.plans if other.start > 0]
    for other in others:
      result, _ = tiny.apply(later, other, inputs)
      assert moved(later, result, other)[ABSENT] <= {False}
      assert moved(later, result, other)[FROZEN] <= {tiny.config.uses_calibration}
  assert len(tiny.traces) == traced > 0


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_bfloat16_leaves_parameters_and_losses_float32(tiny_round, tiny_inputs, objective):
  """Types only, without compiling; what bfloat16 does to numbers is tested in test_vit, test_heads and test_losses."""
  tiny = tiny_round('layerwise', objective, compute_dtype='bfloat16')
  plan, params = tiny.plans[1], tiny.init(0)
  lowered = tiny.round.lower(params, plan, tiny_inputs())
  assert 'bf16' in lowered.as_text()
  after, metrics = lowered.out_info
  chex.assert_trees_all_equal_structs(after, params)
  assert {leaf.dtype for leaf in jax.tree.leaves((after, metrics._replace(accepted=None)))} == {jnp.dtype('float32')}


# One step.


@pytest.fixture(scope='module', params=OBJECTIVES)
def step(request, tiny_round, tiny_inputs):
  """A step in the third stage, with alignment, from three different sets of weights for the three branches."""
  tiny = tiny_round('layerwise', request.param, representation_alignment=True, blocks_per_stage=1)
  options, plan, images = make_step_options(tiny.config, 8), tiny.plans[2], tiny_inputs().images
  online, received, other = (stages.split(tiny.init(seed), plan.shape, plan.start) for seed in range(3))
  global_params = received._replace(frozen=online.frozen)
  optimizer = training_step.make_optimizer(options, global_params)
  state = training_step.init_state(options, optimizer, online)
  if state.target is not None:
    state = state._replace(target=trees.without_online_only(options.model.raveler.ravel(other.active)))
  views = cheap_two_views(jax.random.key(0), images[:4], tiny.config.augment)
  return options, optimizer, state, global_params, views


def test_step_moves_the_active_and_the_target_by_its_average_only(step):
  options, optimizer, state, global_params, views = step
  run = jax.jit(
    lambda state, mask: training_step.train_step(options, optimizer, state, global_params, Batch(views, mask))
  )
  after, losses = run(state, jnp.array([True, True, False, True]))
  chex.assert_trees_all_equal_structs(after, state)

  def unravel(vectors):
    return by_name(options.model.raveler.unravel(vectors, global_params.active))

  old_params, new_params = unravel(state.params), unravel(after.params)
  for name, old in old_params.items():
    assert name == WITHOUT_GRADIENT or not np.array_equal(old, new_params[name]), name
  np.testing.assert_allclose(losses.total, losses.objective + 0.7 * losses.alignment, rtol=1e-6)

  if options.model.objective.update_target is None:
    assert state.target is None and after.target is None
  else:
    assert {name.split('/')[0] for name in unravel(state.target)} == {'blocks', 'norm', 'projector'}
    expected = jax.tree.map(
      lambda target, online: 0.6 * target + 0.4 * online,
      state.target,
      {name: after.params[name] for name in state.target},
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.target, expected)

  # A step without valid samples is no step: not even the optimizer counts it.
  unmoved, _ = run(after, jnp.zeros(4, bool))
  jax.tree.map(np.testing.assert_array_equal, unmoved, after)


def test_only_the_online_branch_has_a_gradient(step):
  options, _, state, global_params, views = step

  def unravel(vectors):
    return None if vectors is None else options.model.raveler.unravel(vectors, global_params.active)

  @jax.jit
  def gradients(params, target, received):
    def total(params, target, received):
      stage = global_params._replace(active=received)
      branches = training_step.stack_branches(options, params, target, stage)
      inputs = training_step.prefix_tokens(options.model, stage, views)
      return training_step.batch_losses(options, branches, inputs, jnp.ones(4, bool))[0]

    return jax.grad(total, argnums=(0, 1, 2))(params, target, received)

  online, target, received = gradients(unravel(state.params), unravel(state.target), global_params.active)
  for name, leaf in by_name(online).items():
    assert np.isfinite(leaf).all(), name
    assert name == WITHOUT_GRADIENT or np.abs(leaf).max() > 1e-6, name
  for leaf in jax.tree.leaves((target, received)):
    np.testing.assert_array_equal(leaf, 0)


def test_a_round_starts_from_the_global_model_with_a_fresh_optimizer(step):
  options, optimizer, _, global_params, _ = step
  fresh, received = training_step.init_state(options, optimizer, global_params), global_params.active
  jax.tree.map(np.testing.assert_array_equal, fresh.params, options.model.raveler.ravel(received))
  if fresh.target is not None:
    jax.tree.map(np.testing.assert_array_equal, fresh.target, {name: fresh.params[name] for name in fresh.target})
  moments = [leaf for leaf in jax.tree.leaves(fresh.optimizer) if leaf.ndim]
  assert not any(np.any(leaf) for leaf in moments)
  # Two moments for each active parameter, and for nothing else.
  assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(received))


def test_block_learning_rates_fall_from_the_newest_block_that_exists():
  params = {
    'blocks': {'kernel': jnp.ones((4, 2, 2))},
    'norm': {'scale': jnp.ones(2)},
    'embedding': {'kernel': jnp.ones(2)},
  }

  def factors(start, stop):
    return optimizer.layer_factors(params, stages.labels(params, start, stop, start == 0), 0.5)

  found = factors(0, 4)
  np.testing.assert_array_equal(found['blocks']['kernel'][:, 0, 0], [0.125, 0.25, 0.5, 1])
  np.testing.assert_array_equal(found['embedding']['kernel'], 0.0625)
  found = jax.jit(lambda stop: factors(0, stop))(jnp.int32(3))
  np.testing.assert_array_equal(found['blocks']['kernel'][:, 0, 0], [0.25, 0.5, 1, 0])  # the last is absent
  np.testing.assert_array_equal(found['embedding']['kernel'], 0.125)
  np.testing.assert_array_equal(found['norm']['scale'], 1)
  found = factors(2, 3)
  np.testing.assert_array_equal(found['blocks']['kernel'][:, 0, 0], [0, 0, 1, 0])  # frozen, frozen, active, absent
  np.testing.assert_array_equal(found['embedding']['kernel'], 0)


def per_block(tree):
  """The stacked blocks as one subtree each, so that a label per leaf is a label per layer."""
  blocks = {f'{i:02d}': jax.tree.map(lambda leaf, i=i: leaf[i], tree['blocks']) for i in range(4)}
  return {**tree, 'blocks': blocks}


@pytest.mark.parametrize(('method', 'stage'), [('layerwise', 0), ('layerwise', 2), ('prog_fedssl', 1)])
def test_full_tree_under_the_plan_s_masks_takes_the_step_of_the_active_part(tiny_round, method, stage):
  """Three ways to one step: the active part alone; the whole tree with the labels' factors; optax.partition."""
  tiny = tiny_round('layerwise', 'moco_v3')
  plan, decay = plans_of(method)[stage], 0.5
  whole, gradients = tiny.init(0), tiny.init(1)
  labels = stages.labels(whole, plan.start, plan.stop, plan.trains_embedding)

  def take_step(params, gradients, transformation):
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    return optax.apply_updates(params, updates)

  def adamw(params, labels, block_decay):
    return optimizer.make_optimizer(0.3, 64, 0.1, optimizer.layer_factors(params, labels, block_decay))

  active, active_gradients = (stages.split(tree, plan.shape, plan.start).active for tree in (whole, gradients))
  of_active = stages.labels(active, 0, plan.shape.num_active, True)
  expected = stages.merge(whole, take_step(active, active_gradients, adamw(active, of_active, decay)), plan.start)
  found = take_step(whole, gradients, adamw(whole, labels, decay))
  jax.tree.map(np.testing.assert_array_equal, found, expected)

  names = {ABSENT: 'absent', FROZEN: 'frozen', ACTIVE: 'active'}
  by_layer = jax.tree.map(lambda label: names[int(label)], per_block(labels))
  plain = optax.adamw(0.3 * 64 / 256, weight_decay=0.1, mask=optimizer.is_matrix)
  partitioned = optax.partition(
    {'active': plain, 'frozen': optax.set_to_zero(), 'absent': optax.set_to_zero()}, by_layer
  )
  expected = take_step(per_block(whole), per_block(gradients), partitioned)
  found = per_block(take_step(whole, gradients, adamw(whole, labels, 1.0)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.parametrize('online_only', [('predictor',), ('predictor_auxiliary', 'predictor')])
@pytest.mark.parametrize('without', [(), ('predictor',), ('embedding',)])
def test_raveled_trees_unravel_to_themselves(tiny_round, without, online_only):
  """Also with a head whose name begins like another's."""
  raveler, whole = trees.make_raveler(online_only), tiny_round('layerwise', 'moco_v3').init(0)
  whole = whole | {'predictor_auxiliary': whole['predictor']}
  tree = {name: part for name, part in whole.items() if name not in without}
  vectors = raveler.ravel(tree)
  assert all(vector.ndim == 1 for vector in vectors.values())
  assert len(vectors) == (2 if set(online_only) <= set(without) else 4)
  jax.tree.map(np.testing.assert_array_equal, raveler.unravel(vectors, tree), tree)
  of_target = raveler.unravel(trees.without_online_only(vectors), whole if 'embedding' not in without else tree)
  assert of_target.keys() == tree.keys() - set(online_only)

  # Weight decay depends on the vectors' names.
  def decayed(params):
    pairs = zip(*map(jax.tree.leaves, (params, optimizer.is_matrix(params))))
    return sum(leaf.size for leaf, is_decayed in pairs if is_decayed)

  assert decayed(vectors) == decayed(tree) > 0


def test_round_without_returning_clients_keeps_the_model(tiny_round, tiny_inputs):
  tiny = tiny_round('layerwise', 'moco_v3')
  params = tiny.init(0)
  inputs = tiny_inputs()
  clients = inputs.clients._replace(returned=jnp.zeros_like(inputs.clients.returned))
  after, _ = tiny.apply(params, tiny.plans[1], inputs._replace(clients=clients))
  jax.tree.map(np.testing.assert_array_equal, after, params)


# Stage plans. What is expected is written out from the paper's table (arXiv 2401.11647 v1-v3), for 4 blocks.

TABLE = {  # (method, blocks per stage): (active blocks, blocks that exist, embedding trained) of each stage
  ('end_to_end', 1): [([0, 1, 2, 3], 4, True)],
  ('centralized', 1): [([0, 1, 2, 3], 4, True)],
  ('end_to_end', 2): [([0, 1, 2, 3], 4, True)],
  ('layerwise', 1): [([0], 1, True), ([1], 2, False), ([2], 3, False), ([3], 4, False)],
  ('layerwise', 2): [([0, 1], 2, True), ([2, 3], 4, False)],
  ('layerwise', 4): [([0, 1, 2, 3], 4, True)],
  ('lw_fedssl', 1): [([0], 1, True), ([1], 2, False), ([2], 3, False), ([3], 4, False)],
  ('lw_fedssl', 2): [([0, 1], 2, True), ([2, 3], 4, False)],
  ('prog_fedssl', 1): [([0], 1, True), ([0, 1], 2, True), ([0, 1, 2], 3, True), ([0, 1, 2, 3], 4, True)],
  ('prog_fedssl', 2): [([0, 1], 2, True), ([0, 1, 2, 3], 4, True)],
}


def plans_of(method, blocks_per_stage=1, **values):
  return stages.make_plans(
    configs.with_values(
      configs.Config(), dict(method=method, blocks_per_stage=blocks_per_stage, rounds_per_stage=3, **values)
    )
  )


def test_a_loop_of_known_length_takes_the_same_steps(tiny_round, tiny_inputs):
  tiny = tiny_round('layerwise', 'simclr')
  inputs = tiny_inputs()
  alike = inputs._replace(clients=inputs.clients._replace(num_images=jnp.full(4, 13, jnp.int32)))
  unknown, known, shorter = (
    make_round(tiny.config, client_steps=steps).apply(tiny.init(0), tiny.plans[1], alike)[1].client_losses
    for steps in (0, 2 * 2, 3)
  )  # epochs, batches
  np.testing.assert_allclose(known, unknown, rtol=1e-5)
  assert np.abs(shorter / unknown - 1).min() > 1e-3


@pytest.mark.parametrize(('method', 'blocks_per_stage'), TABLE)
def test_plans_are_the_paper_s_table(tiny_round, method, blocks_per_stage):
  params, plans = tiny_round('layerwise', 'moco_v3').init(0), plans_of(method, blocks_per_stage)
  heads = ('projector', 'predictor')
  assert len(plans) == len(TABLE[method, blocks_per_stage])
  for plan, (active, existing, embedding) in zip(plans, TABLE[method, blocks_per_stage]):
    blocks = [ACTIVE if i in active else FROZEN if i < existing else ABSENT for i in range(4)]
    labels = by_name(stages.labels(params, plan.start, plan.stop, plan.trains_embedding))
    assert labels.keys() == by_name(params).keys()
    for name, label in labels.items():
      part = name.split('/')[0]
      expected = {'blocks': blocks, 'embedding': ACTIVE if embedding else FROZEN}.get(part, ACTIVE)
      np.testing.assert_array_equal(label, expected, err_msg=name)
    assert plan.shape == (len(active), embedding, None)
    assert plan.calibrates == (method == 'lw_fedssl')

    def names(indices):
      return tuple(f'block_{i:02d}' for i in indices)

    upload = (('embedding',) if embedding else ()) + names(active) + ('norm', *heads)
    everything = ('embedding', *names(range(existing)), 'norm', *heads)
    assert stages.uploaded_components(plan, heads) == upload
    assert stages.required_components(plan, heads) == everything
    assert stages.modified_components(plan, heads) == (everything if method == 'lw_fedssl' else upload)


@pytest.mark.parametrize(('method', 'blocks_per_stage'), TABLE)
def test_stages_follow_each_other_and_all_methods_run_equally_long(method, blocks_per_stage):
  plans = plans_of(method, blocks_per_stage)
  assert [plan.stage for plan in plans] == list(range(len(plans)))
  assert plans[0].first_round == 0
  for plan, following in itertools.pairwise(plans):
    assert following.first_round == plan.first_round + plan.num_rounds
    assert following.stop == plan.stop + following.num_new
  assert plans[-1].stop == 4
  assert sum(plan.num_rounds for plan in plans) == 4 // blocks_per_stage * 3


def test_calibration_is_a_switch_of_its_own():
  assert all(plan.calibrates for plan in plans_of('prog_fedssl', server_calibration=True))
  assert not any(plan.calibrates for plan in plans_of('lw_fedssl', server_calibration=False))


@pytest.mark.parametrize('method', ['end_to_end', 'layerwise', 'prog_fedssl'])
def test_split_and_merge(tiny_round, method):
  params = tiny_round('layerwise', 'moco_v3').init(0)
  for plan in plans_of(method):
    active, frozen, *_ = stages.split(params, plan.shape, plan.start)
    assert ('embedding' in active) == plan.trains_embedding == ('embedding' not in frozen)
    assert jax.tree.leaves(active['blocks'])[0].shape[0] == plan.stop - plan.start
    jax.tree.map(np.testing.assert_array_equal, stages.merge(params, active, plan.start), params)
    merged = stages.merge(params, jax.tree.map(lambda leaf: leaf + 1, active), plan.start)
    for (name, old, label), (_, new, _) in zip(pieces(params, plan), pieces(merged, plan)):
      np.testing.assert_array_equal(new, old + np.float32(label == ACTIVE), err_msg=name)


@pytest.mark.parametrize('blocks_per_stage', [1, 2])
def test_new_blocks(tiny_round, blocks_per_stage):
  params = tiny_round('layerwise', 'moco_v3').init(0)
  for plan in plans_of('layerwise', blocks_per_stage):
    assert stages.init_new_blocks(params, plan, 'random') is params
    begun = stages.init_new_blocks(params, plan, 'previous')
    first = plan.stop - blocks_per_stage
    source = [first - 1 if plan.stage and first <= i < plan.stop else i for i in range(4)]
    for name, leaf in by_name(begun).items():
      expected = by_name(params)[name]
      np.testing.assert_array_equal(leaf, expected[np.array(source)] if name.startswith('blocks') else expected)
