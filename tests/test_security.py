"""Importing the plugin opens no connection, and runs no code from the environment or from files."""
import ast
import importlib.metadata
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Iterator, Set, Tuple

import pytest

import timm_convmixer
from support import ROOT, child_env
from timm_convmixer.kernels.support import read_switch

PACKAGE = Path(timm_convmixer.__file__).parent
# All environment variables that the package reads; the documentation describes them.
VARIABLES = {'TIMM_CONVMIXER_AUTOLOAD', 'TIMM_CONVMIXER_FUSED', 'TIMM_CONVMIXER_GPU_KERNELS', 'TRITON_INTERPRET'}

# Raises on any network access in the interpreter, and records the files it opens.
WATCH = '''
import json, os, sys
opened = []
def watch(event, args):
    if event.split('.')[0] in ('socket', 'http', 'urllib', 'ftplib', 'smtplib') and event not in (
            'socket.__new__', 'socket.gethostname'):
        raise RuntimeError(f'network: {event} {args}')
    if event == 'open' and isinstance(args[0], str):
        opened.append(os.path.abspath(args[0]))
sys.addaudithook(watch)
'''


def run(code: str, cwd: Path, **env: str) -> Tuple[Any, str]:
    """Run code in a fresh interpreter and return its last line as JSON, and its standard error."""
    result = subprocess.run(
        # torch takes seconds to exit normally.
        [sys.executable, '-W', 'always', '-c', f'{WATCH}{textwrap.dedent(code)}\nsys.stdout.flush(); os._exit(0)'],
        env=child_env(**{**dict.fromkeys(VARIABLES), **env}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f'rc {result.returncode}\n{result.stdout}\n{result.stderr[-4000:]}'
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize(
    'autoload', ['1', pytest.param('0', marks=pytest.mark.slow)], ids=['by torch', 'by import'])
def test_no_network_and_no_file_of_the_working_directory(autoload, tmp_path):
    """Import, register, create and run a model with the weights in the package, with and without autoload."""
    for name in ('config.json', 'digits.yaml', 'test_convmixer.digits.safetensors', 'timm_convmixer.yaml', '.env'):
        (tmp_path / name).write_text('Not to be read.')
    (opened, names, logits), _ = run('''
        import torch, timm
        if os.environ['TIMM_CONVMIXER_AUTOLOAD'] == '0':
            assert 'timm_convmixer' not in sys.modules
        import timm_convmixer
        model = timm.create_model('test_convmixer', pretrained=True).eval()
        from timm.utils.model import reparameterize_model
        logits = reparameterize_model(model)(torch.zeros(1, 3, 32, 32))
        with_cwd = [path for path in opened if path.startswith(os.getcwd() + os.sep)]
        print(json.dumps([with_cwd, timm.list_models(module='convmixer'), list(logits.shape)]))
    ''', tmp_path, TIMM_CONVMIXER_AUTOLOAD=autoload)
    assert opened == []
    assert len(names) == 12 and logits == [1, 10]


def test_the_watch_sees_the_network(tmp_path):
    (seen,), _ = run('''
        import socket
        try:
            socket.create_connection(('127.0.0.1', 9), timeout=1)
            print(json.dumps(['connected']))
        except RuntimeError as error:
            print(json.dumps([str(error)]))
    ''', tmp_path)
    assert seen.startswith('network: socket.')


def calls() -> Iterator[Tuple[Path, str, ast.Call]]:
    for source in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                yield source, ast.unparse(node.func), node


def environment_names() -> Set[str]:
    """Return the names of variables that the source reads; they must be constants."""
    names = set()
    for source in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(source.read_text())):
            reads = None
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    'os.environ.get', 'os.getenv', 'environ.get', 'getenv', 'read_switch'):
                reads = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ('os.environ', 'environ'):
                reads = node.slice
            if reads is None or (isinstance(reads, ast.Name) and reads.id == 'name' and source.name == 'support.py'):
                continue  # inside read_switch
            assert isinstance(reads, ast.Constant), f'{source}: {ast.unparse(node)}'
            names.add(reads.value)
    return names


def test_environment_variables_are_known():
    assert environment_names() == VARIABLES
    if (ROOT / 'README.md').exists():
        pages = [ROOT / 'README.md', *PACKAGE.rglob('*.md'), *(ROOT / 'tests').glob('*.md')]
        text = '\n'.join(page.read_text(encoding='utf-8') for page in pages)
        assert [name for name in VARIABLES if name not in text] == []


def test_source_runs_no_code_from_elsewhere():
    """No eval, shell, unpickling or download, and dynamic imports only of the package's own modules.

    ``measure`` executes the lines of code that it prints: its own, around the checked name of a model.
    """
    forbidden = {
        'eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'os.execv', 'runpy.run_path',
        'runpy.run_module', 'subprocess.run', 'subprocess.Popen', 'subprocess.call', 'subprocess.check_output',
        'torch.load', 'yaml.load', 'pickle.load', 'pickle.loads', 'marshal.loads', 'ctypes.CDLL',
        'torch.ops.load_library', 'torch.hub.load', 'urllib.request.urlopen', 'requests.get', 'socket.socket',
    }
    seen = list(calls())
    assert len(seen) > 500
    found = [(source.name, name, node) for source, name, node in seen if name in forbidden]
    assert {(source, name) for source, name, _ in found} == {
        ('convert.py', 'torch.load'), ('measure.py', 'torch.load'), ('measure.py', 'exec'), ('measure.py', 'compile')}
    for node in (node for _, name, node in found if name == 'torch.load'):
        assert 'weights_only=True' in [ast.unparse(keyword) for keyword in node.keywords]
    imports = [ast.unparse(node.args[0]) for _, name, node in seen if name == 'importlib.import_module']
    assert set(imports) == {"f'{__name__}.{_PUBLIC_NAMES[name]}'", "f'{_PACKAGE}.convmixer'"}


BAD_VALUES = [
    'abc', '2', '-1', '1.0', 'true', '01', 'é', '../..', "__import__('os').mkdir('it ran')", '$(mkdir ran)', 'x' * 5000]


@pytest.mark.parametrize('value', BAD_VALUES, ids=lambda value: value[:12])
@pytest.mark.parametrize('default', [True, False])
def test_switch_that_says_neither_on_nor_off(value, default, monkeypatch):
    monkeypatch.setenv('TIMM_CONVMIXER_FUSED', value)
    with pytest.warns(RuntimeWarning, match=r'TIMM_CONVMIXER_FUSED=.* is neither 0 nor 1') as warnings:
        assert read_switch('TIMM_CONVMIXER_FUSED', default) is default
    assert f'; {int(default)}, the default' in str(warnings[0].message)


@pytest.mark.parametrize(
    'value,expected', [(None, True), ('', True), (' ', True), ('1', True), ('0', False), (' 0 ', False)])
def test_switch(value, expected, monkeypatch, recwarn):
    monkeypatch.delenv('TIMM_CONVMIXER_FUSED', raising=False)
    if value is not None:
        monkeypatch.setenv('TIMM_CONVMIXER_FUSED', value)
    assert read_switch('TIMM_CONVMIXER_FUSED', True) is expected
    assert not recwarn.list


def test_bad_values_of_all_variables_at_once(tmp_path):
    """torch and timm import, models run, and the switches warn and keep their defaults."""
    value = "__import__('os').mkdir('it ran')"
    (names, shape, fused, gpu_kernels), log = run('''
        import torch
        after_torch = {name for name in sys.modules if name.startswith('timm_convmixer')}
        assert after_torch == {'timm_convmixer', 'timm_convmixer._autoload'}, after_torch
        import timm
        from timm_convmixer import kernels
        shape = list(timm.create_model('test_convmixer')(torch.zeros(2, 3, 32, 32)).shape)
        print(json.dumps([timm.list_models(module='convmixer'), shape, kernels.use_fused(), kernels.use_gpu_kernels()]))
    ''', tmp_path, **dict.fromkeys(VARIABLES, value))
    assert len(names) == 12 and shape == [2, 10] and (fused, gpu_kernels) == (True, False)
    for name in ('TIMM_CONVMIXER_FUSED', 'TIMM_CONVMIXER_GPU_KERNELS'):
        assert f'{name}={value!r} is neither 0 nor 1' in log
    assert 'could not register' not in log
    assert list(tmp_path.iterdir()) == []


def test_requirements_are_met():
    """``pip check`` for this package: its requirements are installed."""
    result = subprocess.run([sys.executable, '-m', 'pip', 'check'], capture_output=True, text=True, timeout=600)
    if 'No module named pip' in result.stderr:
        pytest.skip('no pip here')
    assert [line for line in result.stdout.splitlines() if line.startswith('timm-convmixer')] == []


def test_dependencies_are_the_four():
    requirements = importlib.metadata.requires('timm-convmixer')
    names = [requirement.split('>')[0] for requirement in requirements if 'extra ==' not in requirement]
    assert sorted(name.replace('_', '-') for name in names) == ['huggingface-hub', 'safetensors', 'timm', 'torch']
