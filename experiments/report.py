"""Compares finished runs: a table on the terminal, report.html (one self-contained file), report.md and its figures.

The rows of the table are also in report.csv and report.json, in base units.

    python -m experiments.report --workdirs=runs/a,runs/b --output=runs/report

A folder without a run of its own means all runs in it, as experiments.sweep writes them.
"""

import shlex
import sys
from typing import Any

from absl import flags as absl_flags

from lwfedssl_jax.errors import UsageError

from . import command

FLAGS = absl_flags.FlagValues()
_WORKDIRS = absl_flags.DEFINE_list('workdirs', [], 'folders of finished runs, comma-separated', flag_values=FLAGS)
_OUTPUT = absl_flags.DEFINE_string('output', 'report', 'folder to write the report to', flag_values=FLAGS)


def main() -> dict[str, Any]:
  """Writes the report and returns its path."""
  if not _WORKDIRS.value:
    raise UsageError('--workdirs: expected at least one folder of a finished run')

  from lwfedssl_jax.report import files

  command.use_compilation_cache()
  typed = shlex.join(['python', '-m', 'experiments.report', *sys.argv[1:]])
  result = files.write_report(_WORKDIRS.value, _OUTPUT.value, typed)
  print(f'{result["table"]}\n\n{result["finding"]}', flush=True)
  return {'report': result['html'], 'groups': result['groups']}


COMMAND = command.Command(__doc__, FLAGS, main)


def run() -> None:
  """Runs this command line."""
  command.run(COMMAND)


if __name__ == '__main__':
  run()
