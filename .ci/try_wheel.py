"""Tries the wheel as a stranger would: in a new virtual environment, in a folder that holds no checkout.

    python .ci/try_wheel.py

The folder has an `experiments` package of its own, which nothing may import. Every command has to end with exit code 0,
without a traceback, and leave the files that it announces. Needs what pip needs: its cache or a package index.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns('.*', 'build', 'dist', 'runs', 'shared', '*.egg-info', '__pycache__')
USERS_OWN = "raise SystemExit('this folder has an experiments package of its own, which nothing may import')\n"

# One stage and one round of a packaged preset: compiling takes most of the time.
TINY = (
  '--preset=quickstart --blocks_per_stage=4 --rounds_per_stage=1 --local_epochs=1 --calibration_epochs=1 '
  '--max_train_images=120 --num_clients=2 --batch_size=16'
)
# Command line -> files that it has to leave.
TRIALS = {
  f'lwfedssl-pretrain {TINY} --method=lw_fedssl --workdir=runs/single/lw_fedssl': [
    'runs/single/lw_fedssl/summary.json'
  ],
  f'lwfedssl-sweep {TINY} --methods=layerwise,end_to_end --output=runs/sweep': [
    'runs/sweep/layerwise-seed0/summary.json',
    'runs/sweep/end_to_end-seed0/summary.json',
  ],
  'lwfedssl-evaluate --workdir=runs/sweep --protocol=linear --label_fraction=0.5': [],
  'lwfedssl-resources --image_size=16 --convention=paper_v4 --format=json': [],
  'lwfedssl-report --workdirs=runs/single,runs/sweep --output=report': ['report/report.html', 'report/report.csv'],
  'lwfedssl-export --workdir=runs/single/lw_fedssl --output=encoder.safetensors': [
    'encoder.safetensors',
    'encoder.json',
  ],
  'python -m lwfedssl_jax.experiments.export --workdir=runs/single/lw_fedssl --output=again.safetensors': [
    'again.safetensors'
  ],
}


def build_wheel(folder: pathlib.Path) -> pathlib.Path:
  """Builds the wheel from a copy, so that a stale build/ has no part in it, and checks what it owns."""
  source = folder / 'source'
  shutil.copytree(ROOT, source, ignore=NOT_COPIED)
  command = [sys.executable, '-m', 'pip', 'wheel', '-qq', '--no-deps', f'--wheel-dir={folder}', str(source)]
  subprocess.run(command, check=True)
  (wheel,) = folder.glob('*.whl')
  owned = {name.split('/')[0] for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
  assert owned == {'lwfedssl_jax'}, f'{wheel.name}: expected lwfedssl_jax alone at the top, got {sorted(owned)}'
  return wheel


def install(python: pathlib.Path, requirement: str) -> None:
  """Installs into the new environment, quietly."""
  subprocess.run([python, '-m', 'pip', 'install', '-qq', requirement], check=True)


def check(command: str, folder: pathlib.Path, environment: dict[str, str], files: list[str]) -> None:
  """Runs a command line in a folder; exits with its output unless it ends well and leaves its files."""
  start = time.monotonic()
  done = subprocess.run(
    command.split(), cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
  )
  missing = [name for name in files if not (folder / name).is_file()]
  print(f'{time.monotonic() - start:6.1f} s  {command}', flush=True)
  if done.returncode or 'Traceback (most recent call last)' in done.stdout or missing:
    sys.exit(f'{done.stdout}\nexit code {done.returncode}, missing files: {missing or "none"}')
  if command.startswith('lwfedssl-') and '--help' not in command:
    json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Builds, installs and tries; prints the seconds of each step."""
  with tempfile.TemporaryDirectory() as name:
    start, base = time.monotonic(), pathlib.Path(name)
    wheel = build_wheel(base)
    venv.create(base / 'venv', with_pip=True)
    programs = base / 'venv' / 'bin'
    install(programs / 'python', str(wheel))
    print(f'{time.monotonic() - start:6.1f} s  {wheel.name}: built and installed', flush=True)

    folder = base / 'empty'
    (folder / 'experiments').mkdir(parents=True)
    for module in ('__init__', 'pretrain', 'command'):
      (folder / 'experiments' / f'{module}.py').write_text(USERS_OWN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    environment |= {'PATH': f'{programs}{os.pathsep}{os.environ["PATH"]}', 'XDG_CACHE_HOME': str(base / 'cache')}
    commands = sorted(program.name for program in programs.glob('lwfedssl-*'))
    assert len(commands) >= 7, f'expected the console scripts of setup.cfg, got {commands}'
    for command in commands:
      check(f'{command} --help', folder, environment, [])
    for command, files in TRIALS.items():
      check(command, folder, environment, files)
    install(programs / 'python', f'{wheel}[notebook]')
    shutil.copy(ROOT / 'docs' / 'notebook.ipynb', folder)
    check('jupyter execute notebook.ipynb', folder, environment, [])
    print(f'{time.monotonic() - start:6.1f} s  in all, Python {sys.version.split()[0]}: the wheel works')


if __name__ == '__main__':
  main()
