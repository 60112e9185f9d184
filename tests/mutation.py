"""Breaks the library on purpose, one change at a time, and asks whether the tests notice.

    python -m tests.mutation --only='losses|stages'

Every change is made in a temporary copy. Exit code 1 if a change goes unnoticed, if its tests take too long or do not
run, or if it no longer applies: if its old text does not occur exactly once.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ('lwfedssl_jax', 'experiments', 'tests', 'setup.cfg')
PASSED, FAILED = 0, 1  # pytest's exit codes; any other means that the tests did not run


class Mutation(NamedTuple):
  """A mistake: what it is, and the tests (pytest arguments below tests/) that must fail with it."""

  path: str  # below lwfedssl_jax/
  what: str
  old: str
  new: str
  tests: tuple[str, ...]


LOSSES, STAGES, AGGREGATION = ('test_losses.py',), ('test_stages.py',), ('test_aggregation.py',)
SAMPLING, BATCHING, PARTITION = ('test_sampling.py',), ('test_batching.py',), ('test_partition.py',)
COMMUNICATION, FLOPS = ('resources/test_communication.py',), ('resources/test_flops.py',)
COSTS = ('resources/test_costs.py',)
DRAWS, BLUR = ('test_augment_draws.py',), ('test_augment.py::test_sigma_is_in_pixels_of_the_image_whatever_its_size',)
BLURRED = ('test_augment.py::test_blur_is_scipy_s_and_numpy_s_with_a_limited_support_and_mirrored_edges',)
VIEWS = ('test_augment.py::test_views_are_numpy_s',)
PACKING, FEED = ('test_packing.py',), ('test_feed.py',)
TABLE, MERGE = ('test_contract.py::test_plans_are_the_paper_s_table',), ('test_contract.py::test_split_and_merge',)
BLOCK_RATES = ('test_contract.py::test_block_learning_rates_fall_from_the_newest_block_that_exists',)
STEP = ('test_contract.py::test_step_moves_the_active_and_the_target_by_its_average_only',)
ADAMW = ('reference/test_naive_round.py::test_adamw_equals_naive_adamw',)


def naive(case: str) -> tuple[str, ...]:
  return (f'reference/test_naive_round.py::test_fast_round_equals_naive_round[{case}]',)


MUTATIONS = (
    Mutation('objectives/losses.py', 'rows shorter than one are not normalised',
             'keepdims=True), NORM_EPSILON))', 'keepdims=True), 1.0))', LOSSES),
    Mutation('objectives/losses.py', 'padded samples dilute the mean',
             '/ jnp.maximum(mask.sum(), 1)', '/ mask.size', LOSSES),
    Mutation('objectives/losses.py', 'excluded pairs stay in the softmax',
             'jnp.where(excluded, -jnp.inf, logits)', 'jnp.where(excluded, 0.0, logits)', LOSSES),
    Mutation('objectives/losses.py', 'softmax over the queries of a key',
             'logsumexp(logits, axis=1)', 'logsumexp(logits, axis=0)', LOSSES),
    Mutation('objectives/losses.py', 'keys have a gradient',
             'l2_normalize(jax.lax.stop_gradient(keys))', 'l2_normalize(keys)', LOSSES),
    Mutation('objectives/losses.py', 'info_nce without temperature',
             'precision=jax.lax.Precision.HIGHEST) / temperature\n  return _cross_entropy(logits, jnp.diagonal', 'precision=jax.lax.Precision.HIGHEST)\n  return _cross_entropy(logits, jnp.diagonal', LOSSES),
    Mutation('objectives/losses.py', 'nt_xent takes a neighbour for the positive',
             '(index + batch) % (2 * batch)', '(index + batch - 1) % (2 * batch)', LOSSES),
    Mutation('objectives/losses.py', 'nt_xent compares rows with themselves',
             '~row_mask[None, :] | (index[:, None] == index)', '~row_mask[None, :]', LOSSES),
    Mutation('objectives/losses.py', 'cosine distance with the wrong sign',
             'mean_over(1 - cosine, mask)', 'mean_over(1 + cosine, mask)', LOSSES),
    Mutation('objectives/alignment.py', 'second view aligned with the first one received',
             'pairwise(local[1], received[1], mask)', 'pairwise(local[1], received[0], mask)', LOSSES),
    Mutation('objectives/branches.py', 'a prediction meets its own view',
             'pair_loss(predictions[0], target_projections[1], mask)',
             'pair_loss(predictions[0], target_projections[0], mask)', naive('layerwise-moco_v3')),
    Mutation('objectives/branches.py', 'the target follows at the wrong rate',
             'trees.interpolate(target_decay,', 'trees.interpolate(1 - target_decay,', STEP),
    Mutation('objectives/moco_v3.py', 'queries and keys swapped',
             'info_nce(predictions, targets, temperature', 'info_nce(targets, predictions, temperature',
             naive('layerwise-moco_v3')),
    Mutation('objectives/byol.py', 'half the loss', 'return 2 * losses', 'return losses', naive('layerwise-byol')),
    Mutation('objectives/simclr.py', 'temperature forgotten',
             'jnp.float32), temperature, mask)', 'jnp.float32), 1.0, mask)', naive('layerwise-simclr')),

    Mutation('stages.py', 'stages begin a round after each other', 'first_round=stage * rounds', 'first_round=stage',
             STAGES),
    Mutation('stages.py', 'methods run for different numbers of rounds',
             'config.method.rounds_per_stage * (step // config.method.blocks_per_stage)',
             'config.method.rounds_per_stage', STAGES),
    Mutation('stages.py', 'embedding trained in the first stage only',
             'trains_embedding=start == 0', 'trains_embedding=stage == 0', TABLE),
    Mutation('stages.py', 'lowest active block labelled frozen', 'block < plan.start', 'block <= plan.start', TABLE),
    Mutation('stages.py', 'trained blocks are put back one too high',
             'part.astype(leaf.dtype), start, 0)', 'part.astype(leaf.dtype), start + 1, 0)', MERGE),
    Mutation('stages.py', 'new blocks copied from themselves', 'leaf[first - 1]', 'leaf[first]', STAGES),
    Mutation('stages.py', 'calibration changes only what clients train',
             'return needs(plan, head_names) if plan.calibrates else uploads(plan, head_names)',
             'return uploads(plan, head_names)', COMMUNICATION),
    Mutation('stages.py', 'the block on top is not downloaded',
             'block_name(i) for i in range(plan.stop))', 'block_name(i) for i in range(plan.stop - 1))', COMMUNICATION),

    Mutation('federated/aggregation.py', 'weight zero times infinity',
             'jnp.where(per_client > 0, per_client * leaf, 0)', '(per_client * leaf)', AGGREGATION),
    Mutation('federated/aggregation.py', 'a loss at the limit is refused', 'loss <= loss_limit', 'loss < loss_limit',
             AGGREGATION),
    Mutation('federated/aggregation.py', 'only the loss has to be finite', 'return finite & ', 'return ', AGGREGATION),
    Mutation('federated/aggregation.py', 'short updates are stretched', 'jnp.minimum(1, max_norm',
             'jnp.maximum(1, max_norm', AGGREGATION),
    Mutation('federated/aggregation.py', 'one value too many is kept', 'rank < count - trim', 'rank <= count - trim',
             AGGREGATION),
    Mutation('federated/aggregation.py', 'clients left out count as zeros', 'jnp.where(mask, leaf, jnp.inf)',
             'jnp.where(mask, leaf, 0)', AGGREGATION),

    Mutation('federated/local.py', 'alignment without its weight',
             'main + rules.alignment_weight * aligned', 'main + aligned', STEP),
    Mutation('federated/local.py', 'one invalid sample drops the step', 'trees.select(mask.any()',
             'trees.select(mask.all()', STEP),
    Mutation('federated/local.py', 'all steps see the same augmentation', 'jax.random.fold_in(key, index)', 'key',
             naive('layerwise-moco_v3')),

    Mutation('federated/optimizer.py', 'weight decay of scales', "endswith('kernel')", "endswith(('kernel', 'scale'))",
             ADAMW),
    Mutation('federated/optimizer.py', 'learning rate not scaled with the batch',
             'base_learning_rate * batch_size / REFERENCE_BATCH_SIZE', 'base_learning_rate', ADAMW),
    Mutation('federated/optimizer.py', 'uphill', 'optax.scale(-learning_rate)', 'optax.scale(learning_rate)', ADAMW),
    Mutation('federated/optimizer.py', 'the newest block is slowed down too', 'depth - 1 - jnp.arange(count)',
             'depth - jnp.arange(count)', BLOCK_RATES),

    Mutation('federated/sampling.py', 'dropout is the share that returns', '>= client_dropout', '< client_dropout',
             SAMPLING),
    Mutation('federated/sampling.py', 'all clients return together',
             'rng.Stream.DROPOUT, round_num, client)', 'rng.Stream.DROPOUT, round_num)', SAMPLING),
    Mutation('federated/sampling.py', 'the same clients every round', 'rng.Stream.SAMPLING, round_num)',
             'rng.Stream.SAMPLING)', SAMPLING),

    Mutation('data/batching.py', 'a client goes through the room of the largest', 'index % own_steps', 'index % steps',
             BATCHING),
    Mutation('federated/packing.py', 'clients with least to do first', 'np.argsort(-steps', 'np.argsort(steps',
             PACKING),
    Mutation('federated/packing.py', 'the first device gets all large clients', '.T.reshape(-1)', '.reshape(-1)',
             PACKING),
    Mutation('federated/feed.py', 'all clients get the first one\'s images', 'first + np.arange(count)',
             'np.arange(count)', FEED),
    Mutation('federated/feed.py', 'empty seats return', 'filled & self._participation', 'self._participation', FEED),
    Mutation('federated/feed.py', 'returns in the order of ids', '.returned[round_num][order])',
             '.returned[round_num][np.arange(len(order)) % len(self._participation.returned[round_num])])', FEED),
    Mutation('resources/communication.py', 'what was held is forgotten in expectation', '(current + missing) * kept',
             'missing * kept', COMMUNICATION),
    Mutation('federated/local.py', 'devices\' gradients are added, not averaged', 'jax.lax.pmean(gradients',
             'jax.lax.psum(gradients', ('test_devices.py',)),
    Mutation('data/batching.py', 'padding takes part in the shuffle', 'position < num_images', 'position <= num_images',
             BATCHING),
    Mutation('data/batching.py', 'incomplete batches are trained on', ' & (index < epochs * own_steps)[:, None]', '',
             BATCHING),

    Mutation('data/augment.py', 'sides are cut off instead of drawn again',
             'fits = ((sides > 0) & (sides <= size)).all(axis=0)',
             'sides = jnp.minimum(sides, size); fits = (sides > 0).all(axis=0)', DRAWS),
    Mutation('data/augment.py', 'no limit on the sides of a crop', '(sides > 0) & (sides <= size)', '(sides > 0)',
             DRAWS),
    Mutation('data/augment.py', 'sides are not whole pixels', 'jnp.round(jnp.sqrt(', '(jnp.sqrt(', DRAWS),
    Mutation('data/augment.py', 'the last place of a crop is left out', 'size - sides + 1)', 'size - sides)', DRAWS),
    Mutation('data/augment.py', 'sigma in pixels of a 224-pixel image', ') / sigma))', ') / (sigma * size / 224)))',
             BLUR),
    Mutation('data/augment.py', 'kernel without a limit', 'radius = support // 2', 'radius = size - 1', BLURRED),
    Mutation('data/augment.py', 'edge pixel repeated', "mode='reflect'", "mode='symmetric'", BLURRED),
    Mutation('data/augment.py', 'the jitter has one order', '(draw[27] * len(JITTER_ORDERS)).astype(jnp.int32)', '0',
             DRAWS),
    Mutation('data/augment.py', 'the hue is always turned last', 'place = jnp.argmax(order == HUE)',
             'place = 3 + 0 * jnp.argmax(order == HUE)', VIEWS),
    Mutation('data/augment.py', 'contrast toward the pixel, not the mean', 'luma.mean()', 'luma', VIEWS),
    Mutation('data/augment.py', 'products in the default precision', ', columns, precision=HIGHEST)', ', columns)',
             ('test_augment.py::test_every_product_asks_for_full_precision',)),
    Mutation('data/randaugment.py', 'products in the default precision', 'grid, precision=augment.HIGHEST)', 'grid)',
             ('test_augment.py::test_every_product_asks_for_full_precision',)),

    Mutation('data/partition.py', 'a client of one image', 'MIN_CLIENT_IMAGES = 2', 'MIN_CLIENT_IMAGES = 1', PARTITION),
    Mutation('data/partition.py', 'concentration ignored', 'standard_gamma(config.dirichlet_beta,',
             'standard_gamma(1.0,', PARTITION),
    Mutation('data/partition.py', 'shards of mixed labels', 'np.argsort(labels[order]', 'np.argsort(order', PARTITION),
    Mutation('data/partition.py', 'seed ignored', 'host_generator(seed, rng', 'host_generator(0, rng', PARTITION),
    Mutation('data/partition.py', 'remainders go to the smallest fractions', 'np.argsort(-(exact - sizes)',
             'np.argsort((exact - sizes)', PARTITION),

    Mutation('resources/communication.py', 'a dropped client forgets its download',
             'np.where(stale, ledger.version', 'np.where(stale & returned[:, None], ledger.version', COMMUNICATION),
    Mutation('resources/communication.py', 'a round without returns makes new versions', ' & returned.any()', '',
             COMMUNICATION),
    Mutation('resources/communication.py', 'dropped clients upload', '(returned[:, None] & active) * sizes',
             'np.tile(active, (len(returned), 1)) * sizes', COMMUNICATION),
    Mutation('resources/communication.py', 'the last batch norm has parameters', 'sum(widths[1:-1])', 'sum(widths[1:])',
             COMMUNICATION),
    Mutation('resources/communication.py', 'centralized training pays',
             'BYTES_PER_PARAM if config.is_federated else 0', 'BYTES_PER_PARAM', COMMUNICATION),

    Mutation('resources/flops.py', 'one of the two attention products', 'attention = 2 * tokens', 'attention = tokens',
             FLOPS),
    Mutation('resources/flops.py', 'gradient of the image counted', 'pair * (embedding + 2 * active)',
             'pair * 2 * (embedding + active)', FLOPS),
    Mutation('resources/flops.py', 'projections of the received model forgotten', '1 + has_target + aligned',
             '1 + has_target', FLOPS),
    Mutation('resources/flops.py', 'backward pass as dear as the forward one', 'views * 2 * trained',
             'views * trained', FLOPS),

    Mutation('resources/costs.py', 'mean over the sampled, not the federation', '(row / config.effective_num_clients)',
             '(row / config.effective_clients_per_round)', COSTS),
    Mutation('resources/costs.py', 'calibration epochs forgotten', 'plan.calibrates * config.method.calibration_epochs',
             'plan.calibrates', COSTS),
    Mutation('resources/costs.py', 'one GB for all conventions',
             "OWN_GB_BYTES if convention in OWN_CONVENTIONS else ", '', COSTS),
    Mutation('resources/costs.py', 'peak memory of the least demanding stage', 'max(s.peak_memory_bytes',
             'min(s.peak_memory_bytes', COSTS),
    Mutation('resources/costs.py', 'ratios upside down', "f'{other / mine:.2f}x'", "f'{mine / other:.2f}x'", COSTS),
    Mutation('evaluation/protocols.py', 'queries keep what all embeddings have in common',
             'queries - origin', 'queries', ('evaluation/test_protocols.py',)),
)


def copy_to(folder: str) -> None:
  """Copies what the tests need."""
  for name in COPIED:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, pathlib.Path(folder) / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(ROOT / name, folder)


def environment(folder: str) -> dict[str, str]:
  return os.environ | {'PYTHONPATH': folder, 'PYTHONDONTWRITEBYTECODE': '1', 'JAX_PLATFORMS': 'cpu'}


def check_import(folder: str) -> None:
  """Raises SystemExit unless a process that starts in the copy imports the copy."""
  found = subprocess.run(
      [sys.executable, '-c', 'import lwfedssl_jax; print(lwfedssl_jax.__file__)'], cwd=folder, env=environment(folder),
      capture_output=True, text=True, check=True).stdout.strip()
  if pathlib.Path(found) != pathlib.Path(folder) / 'lwfedssl_jax' / '__init__.py':
    raise SystemExit(f'expected the copy in {folder} to be imported, found {found}')


def run_tests(folder: str, tests: tuple[str, ...], timeout: float) -> tuple[int | None, str]:
  """Returns pytest's exit code (None: it took too long) and the end of what it said."""
  command = [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', '--hypothesis-seed=0', '--tb=line',
             *(f'tests/{test}' for test in tests)]
  try:
    result = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, errors='replace', timeout=timeout)
  except subprocess.TimeoutExpired:
    return None, ''
  return result.returncode, (result.stdout + result.stderr)[-2000:]


def try_mutation(mutation: Mutation, timeout: float) -> str:
  """Returns 'killed', or what else became of a mutation."""
  with tempfile.TemporaryDirectory() as folder:
    copy_to(folder)
    path = pathlib.Path(folder) / 'lwfedssl_jax' / mutation.path
    source = path.read_text(encoding='utf-8')
    if source.count(mutation.old) != 1:
      return f'NOT APPLIED: its old text occurs {source.count(mutation.old)} times'
    path.write_text(source.replace(mutation.old, mutation.new), encoding='utf-8')
    code, said = run_tests(folder, mutation.tests, timeout)
  if code is None:
    return f'TOOK MORE THAN {timeout:.0f} SECONDS'
  return {PASSED: 'SURVIVED', FAILED: 'killed'}.get(code, f'TESTS DID NOT RUN: {said}')


def check_unchanged(mutations: list[Mutation], timeout: float) -> None:
  """Raises SystemExit unless the tests pass on the library as it is: only then does a failure mean anything."""
  with tempfile.TemporaryDirectory() as folder:
    copy_to(folder)
    check_import(folder)
    tests = tuple(dict.fromkeys(test for mutation in mutations for test in mutation.tests))
    code, said = run_tests(folder, tests, timeout)
  if code != PASSED:
    raise SystemExit(f'the tests do not pass on the library as it is: {said}')


def main() -> None:
  """Tries every mutation and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help='regular expression: mutations whose file or description matches it')
  parser.add_argument('--timeout', type=float, default=300.0, help='seconds for one mutation')
  options = parser.parse_args()
  chosen = [m for m in MUTATIONS if re.search(options.only, f'{m.path} {m.what}')]
  begin = time.time()
  check_unchanged(chosen, 6 * options.timeout)
  print(f'the tests pass on the library as it is ({time.time() - begin:.0f} s)', flush=True)
  outcomes = []
  for mutation in chosen:
    start = time.time()
    outcomes.append(try_mutation(mutation, options.timeout))
    print(f'{mutation.path:28}{mutation.what:52}{outcomes[-1]} ({time.time() - start:.0f} s)', flush=True)
  killed = outcomes.count('killed')
  print(f'{killed} of {len(chosen)} killed in {time.time() - begin:.0f} s')
  sys.exit(killed != len(chosen))


if __name__ == '__main__':
  main()
