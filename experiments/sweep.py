r"""Pretrains methods x seeds x values of flags; finished runs are skipped, interrupted ones resumed.

    python -m experiments.sweep --preset=quickstart --methods=lw_fedssl,layerwise \
        --seeds=0,1,2 --vary=learning_rate=2e-3,5e-3 --output=runs/sweep

Several flags are separated by ';', and all combinations run; flags that '+' joins vary together:

    --vary='client_dropout=0.25,0.5;image_size+patch_size=64+8,128+16'

Each run has a folder of its own under --output, e.g. lw_fedssl-learning_rate=0.002-seed0. A preset may set --methods
and --vary.
"""

from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

from . import command, flags

FLAGS = absl_flags.FlagValues()
_METHODS = absl_flags.DEFINE_list('methods', [], 'methods to run; empty: --method alone', flag_values=FLAGS)
_SEEDS = absl_flags.DEFINE_list('seeds', [], 'seeds to run; empty: --seed alone', flag_values=FLAGS)
_VARY = absl_flags.DEFINE_string(
  'vary',
  '',
  "FLAG=VALUE,VALUE,...: a flag of pretrain and its values; more of them after ';'; FLAG+FLAG=VALUE+VALUE,... together",
  flag_values=FLAGS,
)
_OUTPUT = absl_flags.DEFINE_string('output', '', "folder of the runs' folders", flag_values=FLAGS)
_DRY_RUN = absl_flags.DEFINE_boolean('dry_run', False, 'list the runs and stop', flag_values=FLAGS)


def main() -> dict[str, Any]:
  """Runs the sweep, prints a table of its runs, and returns which finished and which failed."""
  config = flags.config_from_flags(FLAGS)
  if not _OUTPUT.value:
    raise UsageError('--output: expected a folder for the runs')
  if config.run.workdir:
    raise UsageError("--workdir: expected none, a sweep names its runs' folders under --output")
  methods = _METHODS.value or [config.method.method]
  seeds = flags.whole_numbers('seeds', _SEEDS.value) or [config.run.seed]

  from lwfedssl_jax.resources import machine
  from lwfedssl_jax.training import sweep

  command.use_compilation_cache()
  runs = sweep.plan(config, methods, seeds, sweep.parse_variations(_VARY.value), _OUTPUT.value)
  left = sum(
    sweep.count_flops(run.config, sweep.load_data(run.config), run.rounds_done) for run in runs if not run.finished
  )
  flags.print_config(config)
  print(sweep.describe(runs, left, machine.matrix_product_rate()), flush=True)
  if _DRY_RUN.value:
    return sweep.Outcome([run.workdir for run in runs if run.finished], {})._asdict()
  outcome = sweep.run_all(runs)
  print(sweep.tabulate([run.workdir for run in runs if run.workdir in outcome.finished]), flush=True)
  return outcome._asdict()


COMMAND = command.Command(__doc__, FLAGS, main, has_config=True)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
