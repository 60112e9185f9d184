"""Compares finished runs: a table on the terminal, report.md and a picture.

python -m experiments.report --workdirs=runs/a,runs/b --output=runs/report
"""

from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax import reporting
from lwfedssl_jax.base import UsageError

_WORKDIRS = absl_flags.DEFINE_list('workdirs', [], 'folders of finished runs, comma-separated')
_OUTPUT = absl_flags.DEFINE_string('output', 'report', 'folder to write report.md and its picture to')


def main():
  """Writes the report and returns where it is."""
  if not _WORKDIRS.value:
    raise UsageError('--workdirs: expected at least one folder of a finished run')
  print(reporting.write_report(_WORKDIRS.value, _OUTPUT.value), flush=True)
  return {'report': _OUTPUT.value, 'runs': len(_WORKDIRS.value)}


if __name__ == '__main__':
  flags.run(main)
