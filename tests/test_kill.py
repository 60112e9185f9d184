"""A short version of the kill test; the long one is `python -m tests.tools.soak`."""

import random

import pytest

from tests.tools import soak


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
  soak.finish(soak.start(tmp_path / 'undisturbed'))
  moments = soak.kill_until_done(tmp_path / 'killed', 1, 4.0, random.Random(0))
  assert sum(moments.values()) == 1
  soak.compare(tmp_path / 'killed', tmp_path / 'undisturbed')


def test_the_comparison_notices_other_rows_and_leftovers(tmp_path):
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'summary.json').write_text('{"params_sha256": "1"}')
    (tmp_path / name / 'metrics.jsonl').write_text('{"round": 0, "seconds": 1}\n')
  soak.compare(tmp_path / 'a', tmp_path / 'b')
  (tmp_path / 'a' / 'metrics.jsonl.tmp').write_text('')
  with pytest.raises(SystemExit, match='half-written'):
    soak.compare(tmp_path / 'a', tmp_path / 'b')
  (tmp_path / 'a' / 'metrics.jsonl').write_text('{"round": 0, "seconds": 2}\n{"round": 0, "seconds": 1}\n')
  with pytest.raises(SystemExit, match='other rows'):
    soak.compare(tmp_path / 'a', tmp_path / 'b')
  (tmp_path / 'a' / 'summary.json').write_text('{"params_sha256": "2"}')
  with pytest.raises(SystemExit, match='other parameters'):
    soak.compare(tmp_path / 'a', tmp_path / 'b')
