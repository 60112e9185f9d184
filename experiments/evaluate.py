"""Evaluates encoders of runs: kNN, linear probe or finetuning, on all or few labels, on their data set or another.

    python -m experiments.evaluate --workdir=runs/a,runs/b --protocol=linear --label_fraction=0.1 --seeds=0,1,2
    python -m experiments.evaluate --workdir=runs/sweep --protocol=finetune --train_split=val

A sweep's folder means all runs in it. Finetuning of several runs has a row of random weights beside them. Writes
evaluations/NAME.json and a confusion matrix, NAME.png, into each run's folder.
"""

from collections.abc import Mapping
from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax import catalog
from lwfedssl_jax.errors import UsageError

from . import command, flags

FLAGS = absl_flags.FlagValues()
_WORKDIR = absl_flags.DEFINE_list('workdir', [], 'folders of runs, or of a sweep, comma-separated', flag_values=FLAGS)
_PROTOCOL = absl_flags.DEFINE_enum('protocol', 'knn', catalog.PROTOCOLS, 'evaluation protocol', flag_values=FLAGS)
_DATASET = absl_flags.DEFINE_string('dataset', '', "data set to evaluate on; empty: the run's own", flag_values=FLAGS)
_DATA_DIR = absl_flags.DEFINE_string(
  'data_dir', '', "folder of prepared TFDS data sets; empty: the run's", flag_values=FLAGS
)
_CACHE_DIR = absl_flags.DEFINE_string(
  'cache_dir', '', "folder of the cache of decoded images; empty: the run's", flag_values=FLAGS
)
_FRACTION = absl_flags.DEFINE_float(
  'label_fraction', 1.0, "share of each class's training labels, 0 to 1", flag_values=FLAGS
)
_SEEDS = absl_flags.DEFINE_list('seeds', ['0'], 'seeds of label subset, probe and finetuning', flag_values=FLAGS)
_SPLIT = absl_flags.DEFINE_enum(
  'split',
  'test',
  catalog.SPLITS,
  "images to classify; val: the data set's own validation images; holdout: a fixed fifth of --train_split's images",
  flag_values=FLAGS,
)
_TRAIN_SPLIT = absl_flags.DEFINE_enum(
  'train_split', 'train', catalog.TRAIN_SPLITS, 'labeled images to fit on', flag_values=FLAGS
)
_MAX_TRAIN = absl_flags.DEFINE_integer(
  'max_train_images', 0, 'number of training images to use; 0: all', lower_bound=0, flag_values=FLAGS
)
_FROM_SCRATCH = absl_flags.DEFINE_boolean(
  'from_scratch', False, 'random weights, the reference, instead of trained ones', flag_values=FLAGS
)
_SCRATCH_ROW = absl_flags.DEFINE_boolean(
  'scratch_row',
  None,
  'random weights too, once for all runs that share encoder and data set; default: for finetune of several runs',
  flag_values=FLAGS,
)
# Defaults of `finetune.FinetuneOptions`, whose module loads jax; a test requires equality.
_EPOCHS = absl_flags.DEFINE_integer('epochs', 40, 'finetune: epochs', lower_bound=1, flag_values=FLAGS)
_WARMUP = absl_flags.DEFINE_integer('warmup_epochs', 10, 'finetune: warm-up epochs', lower_bound=0, flag_values=FLAGS)
_BATCH = absl_flags.DEFINE_integer('batch_size', 256, 'finetune: images per step', lower_bound=1, flag_values=FLAGS)
_RATE = absl_flags.DEFINE_float(
  'learning_rate', 1e-3, 'finetune: base learning rate per 256 images', lower_bound=0, flag_values=FLAGS
)
_DECAY = absl_flags.DEFINE_float(
  'weight_decay', 1e-5, 'finetune: weight decay of matrices', lower_bound=0, flag_values=FLAGS
)

_SHOWN = ('accuracy', 'mean_per_class_accuracy', 'macro_precision', 'macro_recall', 'macro_f1')


def _row(workdir: str, result: Mapping[str, Any]) -> list[str]:
  figures = [f'{result["mean"][name]:.3f} ± {result["std"][name]:.3f}' for name in _SHOWN]
  return [workdir, result['name'], str(len(result['runs'])), *figures]


def _plan_rows(workdirs: list[str]) -> list[tuple[str, bool]]:
  """Returns (workdir, whether with random weights) of each row: runs in their order, then the references."""
  from lwfedssl_jax.workdir import run_dir

  rows = [(workdir, _FROM_SCRATCH.value) for workdir in workdirs]
  wanted = _SCRATCH_ROW.value
  if wanted is None:
    wanted = _PROTOCOL.value == 'finetune' and len(workdirs) > 1
  if not wanted or _FROM_SCRATCH.value:
    return rows
  first: dict[Any, str] = {}
  for workdir in workdirs:
    config = run_dir.read_config(workdir)
    first.setdefault((config.model, _DATASET.value or config.data.dataset, config.augment.flip_probability), workdir)
  return rows + [(workdir, True) for workdir in first.values()]


def _evaluate(workdir: str, seeds: list[int], from_scratch: bool) -> dict[str, Any]:
  """Evaluates one run, or random weights of its encoder, by the flags."""
  from lwfedssl_jax import run_evaluation
  from lwfedssl_jax.data import sources
  from lwfedssl_jax.evaluation import finetune
  from lwfedssl_jax.workdir import run_dir

  config = run_dir.read_config(workdir)
  options = finetune.FinetuneOptions(
    _EPOCHS.value, _WARMUP.value, _BATCH.value, _RATE.value, _DECAY.value, config.augment.flip_probability
  )
  dataset = sources.load(
    _DATASET.value or config.data.dataset,
    data_dir=_DATA_DIR.value or config.data.data_dir,
    cache_dir=_CACHE_DIR.value or config.data.cache_dir,
    image_size=config.model.image_size,
    client_folders=config.partition.has_client_folders and not _DATASET.value,
  )
  return run_evaluation.evaluate_run(
    workdir,
    _PROTOCOL.value,
    dataset,
    label_fraction=_FRACTION.value,
    seeds=seeds,
    split=_SPLIT.value,
    train_split=_TRAIN_SPLIT.value,
    max_train_images=_MAX_TRAIN.value,
    from_scratch=from_scratch,
    options=options,
  )


def main() -> dict[str, Any]:
  """Evaluates every run and returns means and standard deviations."""
  if not _WORKDIR.value:
    raise UsageError('--workdir: expected the folder of a run')
  if not 0 < _FRACTION.value <= 1:
    raise UsageError(f'--label_fraction: expected more than 0 and at most 1, got {_FRACTION.value}')
  seeds = flags.whole_numbers('seeds', _SEEDS.value)
  if not seeds:
    raise UsageError('--seeds: expected at least one whole number')

  from lwfedssl_jax import tables
  from lwfedssl_jax.report import runs

  command.use_compilation_cache()
  rows, results = [], []
  workdirs, _ = runs.find(_WORKDIR.value)
  for workdir, from_scratch in _plan_rows(workdirs):
    result = _evaluate(workdir, seeds, from_scratch)
    rows.append(_row(workdir, result))
    results.append({'workdir': workdir, **{key: result[key] for key in ('name', 'mean', 'std')}})
    print(f'{workdir}: {result["name"]}: accuracy {rows[-1][3]}', flush=True)
  print(tables.markdown([['run', 'protocol', 'seeds', *(name.replace('_', ' ') for name in _SHOWN)], *rows]))
  return {'results': results}


COMMAND = command.Command(__doc__, FLAGS, main)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
