"""Fixtures that several files share: a tiny library, and tiny rounds that are compiled once a session."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import platform

# For the commands that tests start, too. The CUDA plugin compiles for GPUs in tests; they run on the CPU.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if importlib.metadata.version('jaxlib').startswith('0.10.') and platform.machine() == 'x86_64':
  # XLA's older emitters compile a round in a third of the time. AVX has no fused multiply-add: with one, programs that
  # fuse differently round differently under these emitters. Later versions do not have them; CI's workflow runs those.
  older = '--xla_cpu_use_fusion_emitters=false --xla_cpu_max_isa=AVX'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {older}'

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax import catalog, models, objectives, stages
from lwfedssl_jax import config as configs
from lwfedssl_jax.federated import aggregation, client_update
from lwfedssl_jax.federated.model import make_model
from lwfedssl_jax.federated.round_types import ClientSlots, RoundInputs
from lwfedssl_jax.training import simulation
from tests import tiny

# Tracing makes many small objects that live. Collecting them more rarely takes a tenth off the processor time.
gc.set_threshold(200_000, 20, 50)

# Files that train or compile for more than a few seconds, the longest first, so that two workers end together.
SLOW = (
  'test_training.py',
  'test_contract.py',
  'test_naive_round.py',
  'test_by_hand.py',
  'test_in_process.py',
  'test_resnet_runs.py',
  'test_resnet.py',
  'test_client_memory.py',
  'test_cli.py',
  'test_presets.py',
  'test_extending.py',
  'test_kill.py',
  'test_client_state.py',
  'test_server_optimizer.py',
  'test_target_compile.py',
  'test_devices.py',
  'test_micro_batching.py',
  'test_planner.py',
  'test_cluster.py',
  'test_scaling.py',
  'test_warmup.py',
  'test_losses.py',
  'test_augment.py',
  'test_memory.py',
  'test_server_planner.py',
  'test_mutation.py',
  'test_sweeps.py',
  'test_flops.py',
  'test_measure.py',
  'test_heads.py',
  'test_accounting.py',
  'test_types.py',
  'test_resnet_costs.py',
  'test_fuzz.py',
  'test_knn_and_collapse.py',
  'test_depth_dropout.py',
  'test_ldawa.py',
  'test_sampling.py',
  'test_finetune.py',
  'test_properties.py',
  'test_randaugment.py',
)
MOST_MEMORY_MAPS = 25_000
ROUNDS = ('test_contract.py', 'test_naive_round.py', 'test_by_hand.py')  # the same rounds: one worker compiles them


def pytest_collection_modifyitems(items):
  """Marks slow tests; a worker takes a file at a time, or all of ROUNDS."""
  items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
  for item in items:
    item.add_marker(pytest.mark.xdist_group('rounds' if item.path.name in ROUNDS else str(item.path)))
    if item.path.name in SLOW:
      item.add_marker(pytest.mark.slow)


@pytest.fixture(scope='module')
def fully_optimized():
  """Compiles as a user's run does, while a module's tests run."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture(scope='session', autouse=True)
def compilation(tmp_path_factory):
  """Halves the time XLA takes to compile; the workers of a session share compiled programs and decoded images.

  JAX_COMPILATION_CACHE_DIR, where it is set, keeps the programs for the next session.
  """
  session = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    session = session.parent
  (session / 'cache').mkdir(exist_ok=True)
  root = str(session / 'cache')
  compiled = os.environ.get('JAX_COMPILATION_CACHE_DIR', root)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', root)
    patch.setenv('JAX_COMPILATION_CACHE_DIR', compiled)  # for the commands that tests start
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
    patch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    jax.config.update('jax_disable_most_optimizations', True)
    jax.config.update('jax_compilation_cache_dir', compiled)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
    yield


@pytest.fixture(scope='module', autouse=True)
def few_memory_maps():
  """Forgets compiled programs before they have all 65,530 memory maps of a process on Linux; beyond, XLA crashes."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_text().count('\n') > MOST_MEMORY_MAPS:
    jax.clear_caches()


@pytest.fixture
def registries():
  """Forgets, after a test, what it registers."""
  tables = (
    catalog.METHODS,
    catalog.OBJECTIVES,
    catalog.ENCODERS,
    objectives.BUILDERS,
    models.BUILDERS,
    aggregation.BUILDERS,
  )
  kept, rules = [(table, dict(table)) for table in tables], list(catalog.AGGREGATIONS)
  yield
  for table, before in kept:
    table.clear()
    table.update(before)
  catalog.AGGREGATIONS[:] = rules
  make_model.cache_clear()


@pytest.fixture(scope='module')
def cheap_views():
  """Replaces the default augmentation, a third of what a run compiles, while a module's tests run."""
  original, default = client_update.make_view_drawer, client_update.Pipeline()

  def draw_cheaply(pipeline, config, axis=None):
    return original(tiny.CHEAP_PIPELINE if pipeline == default else pipeline, config, axis)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(client_update, 'make_view_drawer', draw_cheaply)
    simulation._shared_round.cache_clear()
    yield
  simulation._shared_round.cache_clear()


@pytest.fixture(scope='module')
def tiny_library():
  """Shrinks `vit_micro` and the heads while a module's tests run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(catalog.ENCODERS, 'vit_micro', tiny.TINY)
    patch.setattr(objectives, 'HEAD_HIDDEN', 12)
    patch.setattr(objectives, 'PROJECTION_SIZE', 8)
    make_model.cache_clear()
    yield
  make_model.cache_clear()


@pytest.fixture(scope='module')
def tiny_round(tiny_library):
  """A builder (method, objective, field=value, ...) -> TinyRound; equal settings give the same, compiled round."""
  del tiny_library

  def build(method, objective, epsilon=tiny.SMOOTH_EPSILON, pipeline=tiny.CHEAP_PIPELINE, **changes):
    values = {**tiny.VALUES, 'objective': objective, **tiny.OBJECTIVE_VALUES.get(objective, {}), **changes}
    own = {'method': method, **tiny.METHOD_VALUES.get((method, objective), {})}
    config = configs.with_values(configs.Config(), {**values, **own, **changes})
    shared = {'method': 'layerwise'} if objective in tiny.OBJECTIVE_VALUES else own
    built, traces = tiny.build_round(epsilon, pipeline, tuple(sorted({**values, **shared, **changes}.items())))
    init = functools.partial(tiny.random_params, tiny.param_shapes(objective))

    def apply(params, plan, inputs):
      return built.apply(jax.tree.map(jnp.array, params), plan, inputs)

    stage = tiny.STAGES.get((method, objective), 0)
    return tiny.TinyRound(config, stages.make_plans(config), stage, init, apply, built, traces, epsilon)

  return build


@pytest.fixture(scope='session')
def tiny_inputs():
  """Inputs of a round: clients 1, 3, 4, 8 with CLIENT_SIZES images; client 3 does not return."""
  generator = np.random.default_rng(0)
  held, count = sum(tiny.CLIENT_SIZES) + 1, sum(tiny.CLIENT_SIZES) + 1 + tiny.SERVER_IMAGES
  coarse = generator.uniform(0, 255, (count, 3, 3, 3))
  images = np.kron(coarse, np.ones((1, 3, 3, 1)))[:, : tiny.IMAGE_SIZE, : tiny.IMAGE_SIZE]
  images = np.clip(images + generator.normal(0, 20, images.shape), 0, 255).astype(np.uint8)
  shuffled = generator.permutation(held).astype(np.int32)

  def build(method='layerwise', objective='moco_v3', round_num=5):
    sizes, returned = tiny.CLIENT_SIZES, (True, False, True, True)
    if method == 'centralized':  # one client; where the round is shared with other methods, the others do not return
      sizes, returned = sizes, (False, False, True, False)
      if objective == 'moco_v3':
        sizes, returned = sizes[2:3], (True,)
    # Padding points to a real image, which must not be seen.
    image_ids = np.full((len(sizes), max(tiny.CLIENT_SIZES)), held - 1, np.int32)
    begin = 0
    for row, size in zip(image_ids, sizes):
      row[:size] = shuffled[begin : begin + size]
      begin += size
    clients = ClientSlots(
      jnp.array([1, 3, 4, 8][: len(sizes)], jnp.int32),
      jnp.asarray(image_ids),
      jnp.array(sizes, jnp.int32),
      jnp.array(returned),
    )
    return RoundInputs(
      jax.random.key(7),
      jnp.int32(round_num),
      jnp.asarray(images[:held]),
      clients,
      jnp.asarray(images[held:]),
      jnp.float32(jnp.inf),
    )

  return build
