"""One report of four runs, made once."""

import pathlib

import pytest
import report_runs

from lwfedssl_jax.report import files


@pytest.fixture(scope='session')
def report(tmp_path_factory):
  """Returns (folder of the report, what write_report returned, the page): two seeds of one method, one of others."""
  root = tmp_path_factory.mktemp('report')
  for name, values in {
    'a0': {'method': 'layerwise', 'accuracy': 0.5},
    'a1': {'method': 'layerwise', 'accuracy': 0.7, 'seed': 1},
    'b0': {'method': 'layerwise', 'server_calibration': True, 'accuracy': 0.8},
    'c0': {'method': 'end_to_end', 'accuracy': 0.75},
  }.items():
    report_runs.write_run(root / 'runs' / name, **values)
    report_runs.add_embeddings(root / 'runs' / name)
    report_runs.add_evaluation(root / 'runs' / name, values['accuracy'])
  report_runs.write_run(root / 'runs' / 'd0', method='prog_fedssl', finished=False)
  with pytest.MonkeyPatch.context() as patch:
    report_runs.fake_costs(patch, {'layerwise': 40, 'end_to_end': 90, 'prog_fedssl': 90})
    result = files.write_report([str(root / 'runs')], str(root / 'out <&> "x"'), 'python -m experiments.report')
  folder = pathlib.Path(result['html']).parent
  return folder, result, (folder / 'report.html').read_text(encoding='utf-8')
