"""examples/flower/compose.yaml, read but not run: commands are valid, and every file that they name is mounted."""

import pathlib
import shlex

import pytest
import yaml

from experiments import command, node, server

FOLDER = pathlib.Path(__file__).parents[2] / 'examples' / 'flower'
COMPOSE = yaml.safe_load((FOLDER / 'compose.yaml').read_text())
PROGRAMS = {'lwfedssl-server': server, 'lwfedssl-node': node}
PATHS = ('ca_certificate', 'certificate', 'private_key', 'node_keys', 'workdir', 'dataset', 'images', 'state_dir')


def parse(service):
  """Returns a service's program and the values of its flags."""
  program, *arguments = shlex.split(COMPOSE['services'][service]['command'])
  described = PROGRAMS[program].COMMAND
  try:
    command.parse(described, arguments)
    return program, {name: described.flags[name].value for name in described.flags}
  finally:
    described.flags.unparse_flags()


def mounts(service):
  """Returns {path in the container: (path outside or volume, whether it can be written)}."""
  parts = (volume.split(':') for volume in COMPOSE['services'][service]['volumes'])
  return {inside: (outside, mode != ['ro']) for outside, inside, *mode in parts}


@pytest.mark.parametrize('service', COMPOSE['services'])
def test_a_service_s_flags_are_known_and_their_paths_are_mounted(service):
  program, flags = parse(service)
  found = mounts(service)
  assert COMPOSE['services'][service]['read_only'] and COMPOSE['services'][service]['cap_drop'] == ['ALL']
  for name in set(PATHS) & set(flags):
    path = flags[name].removeprefix('folder:')
    places = [place for place in found if pathlib.PurePath(path).is_relative_to(place)]
    assert not path or len(places) == 1, (name, path)
    if path:
      assert found[places[0]][1] == (name in ('workdir', 'state_dir')), name
  named = {outside for outside, _ in found.values() if not outside.startswith('./')}
  assert named <= set(COMPOSE['volumes'])
  assert program == ('lwfedssl-server' if service == 'server' else 'lwfedssl-node')


def test_each_node_has_a_number_and_a_key_of_its_own_and_reaches_the_server():
  _, flags = parse('server')
  nodes = [service for service in COMPOSE['services'] if service != 'server']
  assert sorted(parse(service)[1]['client_id'] for service in nodes) == list(range(flags['num_clients']))
  assert {parse(service)[1]['superlink'] for service in nodes} == {f'server:{flags["port"]}'}
  keys = [mounts(service)['/node.key'][0] for service in nodes]
  assert sorted(keys) == [f'./secrets/{service}.key' for service in sorted(nodes)]
  script = (FOLDER / 'certificates.sh').read_text()
  made = ('ca.crt', 'server.pem', 'server.key', 'keys/$node.pub', '$node.key')
  assert all(name in script for name in made)
