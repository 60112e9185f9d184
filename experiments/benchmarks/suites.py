"""Runs the suites of experiments.benchmark with interleaved timing and prints their tables."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax

from lwfedssl_jax import tables
from lwfedssl_jax.config import Config
from lwfedssl_jax.errors import MeasurementError
from lwfedssl_jax.resources import collectives, machine

from . import cases, scaling, timing
from .cases import Case


def _result(case: Case, seconds: list[float], reference: list[float], rate: float) -> dict[str, Any]:
  median = statistics.median(seconds)
  return {
    'case': case.name,
    'median_seconds': median,
    'fastest_seconds': min(seconds),
    'slowest_seconds': max(seconds),
    'ratio_to_end_to_end': statistics.median(mine / other for mine, other in zip(seconds, reference)),
    'images_per_second': case.images / median,
    'share_of_matrix_product_rate': case.flop_count / median / rate,
    'compile_seconds': case.compile_seconds,
    'peak_bytes': case.peak_bytes,
  }


def check_shares(results: Sequence[dict[str, Any]]) -> None:
  """Raises MeasurementError if a case exceeds the rate of the machine's matrix products.

  Its program then does not execute the counted work: the compiler has moved a part out of the timed loop.
  """
  for result in results:
    share = result['share_of_matrix_product_rate']
    if share > 1:
      raise MeasurementError(
        f'{result["case"]}: {100 * share:.0f} % of the rate of matrix products is impossible; the measurement is wrong'
      )


def _row(result: dict[str, Any]) -> list[str]:
  def known(value, text):
    return '-' if value is None else text.format(value)

  return [
    result['case'],
    f'{result["median_seconds"]:.3f}',
    f'{result["fastest_seconds"]:.3f} to {result["slowest_seconds"]:.3f}',
    f'{result["ratio_to_end_to_end"]:.3f}',
    f'{result["images_per_second"]:.0f}',
    f'{100 * result["share_of_matrix_product_rate"]:.0f} %',
    known(result['compile_seconds'], '{:.1f}'),
    known(result['peak_bytes'] and result['peak_bytes'] / 1e6, '{:.0f}'),
  ]


def _scaled_rows(made: Sequence[scaling.Scaled], seconds: Sequence[list[float]]) -> list[dict[str, Any]]:
  return [
    {
      'case': case.name,
      'images_per_second': case.images / statistics.median(measured),
      'rate_to_first': statistics.median(
        (case.images / mine) / (made[0].images / first) for first, mine in zip(seconds[0], measured)
      ),
      'peak_bytes_without_images': case.peak_bytes - case.image_bytes,
    }
    for case, measured in zip(made, seconds)
  ]


def run_clients(config: Config, repeats: int) -> list[dict[str, Any]]:
  """Times rounds with growing numbers of clients; prints a table and returns its rows."""
  made = list(scaling.client_cases(config))
  timing.time_once(made)
  results = _scaled_rows(made, timing.time_interleaved(made, repeats))
  print(
    tables.markdown(
      [
        ['clients', 'images/s', 'of the first', 'peak MB without images'],
        *(
          [
            row['case'],
            f'{row["images_per_second"]:.0f}',
            f'{row["rate_to_first"]:.2f}',
            f'{row["peak_bytes_without_images"] / 1e6:.2f}',
          ]
          for row in results
        ),
      ]
    )
  )
  return results


def run_devices(config: Config, repeats: int) -> list[dict[str, Any]]:
  """Times a round on growing numbers of devices; compares after the first round, as later ones amplify rounding."""
  made = list(scaling.device_cases(config))
  timing.time_once(made)
  differences = scaling.differences(made)
  results = _scaled_rows(made, timing.time_interleaved(made, repeats))
  for case, row, difference in zip(made, results, differences, strict=True):
    row['difference_to_one_device'] = difference
    row['active_bytes'], row['bytes_per_round'] = case.active_bytes, collectives.bytes_per_round(case.traffic)
    row['bytes_per_calibration_step'] = sum(op.num_bytes for op in case.traffic if op.in_loop)
  shown = ('active_bytes', 'bytes_per_round', 'bytes_per_calibration_step')
  print(
    tables.markdown(
      [
        ['', 'images/s', *(name.replace('_', ' ') for name in shown), 'difference'],
        *(
          [
            row['case'],
            f'{row["images_per_second"]:.0f}',
            *(str(row[name]) for name in shown),
            f'{row["difference_to_one_device"]:.1e}',
          ]
          for row in results
        ),
      ]
    )
  )
  print("difference: l2 distance of the parameters to one device's after a round, relative to the distance they moved")
  return results


def run_cases(config: Config, suite: str, repeats: int, images_per_client: int, all_stages: bool) -> dict[str, Any]:
  """Times steps or rounds of every method, interleaved; prints a table and returns the figures."""
  made = cases.make_cases(config, suite, images_per_client, all_stages)
  rate = machine.matrix_product_rate()
  timing.time_once(made)
  seconds = [
    [taken / case.steps for taken in measured] for case, measured in zip(made, timing.time_interleaved(made, repeats))
  ]
  rate = max(rate, machine.matrix_product_rate())
  results = [_result(case, measured, seconds[0], rate) for case, measured in zip(made, seconds)]
  check_shares(results)
  print(
    tables.markdown(
      [
        [
          suite,
          'median s',
          'fastest to slowest',
          'of end to end',
          'images/s',
          'of product rate',
          'compile s',
          'peak MB',
        ],
        *map(_row, results),
      ]
    )
  )
  layerwise = [result['median_seconds'] for result in results if result['case'].startswith('layerwise')]
  print(f'{jax.devices()[0].device_kind}, matrix products {rate / 1e9:.0f} GFLOP/s; median of {repeats} repeats')
  return {
    'matrix_product_flops_per_second': rate,
    'mean_layerwise_to_end_to_end': statistics.mean(layerwise) / results[0]['median_seconds'],
    'cases': results,
  }
