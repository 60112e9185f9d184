"""The mutation tool on a tiny project: a failure counts only where tests run, and pass without the mutation."""

import re
import subprocess
import sys

import pytest

from tests.tools import mutation, mutations

TESTS = {
  'test_right.py': 'from lwfedssl_jax import sums\n\ndef test_add():\n  assert sums.add(2, 3) == 5\n',
  'test_wrong.py': 'from lwfedssl_jax import sums\n\ndef test_add():\n  assert sums.add(2, 3) == 6\n',
  'test_lost.py': 'import no_such_package\n\ndef test_nothing():\n  pass\n',
  'test_skipped.py': 'import pytest\n\ndef test_nothing():\n  pytest.skip()\n',
  'test_slow.py': 'import time\n\ndef test_nothing():\n  time.sleep(60)\n',
}


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
  root = tmp_path_factory.mktemp('mutation') / 'project'
  for folder in ('lwfedssl_jax', 'experiments', 'tests'):
    (root / folder).mkdir(parents=True)
  (root / 'setup.cfg').write_text('[tool:pytest]\n')
  (root / 'lwfedssl_jax' / '__init__.py').write_text('')
  (root / 'lwfedssl_jax' / 'sums.py').write_text('def add(a, b):\n  unused = 1 * a\n  return a + b\n')
  for name, text in TESTS.items():
    (root / 'tests' / name).write_text(text)
  return mutation.Trial(root, 60.0, str(root.parent / 'cache'), {})


def outcome(trial, old, new, *tests):
  return mutation.try_mutation(trial, mutations.Mutation('sums.py', 'a mistake', old, new, tests or ('test_right.py',)))


def test_a_mistake_that_the_tests_notice_is_killed(trial):
  found = outcome(trial, 'a + b', 'a - b')
  assert found.kind == mutation.KILLED and found.why.startswith('assert -1 == 5'), found
  assert (trial.root / 'lwfedssl_jax' / 'sums.py').read_text().endswith('return a + b\n')  # only the copy changed


def test_a_change_without_effect_survives(trial):
  assert outcome(trial, '1 * a', '2 * a').kind == mutation.SURVIVED


def test_tests_that_fail_without_the_mutation_are_refused(trial):
  found = outcome(trial, 'a + b', 'a - b', 'test_wrong.py')
  assert found.kind == mutation.REFUSED and mutation.FAILED in found.why


@pytest.mark.parametrize(
  ('tests', 'why'),
  [
    (('test_lost.py',), 'could not be imported'),
    (('test_lost.py', 'test_right.py'), 'could not be imported'),  # pytest's exit code is 1, as for a failure
    (('test_skipped.py',), 'every test was skipped'),
    (('test_right.py::test_gone',), 'exit code 4'),
  ],
)
def test_tests_that_do_not_run_notice_nothing(trial, tests, why):
  found = outcome(trial, 'a + b', 'a - b', *tests)
  assert found.kind == mutation.REFUSED
  assert mutation.DID_NOT_RUN in found.why and why in found.why


def test_a_mutation_that_cannot_be_imported_is_no_mistake_to_notice(trial):
  found = outcome(trial, 'return a + b', 'return a +')
  assert found.kind == mutation.DID_NOT_RUN and 'could not be imported' in found.why


def test_old_text_must_occur_once(trial):
  assert outcome(trial, 'a', 'b').kind == mutation.NOT_APPLIED
  assert outcome(trial, 'c + d', 'b').kind == mutation.NOT_APPLIED


def test_what_takes_too_long_is_neither(trial):
  assert mutation.run_tests(trial.root, ['test_slow.py'], 2.0, trial.cache).kind == mutation.TOO_SLOW


def test_without_pytest_nothing_is_killed(trial, monkeypatch):
  monkeypatch.setattr(mutation, 'PYTEST', (sys.executable, '-m', 'no_such_pytest'))
  found = outcome(trial._replace(unchanged={}), 'a + b', 'a - b')
  assert found.kind == mutation.REFUSED and mutation.DID_NOT_RUN in found.why and 'no_such_pytest' in found.why


def test_command_ends_with_1_unless_all_are_killed(trial, monkeypatch, capsys):
  monkeypatch.setattr(mutation, 'ROOT', trial.root)
  runs, run_tests = [], mutation.run_tests
  monkeypatch.setattr(mutation, 'run_tests', lambda *arguments: runs.append(1) or run_tests(*arguments))
  listed = [
    mutations.Mutation('sums.py', what, 'a + b', new, ('test_right.py',))
    for what, new in (('wrong sign', 'a - b'), ('swapped', 'b + a'), ('product', 'a * b'))
  ]

  def exit_code(only):
    with pytest.raises(SystemExit) as stopped:
      mutation.main([f'--only={only}'], listed)
    return int(stopped.value.code)

  assert exit_code('sign|product') == 0
  assert len(runs) == 3  # the unchanged library once for both
  assert exit_code('') == 1
  said = capsys.readouterr().out
  assert '2 of 3 killed' in said and 'SURVIVED: sums.py: swapped' in said
  assert exit_code('nonsense') == 2


def test_no_listed_mutation_names_what_does_not_exist(tmp_path):
  """Such a change fails by a NameError wherever it is executed, which says nothing of the tests."""
  for number, one in enumerate(mutations.MUTATIONS):
    source = (mutation.ROOT / mutation.PACKAGE / one.path).read_text(encoding='utf-8')
    (tmp_path / f'{number}.py').write_text(source.replace(one.old, one.new), encoding='utf-8')
  rules = ('--isolated', '--no-cache', '--select=F821,E9', '--output-format=concise')
  found = subprocess.run([sys.executable, '-m', 'ruff', 'check', *rules, tmp_path], capture_output=True, text=True)
  assert found.returncode == 0, found.stdout


def test_every_listed_mutation_applies_and_names_tests_that_exist():
  for one in mutations.MUTATIONS:
    source = (mutation.ROOT / mutation.PACKAGE / one.path).read_text(encoding='utf-8')
    assert source.count(one.old) == 1, one
    assert one.new != one.old
    for test in one.tests:
      file, _, name = test.partition('::')
      text = (mutation.ROOT / 'tests' / file).read_text(encoding='utf-8')
      assert re.search(rf'def {re.escape(name.partition("[")[0])}', text), test
  assert len({(one.path, one.what) for one in mutations.MUTATIONS}) == len(mutations.MUTATIONS)
