"""The configuration as Python sees it: names, resolved settings, and no jax."""

import dataclasses
import subprocess
import sys

import pytest

from lwfedssl_jax import config as configs

FIELDS = {field.name: field for group in configs.GROUPS.values() for field in dataclasses.fields(group)}


def test_a_resolved_setting_shares_no_name_with_the_field_it_resolves():
  resolved = {name for name, member in vars(configs.Config).items() if isinstance(member, property)}
  assert {'uses_calibration', 'uses_alignment', 'effective_num_clients', 'effective_clients_per_round'} <= resolved
  assert not resolved & FIELDS.keys()


@pytest.mark.parametrize(
  ('values', 'name', 'expected'),
  [
    ({'method': 'lw_fedssl'}, 'uses_calibration', True),
    ({'method': 'layerwise'}, 'uses_calibration', False),
    ({'method': 'layerwise', 'server_calibration': True}, 'uses_calibration', True),
    ({'method': 'lw_fedssl'}, 'uses_alignment', True),
    ({'method': 'lw_fedssl', 'representation_alignment': False}, 'uses_alignment', False),
    ({'method': 'centralized', 'num_clients': 7}, 'effective_num_clients', 1),
    ({'method': 'layerwise', 'num_clients': 7}, 'effective_num_clients', 7),
    ({'num_clients': 7, 'clients_per_round': 0}, 'effective_clients_per_round', 7),
    ({'num_clients': 7, 'clients_per_round': 3}, 'effective_clients_per_round', 3),
  ],
)
def test_settings_resolve(values, name, expected):
  assert getattr(configs.configure(**values), name) == expected


def test_the_configuration_loads_without_jax():
  code = (
    'import sys, lwfedssl_jax; lwfedssl_jax.configure(); '
    'sys.exit(bool({"jax", "flax", "numpy", "tensorflow_datasets"} & sys.modules.keys()))'
  )
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
