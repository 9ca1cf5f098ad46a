"""The command line, the digits and the weights that ship in the package."""
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import timm
import torch

from support import child_env, restore_signals
from timm_convmixer import __main__ as command_line
from timm_convmixer.digits import load_digits, write_image_folder


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
    assert command_line.main(['env']) == 0
    report = dict(re.split(r': +', line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert torch.__version__.startswith(report['torch']) and report['timm'] == timm.__version__
    assert report['models'] == f'{len(timm.list_models(module="convmixer"))} registered'
    assert 'TIMM_CONVMIXER_AUTOLOAD=1' in report['variables']
    assert f'{torch.get_num_threads()} threads' in report['CPU']
    model = timm.create_model('convmixer_256_8_ks5_p2')
    if not torch.cuda.is_available():
        assert report['in training'] == ': '.join(model.route(torch.zeros(32, 3, 32, 32)))
        assert report['in inference'].startswith('inference: ')


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
    monkeypatch.setitem(sys.modules, 'sklearn', None)  # what importing it then raises is a ModuleNotFoundError
    assert command_line.main(['demo']) == 1
    printed = capsys.readouterr().err
    assert "pip install 'timm-convmixer[demo]'" in printed.splitlines()[-1] and 'Traceback' not in printed


COMMANDS = ['list', 'demo', 'env', 'digits', 'recipe', 'convert', 'filters']


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
    """Ctrl-C, also where this suite was itself started to ignore it: by nohup, in the background, as a service."""
    with start('list', stdout=subprocess.PIPE) as process:
        assert process.stderr.readline()  # it has begun
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
