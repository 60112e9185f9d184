"""Compares finished runs: a table on the terminal, report.html (one self-contained file), report.md and its figures.

python -m experiments.report --workdirs=runs/a,runs/b --output=runs/report

A folder without a run of its own stands for the runs in it, as experiments.sweep leaves them.
"""

from absl import flags as absl_flags

from experiments import flags
from lwfedssl_jax.base import UsageError
from lwfedssl_jax.report import page, runs

_WORKDIRS = absl_flags.DEFINE_list('workdirs', [], 'folders of finished runs, comma-separated')
_OUTPUT = absl_flags.DEFINE_string('output', 'report', 'folder to write the report to')


def main():
  """Writes the report and returns where it is."""
  if not _WORKDIRS.value:
    raise UsageError('--workdirs: expected at least one folder of a finished run')
  result = page.write_report(runs.expand(_WORKDIRS.value), _OUTPUT.value)
  print(result['table'], flush=True)
  return {'report': result['html'], 'groups': result['groups']}


if __name__ == '__main__':
  flags.run(main)
