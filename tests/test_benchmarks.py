"""The benchmark scripts on tiny models: they run, write their results, and plot.py draws them. No timings asserted."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

import pytest
from filelock import FileLock

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'


def run_script(name: str, *args: Any, status: int = 0) -> subprocess.CompletedProcess:
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(BENCHMARKS.parent), os.environ.get('PYTHONPATH', '')]),
    }
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, args)], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr[-3000:]
    return result


@pytest.fixture(scope='module')
def results(tmp_path_factory) -> Path:
    """What the scripts write with --quick, made tiny; of kernels.py, whole models, one contender of which hangs."""
    base = tmp_path_factory.getbasetemp()
    # Of the workers of one run, the first makes them for all.
    folder = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base) / 'benchmarks'
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            unfinished = tmp_path_factory.mktemp('benchmarks')
            write_tiny_results(unfinished)
            unfinished.rename(folder)
    return folder


def write_tiny_results(folder: Path) -> None:
    tiny = ('--quick', '--rounds', 2, '--models', 'test_convmixer')
    run_script(
        'throughput.py', *tiny, '--image-sizes', 32, '--batch-sizes', 2, '--precisions', 'float32', 'bfloat16',
        '--routes', 'eager', 'channels_last', 'reparam', 'graphs', '--shared', '--output', folder / 'throughput.json')
    run_script('image_size.py', *tiny, '--sizes', 32, 64, '--routes', 'eager', '--output', folder / 'sizes.json')
    run_script(
        'training.py', *tiny, '--image-size', 32, '--batch-sizes', 64, '--modes', 'timm', 'timm+checkpointing', 'ours',
        'ours+checkpointing', '--output', folder / 'training.json')
    run_script('digits_training.py', '--quick', '--epochs', 1, '--output', folder / 'digits_training.json')
    run_script('kernels.py', '--dry-run', '--stages', 'models', '--out', folder, status=1)


def load(results: Path, name: str) -> Dict[str, Any]:
    report = json.loads((results / name).read_text())
    assert report['schema'] == 1 and report['device'] == 'cpu' and report['settings']['quick']
    assert report['date'].endswith('+00:00') and report['command'].startswith('python ')
    assert report['machine'].keys() >= {'cpu', 'cores', 'threads', 'isa', 'memory_mb', 'os', 'gpu'}
    assert report['machine']['threads'] == 1
    assert report['versions'].keys() >= {'python', 'torch', 'timm', 'triton', 'onnxruntime', 'openvino', 'commit'}
    assert not list(results.glob('.*')), 'a temporary file is left'
    return report


def check_samples(row: Dict[str, Any]) -> None:
    seconds, samples = row['seconds'], row['samples']
    assert len(samples) == seconds['count'] == 2
    assert seconds['min'] == min(samples) > 0
    assert seconds['min'] <= seconds['q1'] <= seconds['median'] <= seconds['q3'] <= max(samples)


def test_throughput(results):
    group, = load(results, 'throughput.json')['groups']
    assert (group['model'], group['batch_size'], group['image_size']) == ('test_convmixer', 2, 32)
    rows = {(row['implementation'], row['route'], row['precision']): row for row in group['rows']}
    routes = {('ours', 'eager'), ('ours', 'channels_last'), ('ours', 'reparam'), ('timm', 'eager'),
              ('timm', 'channels_last'), ('paper', 'eager'), ('paper', 'channels_last')}
    assert set(rows) == {(*route, precision) for route in routes for precision in ('float32', 'bfloat16')}
    for (_, _, precision), row in rows.items():
        check_samples(row)
        assert row['error'] <= (1e-4 if precision == 'float32' else 0.2)
        assert row['prepare_seconds'] > 0 and row['first_seconds'] > 0
        assert row['images_per_second'] == pytest.approx(2 / row['seconds']['median'])
        assert row['of_limit'] == pytest.approx(group['ceilings'][precision]['seconds'] / row['seconds']['median'])
    assert rows['timm', 'eager', 'float32']['speedup'] == dict(median=1, q1=1, q3=1)
    assert {row['route'] for row in group['skipped']} == {'graphs'}
    assert all('GPU' in row['reason'] for row in group['skipped'])
    assert group['refused'] == []
    for ceiling in group['ceilings'].values():
        parts = [ceiling[part][ceiling['fastest'][part]]['median'] for part in ('pointwise', 'depthwise')]
        assert ceiling['seconds'] == pytest.approx(sum(parts))
    assert group['create_seconds'].keys() == {'ours', 'timm', 'paper'}


def test_image_size(results):
    report = load(results, 'sizes.json')
    rows = {(row['implementation'], row['route'], row['image_size']): row for row in report['rows']}
    ways = (('timm', 'eager'), ('ours', 'eager'))
    assert set(rows) == {(*way, size) for way in ways for size in (32, 64)}
    for row in rows.values():
        check_samples(row)
    for way in ways:
        small, large = (rows[(*way, size)]['memory']['allocated_mb'] for size in (32, 64))
        assert 2 < large / small < 5
    assert [(row['implementation'], row['route']) for row in report['growth']] == list(ways)


def test_training(results):
    group, = load(results, 'training.json')['groups']
    rows = {row['mode']: row for row in group['rows']}
    assert list(rows) == ['timm', 'timm+checkpointing', 'ours', 'ours+checkpointing']
    assert group['refused'] == []
    for row in rows.values():
        check_samples(row)
        assert row['loss_error'] < 1e-5
        assert row['memory']['allocated_mb'] > 0
    assert rows['timm+checkpointing']['batches_tracked'] == 2
    assert rows['timm+checkpointing']['statistics_error'] > 1e-2
    for mode in ('ours', 'ours+checkpointing'):
        assert rows[mode]['batches_tracked'] == 1 and rows[mode]['statistics_error'] < 1e-5
    allocated = {mode: row['memory']['allocated_mb'] for mode, row in rows.items()}
    assert allocated['ours+checkpointing'] < allocated['ours'] < allocated['timm']


WAYS = ['ours, eager', 'ours, eager, as created', 'timm, eager', 'timm, eager, channels_last']


def check_kernels(report: Dict[str, Any]) -> None:
    """Every contender was timed, and the hanging one was stopped."""
    rows = [row for row in report['rows'] if row['stage'] == 'models' and 'ms' in row]
    assert sorted(row['contender'] for row in rows) == WAYS
    for row in rows:
        assert row['ms_quartiles'][0] <= row['ms'] <= row['ms_quartiles'][1] and 0 <= row['error'] < 0.1
        assert row['images_per_second'] == pytest.approx(1e3 * row['batch'] / row['ms'])
    assert report['stages'][-1]['stage'].startswith('models') and 'its limit' in report['stages'][-1]['outcome']
    assert report['left_out'] == []


def test_kernels(results):
    check_kernels(load(results, 'kernels.json'))


@pytest.mark.slow
def test_kernels_dry_run(tmp_path):
    """Wrong, crashing and hanging contenders are reported; all others have results."""
    run_script('kernels.py', '--dry-run', '--out', tmp_path, status=1)
    report = json.loads((tmp_path / 'kernels.json').read_text())
    check_kernels(report)
    assert [stage['outcome'] for stage in report['stages'][:2]] == ['done', 'exit status -6']
    rows = [row for row in report['rows'] if row['stage'] == 'operators']
    timed = {row['operation']: set() for row in rows if 'operation' in row}
    for row in rows:
        if 'ms' in row:
            timed[row['operation']].add(row['contender'])
    assert len(timed) == 10
    assert all({'ours', 'PyTorch'} <= contenders for contenders in timed.values())
    failed = {row['contender']: row['failed'] for row in rows if 'failed' in row}
    assert list(failed) == ['a contender that is wrong'] and 'relative error 1' in failed['a contender that is wrong']
    assert {path.name for path in tmp_path.iterdir()} == {'kernels.json', 'kernels_log.txt'}


def test_kernels_keep_what_came_before_a_crash_or_a_hang(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    run_stage = importlib.import_module('kernels').run_stage
    for code, outcome in (
            ('', 'done'),
            ('os.abort()', 'exit status -6'),
            ('raise SystemExit(3)', 'exit status 3'),
            ('print("@row {", end="", flush=True); time.sleep(60)', 'its limit'),
    ):
        rows = []
        script = f'import os, time\nprint("@row {{\\"ms\\": 1}}", flush=True)\nprint("more")\n{code}'
        log = tmp_path / 'log.txt'
        assert outcome in run_stage([sys.executable, '-c', script], 30, log, rows.append, silence=1.)
        assert rows == [{'ms': 1}]
    assert log.read_text().count('more') >= 3


def test_two_counts_of_memory_agree(tmp_path, monkeypatch):
    """Live bytes by the profiler equal the rise of resident memory, for a step of 256 MB."""
    script = tmp_path / 'weigh.py'
    script.write_text(
        f'import json, sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n'
        'import torch\nfrom harness import measure_peak_memory\n'
        'def step():\n    a = torch.ones(32, 2 ** 20)\n    del a\n    b = torch.ones(32, 2 ** 20)\n    c = b + 1\n'
        'step()\nprint(json.dumps(measure_peak_memory(step, "cpu")))\n')
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory = importlib.import_module('harness').run_worker(str(script), {})
    expected = 2 * 32 * 2 ** 20 * 4 / 1e6
    assert memory['allocated_mb'] == pytest.approx(expected, rel=0.01)
    if memory['resident_mb'] is not None:
        assert memory['resident_mb'] == pytest.approx(expected, rel=0.1)


ISOLATED_SCRIPT = '''
import os
import torch
from harness import run_rounds
from timm_convmixer.timing import Isolated


def make(value):
    if value < 0:
        raise ValueError(f'value={value}')
    return lambda: torch.tensor([value, os.getppid()]) if value else os._exit(3)


def attempt(function, *args):
    try:
        function(*args)
    except Exception as error:
        print(type(error).__name__, error)


if __name__ == '__main__':
    run = Isolated(make, 7)
    assert run.make_seconds > 0
    assert run().tolist() == [7, os.getpid()]
    samples, = run_rounds({'run': run}, rounds=2).values()
    assert len(samples) == 2 and min(samples) > 0
    run.close()
    attempt(Isolated, make, -1)
    attempt(Isolated(make, 0))
'''


def test_interpreters_of_their_own(tmp_path):
    """Results, errors and crashes of the other interpreter are reported."""
    script = tmp_path / 'isolated.py'
    script.write_text(f'import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n' + ISOLATED_SCRIPT)
    assert run_script(script).stdout.splitlines() == [
        'ValueError value=-1', 'RuntimeError The interpreter of a candidate ended with 3.']

    output = tmp_path / 'results.json'
    run_script(
        'throughput.py', '--models', 'test_convmixer', '--image-sizes', 32, '--batch-sizes', 2, '--rounds', 2,
        '--min-rounds', 2, '--implementations', 'ours', 'timm', '--routes', 'eager', 'reparam', 'graphs',
        '--output', output)
    group, = json.loads(output.read_text())['groups']
    ways = [('ours', 'eager'), ('ours', 'reparam'), ('timm', 'eager')]
    assert [(row['implementation'], row['route']) for row in group['rows']] == ways
    assert all(row['error'] < 1e-5 and row['prepare_seconds'] > 0 for row in group['rows'])
    assert {row['route'] for row in group['skipped']} == {'graphs'}


def test_wrong_outputs_are_not_timed(tmp_path):
    """A model with wrong outputs is not timed, and the run ends with status 1."""
    script = tmp_path / 'wrong.py'
    script.write_text(
        f'import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n'
        'import models, throughput\n'
        'def create(implementation, name):\n'
        '    model = models.create(implementation, name)\n'
        '    if implementation == "ours":\n'
        '        model.blocks[3].register_forward_hook(lambda module, args, output: output * 1.001)\n'
        '    return model\n'
        'throughput.create = create\nsys.exit(throughput.main())\n')
    output = tmp_path / 'results.json'
    run_script(
        script, '--models', 'test_convmixer', '--image-sizes', 32, '--batch-sizes', 1, '--rounds', 1, '--min-rounds', 1,
        '--routes', 'eager', '--shared', '--output', output, status=1)
    group, = json.loads(output.read_text())['groups']
    assert [row['implementation'] for row in group['refused']] == ['ours']
    assert [row['implementation'] for row in group['rows']] == ['timm', 'paper']


def test_plots(results, tmp_path):
    pytest.importorskip('matplotlib')
    # The accuracy picture needs a published accuracy: rename the tiny model.
    folder = tmp_path / 'results'
    folder.mkdir()
    for path in results.glob('*.json'):
        text = path.read_text().replace('"image_size": 32', '"image_size": 224')
        text = text.replace('"test_convmixer"', '"convmixer_768_32"')
        (folder / path.name).write_text(text)
    out = run_script('plot.py', '--quick', '--results', folder, '--output', tmp_path / 'plots').stdout
    drawn = sorted(path.name for path in (tmp_path / 'plots').iterdir())
    names = ('digits_training', 'image_size', 'kernels', 'routes', 'throughput', 'training')
    assert drawn == [f'{name}_cpu.svg' for name in names], out
    for name in drawn:
        assert (tmp_path / 'plots' / name).read_text().count('<path') > 20


def test_plots_without_results(tmp_path):
    pytest.importorskip('matplotlib')
    out = run_script('plot.py', '--results', tmp_path, '--output', tmp_path / 'plots', status=1).stdout
    names = ['throughput', 'routes', 'image_size', 'training', 'kernels', 'digits_training']
    assert [line.split(':')[0] for line in out.splitlines()] == names
    assert 'no results of training.py' in out


def test_plot_of_the_readme(tmp_path):
    """Draws the committed results, in a folder with other files."""
    pytest.importorskip('matplotlib')
    results = BENCHMARKS / 'results' / 'cifar'
    args = '--results', results, '--pictures', 'training', '--format', 'png', '--output', tmp_path
    out = run_script('plot.py', *args).stdout
    assert [path.name for path in tmp_path.iterdir()] == ['training_cpu.png'], out
    readme = (BENCHMARKS.parent / 'README.md').read_text()
    shown = [BENCHMARKS.parent / path for path in re.findall(r'\]\((benchmarks/[^)]+\.png)\)', readme)]
    assert BENCHMARKS / 'results' / 'cifar' / 'training_cpu.png' in shown
    for path in shown:
        assert path.read_bytes().startswith(b'\x89PNG') and path.stat().st_size < 100_000, path


@pytest.mark.parametrize('script, args, message', [
    ('throughput', ['--models', 'convmixer_7'], "timm knows no model 'convmixer_7'"),
    ('throughput', ['--routes', 'compiled+openvino'], "route='compiled+openvino': give eager, or steps of reparam"),
    ('training', ['--models', 'resnet50'], "'resnet50' is not a ConvMixer"),
    ('training', ['--modes', 'ours+reparam'], "'ours+reparam' must be ours or timm"),
    ('training', ['--largest-batch'], 'argument --largest-batch: only a GPU'),
])
def test_arguments_are_checked(script, args, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, 'argv', [f'{script}.py', *args])
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(script).main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('limit,expected', [
    (0, None), (1, 1), (15, 15), (16, 16), (17, 16), (31, 30), (32, 32), (100, 96), (1000, 960)])
def test_largest_batch(monkeypatch, limit, expected):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tried = []

    def fits(batch_size):
        tried.append(batch_size)
        return batch_size <= limit

    assert importlib.import_module('training').largest_fitting(fits) == expected
    assert len(tried) <= 17
