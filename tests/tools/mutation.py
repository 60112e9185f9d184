"""Breaks the library on purpose, one change at a time, and asks whether the tests notice.

    python -m tests.tools.mutation --only='losses|stages'

Every change is made in a temporary copy. The tests of a change run on an unchanged copy first: a failure means nothing
where they fail anyway. Exit code 1 unless every change is killed, that is, unless its tests run and fail with it.
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
import xml.etree.ElementTree
from collections.abc import Sequence
from typing import NamedTuple

from tests.tools.mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = 'lwfedssl_jax'
COPIED = (PACKAGE, 'experiments', 'tests', 'setup.cfg')
PYTEST = (sys.executable, '-m', 'pytest')
ALL_PASSED, SOME_FAILED = 0, 1  # pytest's exit codes; of any other, the tests did not run
NOT_IMPORTED = 'collection failure'  # how pytest's XML says that a test file could not be imported

PASSED, FAILED, DID_NOT_RUN, TOO_SLOW = 'passed', 'failed', 'DID NOT RUN', 'TOOK TOO LONG'  # what became of tests
KILLED, SURVIVED, REFUSED, NOT_APPLIED = 'killed', 'SURVIVED', 'REFUSED', 'NOT APPLIED'  # what became of a mutation


class Outcome(NamedTuple):
  """What became of tests, or of a mutation, and why."""

  kind: str
  why: str = ''


def make_copy(root: pathlib.Path, folder: pathlib.Path) -> None:
  """Copies what the tests need."""
  for name in COPIED:
    if (root / name).is_dir():
      shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(root / name, folder)


def make_environment(folder: pathlib.Path, cache: str) -> dict[str, str]:
  """Makes the copy importable before anything installed; programs that are compiled are kept for the next copy."""
  return os.environ | {
    'PYTHONPATH': str(folder),
    'PYTHONDONTWRITEBYTECODE': '1',
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': cache,
  }


def check_import(folder: pathlib.Path, environment: dict[str, str]) -> None:
  """Raises SystemExit unless a process that starts in the copy imports the copy."""
  found = subprocess.run(
    [sys.executable, '-c', f'import {PACKAGE}; print({PACKAGE}.__file__)'],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  if pathlib.Path(found).resolve() != (folder / PACKAGE / '__init__.py').resolve():
    raise SystemExit(f'expected the copy in {folder} to be imported, found {found}')


def read_outcome(code: int, report: pathlib.Path, said: str) -> Outcome:
  """Reads what became of a pytest process off its exit code and its XML report.

  The code alone does not tell: a test file that cannot be imported under -x, and a missing pytest, are 1 as well.
  """
  cases = list(xml.etree.ElementTree.parse(report).iter('testcase')) if report.exists() else []
  complaints = [found for case in cases for kind in ('failure', 'error') for found in case.findall(kind)]
  if any(found.get('message') == NOT_IMPORTED for found in complaints):
    return Outcome(DID_NOT_RUN, f'a test file could not be imported: {said}')
  if code not in (ALL_PASSED, SOME_FAILED):
    return Outcome(DID_NOT_RUN, f'exit code {code}: {said}')
  if code == SOME_FAILED:
    return Outcome(FAILED, shorten(complaints[0])) if complaints else Outcome(DID_NOT_RUN, said)
  if all(case.find('skipped') is not None for case in cases):
    return Outcome(DID_NOT_RUN, f'every test was skipped: {said}')
  return Outcome(PASSED)


def shorten(complaint: xml.etree.ElementTree.Element) -> str:
  """Returns what a test failed by: an AssertionError, or an error that any call would have met."""
  return ' '.join(complaint.get('message', '').split())[:100]


def run_tests(folder: pathlib.Path, tests: Sequence[str], timeout: float, cache: str) -> Outcome:
  """Runs tests (pytest arguments below tests/) in a copy, up to the first failure; timeout in seconds."""
  report = folder / 'report.xml'
  command = [
    *PYTEST,
    '-x',
    '-q',
    '-p',
    'no:cacheprovider',
    '--hypothesis-seed=0',
    '--tb=line',
    f'--junit-xml={report}',
    *(f'tests/{test}' for test in tests),
  ]
  try:
    result = subprocess.run(
      command,
      cwd=folder,
      env=make_environment(folder, cache),
      capture_output=True,
      text=True,
      errors='replace',
      timeout=timeout,
    )
  except subprocess.TimeoutExpired:
    return Outcome(TOO_SLOW, f'more than {timeout:.0f} seconds')
  return read_outcome(result.returncode, report, (result.stdout + result.stderr)[-2000:])


class Trial(NamedTuple):
  """Where mutations are tried.

  Attributes:
    root: the project.
    timeout: seconds for one run of tests.
    cache: folder that keeps compiled programs from one copy to the next.
    unchanged: what became of each set of tests on an unchanged copy, filled as they are met.
  """

  root: pathlib.Path
  timeout: float
  cache: str
  unchanged: dict[tuple[str, ...], Outcome]


def run_unchanged(trial: Trial, tests: tuple[str, ...]) -> Outcome:
  """Runs a set of tests on the library as it is, once."""
  if tests not in trial.unchanged:
    with tempfile.TemporaryDirectory() as folder:
      make_copy(trial.root, pathlib.Path(folder))
      check_import(pathlib.Path(folder), make_environment(pathlib.Path(folder), trial.cache))
      trial.unchanged[tests] = run_tests(pathlib.Path(folder), tests, trial.timeout, trial.cache)
  return trial.unchanged[tests]


def try_mutation(trial: Trial, mutation: Mutation) -> Outcome:
  """Applies a mutation to a copy and runs its tests there."""
  before = run_unchanged(trial, mutation.tests)
  if before.kind != PASSED:
    return Outcome(REFUSED, f'on the library as it is its tests: {before.kind} {before.why}')
  with tempfile.TemporaryDirectory() as folder:
    make_copy(trial.root, pathlib.Path(folder))
    path = pathlib.Path(folder) / PACKAGE / mutation.path
    source = path.read_text(encoding='utf-8')
    if source.count(mutation.old) != 1:
      return Outcome(NOT_APPLIED, f'its old text occurs {source.count(mutation.old)} times')
    path.write_text(source.replace(mutation.old, mutation.new), encoding='utf-8')
    outcome = run_tests(pathlib.Path(folder), mutation.tests, trial.timeout, trial.cache)
  return {PASSED: Outcome(SURVIVED), FAILED: Outcome(KILLED, outcome.why)}.get(outcome.kind, outcome)


def try_all(trial: Trial, mutations: Sequence[Mutation]) -> bool:
  """Tries mutations in turn and prints a line for each, then those not killed; returns whether all are killed."""
  begin, left = time.time(), []
  for mutation in mutations:
    start = time.time()
    outcome = try_mutation(trial, mutation)
    print(f'{mutation.path:28}{mutation.what:60}{outcome.kind} ({time.time() - start:.0f} s) {outcome.why}', flush=True)
    if outcome.kind != KILLED:
      left.append(f'{outcome.kind}: {mutation.path}: {mutation.what}')
  print(f'{len(mutations) - len(left)} of {len(mutations)} killed in {time.time() - begin:.0f} s', *left, sep='\n')
  return not left


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS) -> None:
  """Reads the command line, tries what is chosen and exits."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='', help='regular expression: mutations whose file or description matches it')
  parser.add_argument('--timeout', type=float, default=300.0, help='seconds for one run of tests')
  options = parser.parse_args(arguments)
  chosen = [m for m in mutations if re.search(options.only, f'{m.path} {m.what}')]
  if not chosen:
    parser.error(f'--only: expected a regular expression that some mutation matches, got {options.only!r}')
  with tempfile.TemporaryDirectory() as cache:
    all_killed = try_all(Trial(ROOT, options.timeout, cache, {}), chosen)
  sys.exit(not all_killed)


if __name__ == '__main__':
  main()
