"""``python -m timm_convmixer measure``: what is checked, timed, left out and printed. No times asserted."""
import dataclasses
import json
import multiprocessing
import os
import select
import signal
import subprocess
import sys

import pytest
import timm
import torch

from support import assert_close, child_env, restore_signals
from timm_convmixer import ConvMixer, measure
from timm_convmixer import __main__ as command_line
from timm_convmixer.comparison import create_timms
from timm_convmixer.kernels import set_fused, set_gpu_kernels, use_fused, use_gpu_kernels
from timm_convmixer.measure import Task, Way, find_ways, measure_ways
from timm_convmixer.timing import Isolated, Rounds, load_warning

TASK = Task('test_convmixer', 'cpu', 'float32', 2, 32)
WAYS = [way for way in find_ways(TASK) if not way.compiles]  # a C++ compiler takes its time: tested by itself
BASELINE = WAYS[0]
OURS = next(way for way in WAYS if way.name == 'ours, as created')


def change(name: str, **changes) -> Way:
    return dataclasses.replace(OURS, name=name, **changes)


def count_rounds(rounds: int) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    patch.setattr(measure, '_MAX_ROUNDS', rounds)
    return patch


@pytest.fixture(scope='module')
def report():
    patch = count_rounds(2)
    yield measure_ways(TASK, 600, ways=WAYS)
    patch.undo()


def rows_by_way(report):
    return {row['way']: row for row in report['rows']}


def test_every_way_is_checked_and_timed(report):
    assert list(rows_by_way(report)) == [way.name for way in WAYS]
    for row, way in zip(report['rows'], WAYS):
        if row['outcome'] == 'left out':
            assert 'not installed' in row['reason'] and row['images_per_second'] is row['speedup'] is None
            continue
        assert (row['outcome'], row['reason']) == ('timed', '')
        assert row['error'] < 1e-4
        assert len(row['samples']) == row['seconds']['count'] == 2 and min(row['samples']) > 0
        speed = row['images_per_second']
        assert speed['median'] == pytest.approx(2 / row['seconds']['median'])
        assert 0 < speed['q1'] <= speed['median'] <= speed['q3']
        assert row['speedup']['q1'] <= row['speedup']['median'] <= row['speedup']['q3']
        assert row['code'] == way.code
    assert report['rows'][0]['speedup'] == dict(median=1, q1=1, q3=1)
    timed = [row for row in report['rows'] if row['outcome'] == 'timed']
    assert len(timed) >= 5
    assert report['fastest'] == max(timed, key=lambda row: row['images_per_second']['median'])['way']
    assert report['fastest'] not in report['as_fast'] and set(report['as_fast']) <= {row['way'] for row in timed}
    assert not multiprocessing.active_children()


def test_json(report, capsys, monkeypatch):
    monkeypatch.setattr(measure, 'measure_ways', lambda *args: report)
    assert command_line.main(['measure', 'test_convmixer', '--json']) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(report))
    assert printed['schema'] == 1 and not printed['interrupted'] and printed['seconds'] > 0
    assert {name: printed[name] for name in ('model', 'device', 'dtype', 'batch_size', 'image_size')} == dict(
        model='test_convmixer', device='cpu', dtype='float32', batch_size=2, image_size=32)
    assert printed['environment']['torch'] == torch.__version__
    for row in printed['rows']:
        assert row.keys() == {
            'way', 'outcome', 'reason', 'error', 'samples', 'seconds', 'images_per_second', 'speedup', 'code', 'flags'}


def run_code(code: str) -> torch.Tensor:
    torch.manual_seed(0)
    names = dict(images=torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    exec(code, names)
    return names['logits']


def plain_logits() -> torch.Tensor:
    return run_code("import timm, torch\nmodel = timm.create_model('test_convmixer').eval()\n" + OURS.call)


@pytest.mark.filterwarnings('ignore:.*:DeprecationWarning')  # of timm's ONNX export
def test_table_ends_with_code_that_runs(report, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, 'measure_ways', lambda *args: report)
    assert command_line.main(['measure', 'test_convmixer']) == 0
    out = capsys.readouterr().out
    table, _, code = out.partition('In Python, for images (B, C, H, W) and with your weights:\n\n')
    for row in report['rows']:
        line, = [line for line in table.splitlines() if line.startswith(f'{row["way"]}  ')]
        assert (line.endswith('  fastest')) == (row['way'] == report['fastest'])
        assert row['reason'] in line
    assert code == rows_by_way(report)[report['fastest']]['code']
    monkeypatch.chdir(tmp_path)
    assert_close(run_code(code), plain_logits())


GPU_WAYS = [
    dataclasses.replace(way, name=f'GPU: {way.name}') for way in find_ways(dataclasses.replace(TASK, device='cuda'))]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('way', [*find_ways(TASK), *GPU_WAYS], ids=lambda way: way.name)
def test_code_of_each_way(way, monkeypatch, tmp_path):
    """The lines run as they are, those for a GPU on the CPU, and compute what the plain model does."""
    for package in way.packages:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, 'compile', lambda model: model)
    expected, fused, gpu_kernels = plain_logits(), use_fused(), use_gpu_kernels()
    try:
        logits = run_code(way.code.replace("'cuda'", "'cpu'"))
        assert 'kernels on' not in way.name or use_gpu_kernels()
        assert 'kernels off' not in way.name or not use_fused()
    finally:
        set_fused(fused)
        set_gpu_kernels(gpu_kernels)
    assert_close(logits, expected)


@pytest.mark.parametrize('device,dtype', [('cpu', 'bfloat16'), ('cuda', 'float32'), ('cuda:1', 'float16')])
def test_code_moves_model_and_images(device, dtype):
    ways = find_ways(Task('convmixer_768_32', device, dtype, 2, 224))
    for way in ways:
        if 'openvino' in way.packages:
            assert "'INFERENCE_PRECISION_HINT': 'bf16'" in way.code
        elif 'onnxruntime' in way.packages:
            assert 'float32' in way.left_out
        else:
            for name in ('model', 'images'):
                assert (f'{name} = {name}.to({device!r}' in way.code) == (device != 'cpu')
                assert (f'torch.{dtype}' in way.code) == (dtype != 'float32')
    timms = [way for way in ways if way.name.startswith('timm')]
    assert len(timms) == 2
    assert all('dim=768, depth=32, kernel_size=7, patch_size=7' in way.code for way in timms)
    assert all('act_layer=torch.nn.ReLU' in way.code for way in timms)


@pytest.mark.parametrize('name', timm.list_models(module='convmixer'))
def test_timms_class_computes_every_variant(name):
    """Also one whose BatchNorms have an epsilon that timm's class has no argument for."""
    timms, ours = (
        next(way for way in find_ways(Task(name, 'cpu', 'float32', 1, 32)) if way.name == f'{owner}, as created')
        for owner in ('timm', 'ours'))
    models = []
    for way in (timms, ours):
        names = {}
        with torch.device('meta'):
            exec(way.setup, names)
        models.append(names['model'])
    assert type(models[0]) is timm.models.convmixer.ConvMixer and type(models[1]) is ConvMixer
    norms = [[module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)] for model in models]
    assert [norm.eps for norm in norms[0]] == [norm.eps for norm in norms[1]]
    assert [norm.eps for norm in create_timms(name).modules() if isinstance(norm, torch.nn.BatchNorm2d)] == [
        norm.eps for norm in norms[1]]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]


def test_what_goes_wrong_is_a_row(capfd):
    """Wrong, failing, crashing and missing ways are named and not timed, and the others are."""
    patch = count_rounds(3)
    report = measure_ways(TASK, 600, ways=[
        BASELINE,
        change('wrong', steps='model.head.bias.data += 1\n'),
        change('not a number', steps='model.head.bias.data[0] = torch.nan\n'),
        change('no class', steps='class Local(Exception):\n    pass\nraise Local("said so")\n'),
        change('exits', steps='import os\nprint("unheard")\nos._exit(3)\n'),
        change('exits later', steps='import os\nleft = 2\n', call=OURS.call + 'left -= 1\nif left < 0: os._exit(4)\n'),
        change('missing', packages=('no_such_package',)),
        change('unable', left_out='in float32 alone'),
        change('no kernels', needs_kernels=True),
        OURS,
    ])
    patch.undo()
    found = {way: (row['outcome'], row['reason']) for way, row in rows_by_way(report).items()}
    assert found[BASELINE.name] == found[OURS.name] == ('timed', '')
    assert found['wrong'][0] == found['not a number'][0] == 'wrong'
    assert found['no class'] == ('failed', 'RuntimeError: Local: said so')
    assert found['exits'] == ('failed', 'RuntimeError: The interpreter of a candidate ended with 3.')
    assert found['exits later'] == ('failed', 'RuntimeError: The interpreter of a candidate ended with 4.')
    assert found['missing'] == ('left out', 'no_such_package is not installed')
    assert found['unable'] == ('left out', 'in float32 alone')
    assert found['no kernels'][0] == 'failed' and 'too small' in found['no kernels'][1]
    for row in report['rows']:
        assert (row['seconds'] is not None) == (row['outcome'] == 'timed')
    json.dumps(report, allow_nan=False)
    assert capfd.readouterr() == ('', '')
    assert not multiprocessing.active_children()


def test_without_time_or_a_baseline(monkeypatch, capsys):
    """The baseline is timed whatever it takes. Where it cannot run, the others have no speedup."""
    monkeypatch.setattr(measure, '_MAX_ROUNDS', 1)
    report = measure_ways(TASK, 1e-9, ways=[BASELINE, OURS])
    assert [row['outcome'] for row in report['rows']] == ['timed', 'left out']
    assert '--seconds' in report['rows'][1]['reason']
    assert report['fastest'] is None and report['as_fast'] == []  # nothing to compare it with
    monkeypatch.setattr(measure, 'find_ways', lambda task: [change('broken', steps='raise ValueError\n'), OURS])
    assert command_line.main(['measure', 'test_convmixer', '--batch-size', '2']) == 1
    out, err = capsys.readouterr()
    assert 'failed: ValueError' in out and 'Fastest' not in out
    assert err.splitlines()[-1] == 'error: fewer than two ways could be timed: nothing to compare'


def test_interrupted_before_anything_was_measured(monkeypatch, capsys):
    def interrupt(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure._Race, 'check', interrupt)
    monkeypatch.setattr(measure, 'find_ways', lambda task: [BASELINE, OURS])
    assert command_line.main(['measure', 'test_convmixer']) == 130
    out, err = capsys.readouterr()
    assert out == '' and err.splitlines()[-1] == 'interrupted'
    assert not multiprocessing.active_children()


def test_interrupt_prints_what_was_measured(monkeypatch, capsys):
    sample = Rounds.sample

    def interrupt(self, name):
        if all(self.samples.values()):
            raise KeyboardInterrupt
        sample(self, name)

    monkeypatch.setattr(Rounds, 'sample', interrupt)
    monkeypatch.setattr(measure, 'find_ways', lambda task: [BASELINE, OURS])
    assert command_line.main(['measure', 'test_convmixer', '--batch-size', '2', '--json']) == 130
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report['interrupted'] and [len(row['samples']) for row in report['rows']] == [1, 1]
    assert err.splitlines()[-1] == 'interrupted' and 'Traceback' not in err
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_interrupted_by_the_terminal():
    """Ctrl-C reaches every process of the group; nothing but the table and one line comes out, and nothing stays."""
    reader, writer = os.pipe()  # whoever stays keeps it open
    with subprocess.Popen(
        [sys.executable, '-m', 'timm_convmixer', 'measure', 'test_convmixer', '--batch-size', '2',
         '--seconds', '20'],
        env=child_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore_signals,
        start_new_session=True, pass_fds=[writer],
    ) as process:
        os.close(writer)
        while 'round 1' not in process.stderr.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert 'Fastest: ' in out and 'Traceback' not in err and err.splitlines()[-1] == 'interrupted'
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b''
    os.close(reader)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs a named pipe')
def test_what_hangs_is_ended_with_all_it_started(tmp_path):
    os.mkfifo(tmp_path / 'alive')
    torch.save(timm.create_model('test_convmixer').state_dict(), tmp_path / 'weights.pt')
    way = change('hangs', steps=(
        'import subprocess, time\n'
        f'compiler = subprocess.Popen(["sleep", "600"], stdout=open({str(tmp_path / "alive")!r}, "w"))\n'
        'time.sleep(600)\n'))
    run = Isolated(
        measure._prepare, way, TASK, str(tmp_path / 'weights.pt'), wait=False, quiet=True,
        preload=['timm_convmixer.measure'])
    alive = os.open(tmp_path / 'alive', os.O_RDONLY)  # waits for the other end
    with pytest.raises(TimeoutError):
        run.wait(0.01)
    run.close()
    assert select.select([alive], [], [], 60)[0] and os.read(alive, 1) == b''
    os.close(alive)


@pytest.mark.parametrize('arguments,message', [
    (['resnet50'], "argument MODEL: 'resnet50' is not a ConvMixer; choose from convmixer_256_8_ks5_p2, "),
    (['--device', 'tpu'], "argument --device: 'tpu' is not available here; choose from cpu"),
    (['--device', 'cuda:99'], "argument --device: 'cuda:99' is not available here; choose from cpu"),
    (['--dtype', 'int8'], "argument --dtype: invalid choice: 'int8' (choose from"),
    (['--batch-size', '0'], "argument --batch-size: '0' is not a whole number of at least 1"),
    (['--image-size', '1'], 'argument --image-size: 1 is less than a patch of convmixer_256_8_ks5_p2; give at least 2'),
    (['--seconds', 'many'], "argument --seconds: 'many' is not a whole number of at least 1"),
])
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(['measure', *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_defaults(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert Task.create('convmixer_768_32.in1k') == Task('convmixer_768_32.in1k', 'cpu', 'float32', 8, 224)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert Task.create('convmixer_256_8_ks5_p2') == Task('convmixer_256_8_ks5_p2', 'cuda', 'float32', 64, 32)
    assert Task.create('test_convmixer', 'cuda:1', batch_size=3, image_size=64).device == 'cuda:1'


def test_a_busy_machine_is_told():
    assert 'load average 1000' in load_warning(1000.)
    assert load_warning(0.) == load_warning(None) == ''
