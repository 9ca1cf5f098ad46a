"""What the plugin adds to ``import timm``: fresh interpreters with and without it, in turn.

Rows, each the time of ``import timm`` in an interpreter of its own, in milliseconds:

* ``plugin``: as installed.
* ``TIMM_CONVMIXER_AUTOLOAD=0``: PyTorch loads the entry point, no model is registered.
* ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``: PyTorch does not look for entry points at all, as if nothing were installed.
* ``registration alone``: ``import timm_convmixer`` after ``import timm`` in the interpreter of the row before.

The first three differ by less than they spread on a busy machine; the last is the plugin's own work and hardly spreads.

    python benchmarks/import_time.py --repeats 20
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

SWITCHES = ('TIMM_CONVMIXER_AUTOLOAD', 'TORCH_DEVICE_BACKEND_AUTOLOAD')
PLUGIN = 'plugin'
OFF = tuple(f'{switch}=0' for switch in SWITCHES)
ALONE = 'registration alone'

CHILD = """
import json, sys, time
start = time.perf_counter()
import timm
imported = time.perf_counter()
registered = 'timm_convmixer.convmixer' in sys.modules
before = time.perf_counter()
import timm_convmixer
print(json.dumps([imported - start, time.perf_counter() - before, registered]))
"""


def measure(row: str) -> tuple:
    """Times of ``import timm`` and of the ``import timm_convmixer`` that follows, in ms, in a fresh interpreter."""
    env = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    if row != PLUGIN:
        env.update([row.split('=')])
    result = subprocess.run([sys.executable, '-c', CHILD], env=env, check=True, stdout=subprocess.PIPE, text=True)
    import_timm, import_ours, registered = json.loads(result.stdout)
    assert registered == (row == PLUGIN), f'{row}: the models are {"" if registered else "not "}registered'
    return 1000 * import_timm, 1000 * import_ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=20, help='interpreters for each row (default: %(default)s)')
    parser.add_argument('--results', type=Path, default=Path(__file__).parent / 'results' / 'import_time.json')
    args = parser.parse_args()

    rows = (PLUGIN, *OFF)
    times = {row: [] for row in (*rows, ALONE)}
    for row in rows:
        measure(row)  # compiles and caches
    for repeat in range(args.repeats):
        for row in rows[repeat % 3:] + rows[:repeat % 3]:
            import_timm, import_ours = measure(row)
            times[row].append(import_timm)
            if row == OFF[-1]:
                times[ALONE].append(import_ours)

    base = statistics.median(times[OFF[-1]])
    print(f'{"":34}{"median":>9}{"quartiles":>17}{"min":>9}{"added":>9}  ms, {args.repeats} interpreters each')
    for row, row_times in times.items():
        low, median, high = statistics.quantiles(row_times, n=4)
        added = median if row == ALONE else median - base
        print(f'{row:34}{median:9.1f}{f"{low:.1f}-{high:.1f}":>17}{min(row_times):9.1f}{added:9.1f}')

    machine = dict(
        python=platform.python_version(),
        cpus=os.cpu_count(),
        **{name: version(name) for name in ('timm', 'torch', 'timm-convmixer')},
    )
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(dict(machine=machine, milliseconds=times), indent=1) + '\n')


if __name__ == '__main__':
    main()
