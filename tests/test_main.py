"""The command line, the digits, and the weights in the package."""
import itertools
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import timm
import torch

import timm_convmixer
from support import child_env, restore_signals
from timm_convmixer import __main__ as command_line
from timm_convmixer.digits import load_digits, write_image_folder
from timm_convmixer.environment import describe_environment
from timm_convmixer.kernels.support import set_fused, use_fused


def test_digits_are_split_by_class():
    splits = load_digits()
    assert {split: len(images) for split, images in splits.items()} == {'train': 1442, 'validation': 355}
    for images in splits.values():
        assert {label for _, label in images} == set(range(10))
        assert all(image.size == (8, 8) and image.mode == 'L' for image, _ in images)
    assert max(image.getextrema()[1] for image, _ in splits['validation']) == 255


def test_digits_as_an_image_folder(tmp_path):
    write_image_folder(tmp_path)
    dataset = timm.data.create_dataset('', tmp_path, split='validation')
    assert len(dataset) == 355
    assert dataset.reader.class_to_idx == {str(digit): digit for digit in range(10)}
    assert {path.name for path in (tmp_path / 'train').iterdir()} == {str(digit) for digit in range(10)}


def test_digits_do_not_join_another_data_set(tmp_path):
    (tmp_path / 'train' / 'n01440764').mkdir(parents=True)
    with pytest.raises(FileExistsError, match="holds 'n01440764', which is no digit"):
        write_image_folder(tmp_path)
    assert os.listdir(tmp_path / 'train') == ['n01440764']


def test_shipped_weights_need_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('The weights in the package must load without a connection.')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    model = timm.create_model('test_convmixer', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, labels = zip(*load_digits()['validation'])
    with torch.inference_mode():
        predictions = model(torch.stack([transform(image.convert('RGB')) for image in images])).argmax(dim=1)
    assert (predictions == torch.tensor(labels)).float().mean() > 0.97


def test_demo(capsys):
    assert command_line.main(['demo']) == 0
    accuracy = float(re.search(r'accuracy: .*, ([\d.]+)%', capsys.readouterr().out)[1])
    assert accuracy > 97


def test_environment(capsys, monkeypatch):
    monkeypatch.setenv('TIMM_CONVMIXER_AUTOLOAD', '1')
    monkeypatch.delenv('TIMM_CONVMIXER_FUSED', raising=False)
    assert command_line.main(['env']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 25 and len({len(re.match(r'.*?: +', line)[0]) for line in lines}) == 1
    report = dict(re.split(r': +', line, maxsplit=1) for line in lines)
    assert report['timm-convmixer'] == timm_convmixer.__version__
    assert report['torch'] == torch.__version__ and report['timm'] == timm.__version__
    assert report['registered'].startswith(f'{len(timm.list_models(module="convmixer"))} models')
    assert 'TIMM_CONVMIXER_AUTOLOAD=1' in report['variables'] and 'FUSED' not in report['variables']
    assert f'{torch.get_num_threads()} threads' in report['CPU']
    assert torch.backends.cpu.get_cpu_capability() in report['instructions']


@pytest.mark.parametrize('fused', [True, False])
def test_environment_names_the_routes(fused, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    before = use_fused()
    try:
        set_fused(fused)
        assert command_line.main(['env']) == 0
    finally:
        set_fused(before)
    report = dict(re.split(r': +', line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    routes = [report[f'- {name}'] for name in ('training', 'inference', 'inference form')]
    expected = ['training', 'inference', 'inference'] if fused else ['layers'] * 3
    assert [route.partition(': ')[0] for route in routes] == expected
    assert all(('every layer is plain' if fused else 'switched off') in route for route in routes)


def test_environment_names_gpus(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card {device}')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    report = dict(itertools.islice(describe_environment(), 11))
    for index in range(2):
        assert report[f'GPU {index}'].startswith(f'card {index}, compute capability 7.5; ')


def test_list_is_the_registry(capsys):
    assert command_line.main([]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == timm.list_models(module='convmixer')
    by_name = {row[0]: row for row in rows}
    assert by_name['convmixer_768_32'] == [
        'convmixer_768_32', '21.1', '20.7', '224x224', '80.16', 'hf-hub:timm/convmixer_768_32.in1k']


def test_recipes_are_printed(capsys):
    assert command_line.main(['recipe', 'digits']) == 0
    printed = capsys.readouterr().out
    assert command_line.main(['recipe', 'digits', '--path']) == 0
    with open(capsys.readouterr().out.strip()) as file:
        assert file.read() == printed


def test_unknown_recipe_names_the_known(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(['recipe', 'imagenet21k'])
    assert stopped.value.code == 2
    assert 'digits' in capsys.readouterr().err


def test_a_missing_dependency_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'sklearn', None)  # importing it now raises ModuleNotFoundError
    assert command_line.main(['demo']) == 1
    printed = capsys.readouterr().err
    assert "pip install 'timm-convmixer[demo]'" in printed.splitlines()[-1] and 'Traceback' not in printed


COMMANDS = ['list', 'demo', 'env', 'measure', 'digits', 'recipe', 'convert', 'filters']


def start(*arguments, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-m', 'timm_convmixer', *arguments],
        env=child_env(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_signals if os.name == 'posix' else None,
        **kwargs,
    )


@pytest.mark.parametrize('command', COMMANDS)
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv('NO_COLOR', '1')
    with pytest.raises(SystemExit) as stopped:
        command_line.main([command, '--help'])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f'python -m timm_convmixer {command}' in text.partition('example:')[2]
    assert 'exit status:' in text and '\x1b' not in text


def test_no_command_is_left_out_here(capsys):
    with pytest.raises(SystemExit):
        command_line.main(['--help'])
    text = capsys.readouterr().out.partition('commands:')[2]
    assert re.findall(r'^    (\w+) ', text, flags=re.MULTILINE) == COMMANDS


@pytest.mark.parametrize('failure,status', [
    (KeyboardInterrupt(), 130), (OSError('disk full'), 1), (ValueError('wrong'), 1), (RuntimeError('no'), 1)], ids=repr)
def test_exit_status(failure, status, monkeypatch, capsys):
    def fail(args):
        raise failure

    monkeypatch.setattr(command_line, 'print_recipe', fail)
    assert command_line.main(['recipe', 'digits']) == status
    assert str(failure) in capsys.readouterr().err


@pytest.mark.skipif(os.name == 'nt', reason='POSIX signals')
def test_interrupted():
    """Ctrl-C works, also if this suite was started with SIGINT ignored (nohup, in the background, as a service)."""
    with start('list', stdout=subprocess.PIPE) as process:
        assert process.stderr.readline()  # it has started
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read().splitlines()[-1] == 'interrupted' and not process.stdout.read()


def test_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with start('recipe', 'imagenet', stdout=writer) as process:
        os.close(writer)
        assert process.stderr.read() == ''
        assert process.wait(timeout=60) == 0
