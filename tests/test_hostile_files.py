"""Malicious and damaged files are refused, or load exactly what they hold.

TIMM_CONVMIXER_MUTATIONS sets the number of random mutations of valid checkpoints to load: by default 200, and 5,000
with ``pytest --all``.
"""
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn

import forks
import timm_convmixer  # noqa: F401, registers the models
from mutations import SIZE, create_model
from support import ALL, child_env, restore_signals
from timm_convmixer.checkpoints import non_finite_weights

NAME = 'test_convmixer'
MUTATIONS = int(os.environ.get('TIMM_CONVMIXER_MUTATIONS', '5000' if ALL else '200'))
# Additional memory that loading a mutated file of up to 100 kB may take.
MEMORY_BOUND = 64 * 2 ** 20
on_linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc, sets limits')


# Pickles that run code


def pickle_with(opcodes: bytes, path: Path) -> Path:
    """Write a checkpoint with the given pickle."""
    torch.save(dict(head=torch.zeros(1)), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in members.items():
            archive.writestr(name, opcodes if name.endswith('data.pkl') else content)
    return path


def makes_folder(marker: Path) -> bytes:
    """Return opcodes that call ``os.mkdir``."""
    name = str(marker).encode()
    return b'cos\nmkdir\nX' + len(name).to_bytes(4, 'little') + name + b'\x85R'


# Sets the state of an OrderedDict to None: only PyTorch's restricted unpickler raises a TypeError.
TYPE_ERROR = b'ccollections\nOrderedDict\n)RNb0'


@pytest.mark.parametrize('before', [b'', TYPE_ERROR], ids=['plain', 'behind a TypeError'])
@pytest.mark.parametrize(
    'way', ['checkpoint_path', 'file', 'url', 'local-dir', 'load_checkpoint', 'resume', 'torch.load'])
def test_pickle_that_runs_code(way, before, tmp_path, monkeypatch):
    """Tests timm's ways to load a file; test_hub.py tests the Hub, test_checkpoints.py other file names."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    marker = tmp_path / 'it ran'
    path = pickle_with(b'\x80\x02' + before + makes_folder(marker) + b'.', tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text(json.dumps(dict(architecture=NAME, num_classes=3, pretrained_cfg={})))
    ways = {
        'checkpoint_path': lambda: timm.create_model(NAME, checkpoint_path=str(path)),
        'file': lambda: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        'url': lambda: timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=dict(file='', url=path.as_uri())),
        'local-dir': lambda: timm.create_model(f'local-dir:{tmp_path}', pretrained=True),
        'load_checkpoint': lambda: timm.models.load_checkpoint(create_model(), str(path)),
        'resume': lambda: timm.models.resume_checkpoint(create_model(), str(path)),
        'torch.load': lambda: create_model().load_state_dict(torch.load(path, weights_only=True)),
    }
    with pytest.raises((RuntimeError, TypeError, pickle.UnpicklingError), match='weights_only|Weights only|NoneType'):
        ways[way]()
    assert not marker.exists()

    torch.load(path, weights_only=False)
    assert marker.exists(), 'The pickle is harmless, so that the test proves nothing.'


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_weights_by_url(suffix, tmp_path, monkeypatch):
    """URLs are loaded like files, so that checkpoints of train.py work too."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    # train.py's names look to timm as if they ended in a hash.
    model, path = create_model(), tmp_path / f'checkpoint-149{suffix}'
    if suffix == '.pth':
        torch.save(dict(state_dict=model.state_dict(), epoch=1), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    overlay = dict(file='', url=path.as_uri(), num_classes=SIZE['num_classes'])
    for cache_dir in (None, str(tmp_path / 'cache')):
        loaded = timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=cache_dir, **SIZE)
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
        assert loaded.pretrained_cfg['url'] == path.as_uri() and 'file' not in loaded.pretrained_cfg
    timm.models.set_pretrained_check_hash()
    try:
        with pytest.raises(RuntimeError, match='invalid hash value'):
            timm.create_model(
                NAME, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / 'other'), **SIZE)
    finally:
        timm.models.set_pretrained_check_hash(False)
    assert (tmp_path / 'cache' / path.name).exists()


# Wrong sizes


def header_edited(content: bytes, **changes: Any) -> bytes:
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + length])
    header['head.weight'].update(changes)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, 'little') + encoded + content[8 + length:]


@pytest.mark.parametrize('damage', [
    lambda content: (2 ** 63).to_bytes(8, 'little') + content[8:],
    lambda content: (len(content) * 2).to_bytes(8, 'little') + content[8:],
    lambda content: (99_000_000).to_bytes(8, 'little') + content[8:],
    lambda content: (0).to_bytes(8, 'little') + content[8:],
    lambda content: content[:8],
    lambda content: b'',
    lambda content: content[:-1],
    lambda content: content + b'\0',
    lambda content: header_edited(content, shape=[2 ** 40, 2 ** 20]),
    lambda content: header_edited(content, shape=[3, 9]),
    lambda content: header_edited(content, shape=[-3, -8]),
    lambda content: header_edited(content, dtype='F64'),
    lambda content: header_edited(content, data_offsets=[0, 2 ** 62]),
    lambda content: header_edited(content, data_offsets=[96, 0]),
    lambda content: header_edited(content, data_offsets=[0, 96]),
], ids=[
    'header 2**63', 'header too long', 'header 99 MB', 'header empty', 'nothing but a length', 'empty', 'cut', 'longer',
    'shape 2**60', 'shape', 'shape negative', 'dtype', 'offsets 2**62', 'offsets swapped', "offsets of others'",
])
def test_safetensors_that_lies_about_sizes(damage, tmp_path):
    path = tmp_path / 'model.safetensors'
    path.write_bytes(damage(safetensors.torch.save(create_model().state_dict())))
    with pytest.raises((safetensors.SafetensorError, ValueError, OSError, RuntimeError)):
        timm.models.load_checkpoint(create_model(), str(path))


@pytest.fixture(scope='module')
def loader(tmp_path_factory) -> Iterator[forks.Forks]:
    """A process that has loaded no file yet, so that peak memory is that of one load."""
    imports = f'''
        import os, resource, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import timm
        from mutations import create_model, peak_memory
    '''
    folder = tmp_path_factory.mktemp('loader')
    with forks.Forks(imports, folder, env=child_env(), cwd=folder) as loader:
        yield loader


def load_in_process(loader: forks.Forks, path: Path, limit: int = 0) -> List[str]:
    """Return the peak memory of loading a file and the error; ``limit`` bounds additional address space, in bytes."""
    result = loader.run(f'''
        model = create_model()
        before = peak_memory()
        if {limit}:
            used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + {limit},) * 2)
        try:
            timm.models.load_checkpoint(model, {str(path)!r})
            error = ''
        except Exception as caught:
            error = type(caught).__name__ + ': ' + str(caught)
        print(peak_memory() - before, error, flush=True)
    ''')
    assert result.returncode == 0, f'ended by {result.returncode}\n{result.stderr[-2000:]}'
    return result.stdout.splitlines()[0].split(' ', 1)


@on_linux
def test_zip_bomb(loader, tmp_path):
    """torch.load inflates a compressed archive up to the size that it states, and no further.

    That is at most 1,032 times the file (deflate's limit), and happens before the plugin sees a tensor. With a memory
    limit, the process gets a clean error.
    """
    inflated = 200_000_000
    state_dict = {**create_model().state_dict(), 'stem.0.weight': torch.zeros(inflated // 4)}
    torch.save(state_dict, tmp_path / 'large.pth')
    with zipfile.ZipFile(tmp_path / 'large.pth') as source:
        with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))
    (tmp_path / 'large.pth').unlink()
    size = (tmp_path / 'bomb.pth').stat().st_size
    assert size * 500 < inflated < size * 1032

    memory, error = load_in_process(loader, tmp_path / 'bomb.pth')
    assert 'size mismatch for stem.0.weight' in error.replace('\n', ' ') or error.startswith('RuntimeError')
    assert int(memory) < inflated + MEMORY_BOUND
    memory, error = load_in_process(loader, tmp_path / 'bomb.pth', limit=inflated // 2)
    assert error.startswith(('RuntimeError', 'MemoryError')) and int(memory) < inflated // 2


@on_linux
def test_zip_members_that_lie_about_sizes(loader, tmp_path):
    """A directory that states sizes of gigabytes makes torch allocate none."""
    torch.save(create_model().state_dict(), tmp_path / 'model.pth')
    content = (tmp_path / 'model.pth').read_bytes()
    entry = content.index(b'PK\1\2')
    for field in (20, 24):  # compressed and uncompressed size, in the directory's first entry: data.pkl
        lie = content[:entry + field] + (2 ** 32 - 2).to_bytes(4, 'little') + content[entry + field + 4:]
        (tmp_path / 'lie.pth').write_bytes(lie)
        memory, error = load_in_process(loader, tmp_path / 'lie.pth')
        assert error and int(memory) < MEMORY_BOUND, error


# Values and shapes


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('way', ['load_state_dict', 'pretrained', 'checkpoint_path'])
def test_weights_that_are_not_finite(way, value, tmp_path, caplog):
    """They load unchanged, with one warning that names the tensors."""
    state_dict = create_model().state_dict()
    for key in ('head.weight', 'blocks.1.3.running_var', 'stem.0.bias'):
        state_dict[key].view(-1)[1] = value
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(state_dict, path)
    model = create_model()
    with caplog.at_level(logging.WARNING):
        if way == 'load_state_dict':
            model.load_state_dict(state_dict)
        elif way == 'pretrained':
            overlay = dict(file=str(path), num_classes=SIZE['num_classes'])
            model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **SIZE)
        else:
            model = timm.create_model(NAME, checkpoint_path=str(path), **SIZE)
    assert all(
        torch.equal(loaded.nan_to_num(7), state_dict[key].nan_to_num(7)) for key, loaded in model.state_dict().items())
    warning, = [record.getMessage() for record in caplog.records if record.name.startswith('timm_convmixer')]
    assert f'in 3 of {len(state_dict)} tensors' in warning
    assert all(repr(key) in warning for key in ('head.weight', 'blocks.1.3.running_var', 'stem.0.bias'))


def test_finite_weights_give_no_warning(caplog):
    model = create_model()
    state_dict = model.state_dict()
    # Finite weights with an infinite sum.
    state_dict['head.weight'].fill_(3e38)
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(state_dict)
        model.half().load_state_dict({
            key: value.clamp(-65504, 65504).half() if value.is_floating_point() else value
            for key, value in state_dict.items()})
    assert caplog.records == []


def test_non_finite_weights_looks_at_plain_floating_point_alone():
    nan = torch.tensor([float('nan')])
    state_dict = {
        'nan': nan,
        'parameter': nn.Parameter(nan),
        'half': nan.half(),
        'bfloat16': nan.bfloat16(),
        'double': nan.double(),
        'view': torch.stack([torch.zeros(4), nan.expand(4)], dim=1)[:, 1],
        'empty': torch.empty(0),
        'scalar': torch.tensor(1.),
        'integer': torch.tensor([1]),
        'meta': torch.empty(3, device='meta'),
        'float8': torch.tensor([1.]).to(torch.float8_e4m3fn),
        'no tensor': 'NaN',
        'sparse': torch.sparse_coo_tensor([[0]], nan, (2,), check_invariants=True),
    }
    assert non_finite_weights(state_dict) == ['nan', 'parameter', 'half', 'bfloat16', 'double', 'view']


@pytest.mark.parametrize('key,change', [
    ('head.weight', lambda value: value[:-1]),
    ('stem.0.weight', lambda value: value.flatten()),
    ('stem.2.running_mean', lambda value: value[None]),
    ('blocks.0.0.fn.0.weight', lambda value: value.expand(-1, 8, -1, -1)),
    ('blocks.1.1.weight', lambda value: value.new_zeros(())),
    ('blocks.1.1.weight', lambda value: value.new_zeros(0)),
    ('blocks.1.1.bias', lambda value: value.repeat(100)),
])
@pytest.mark.parametrize('pretrained', [False, True], ids=['checkpoint_path', 'pretrained'])
def test_wrong_shapes_are_named(pretrained, key, change, tmp_path):
    state_dict = create_model().state_dict()
    state_dict[key] = change(state_dict[key]).contiguous()
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(state_dict, path)
    with pytest.raises((RuntimeError, ValueError), match=key.replace('.', r'\.')):
        if pretrained:
            timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(
                file=str(path), num_classes=SIZE['num_classes']), **SIZE)
        else:
            timm.create_model(NAME, checkpoint_path=str(path), **SIZE)


# Mutations


def run_mutations(folder: Path, count: int) -> List[Dict[str, Any]]:
    """Return the outcome of each mutation, including ``'died'`` and ``'hung'``, from processes that may crash."""
    worker = Path(__file__).with_name('mutations.py')
    outcomes: List[Dict[str, Any]] = []
    while len(outcomes) < count:
        command = [sys.executable, str(worker), str(folder), str(len(outcomes)), str(count)]
        with open(folder / 'log', 'a') as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=child_env(), preexec_fn=restore_signals)
        current = None
        for line in process.stdout:
            report = json.loads(line)
            if 'number' in report:
                current = report
            else:
                outcomes.append({**current, **report})
                current = None
        process.stdout.close()
        code = process.wait()
        if code:
            assert current is not None, (folder / 'log').read_text()[-4000:]
            result = 'hung' if code == -signal.SIGPROF else 'died'
            outcomes.append({**current, 'result': result, 'error': str(code), 'memory': 0})
    return outcomes


@on_linux
def test_mutations_load_right_or_are_refused(tmp_path, record_property):
    outcomes = run_mutations(tmp_path, MUTATIONS)
    assert [outcome['number'] for outcome in outcomes] == list(range(MUTATIONS))
    counts = Counter(outcome['result'] for outcome in outcomes)
    memory = max(outcome['memory'] for outcome in outcomes)
    record_property('outcomes', dict(counts))
    record_property('memory', memory)
    print(f'{MUTATIONS} mutations: {dict(counts)}, at most {memory / 2 ** 20:.1f} MB above loading a valid file')
    bad = [outcome for outcome in outcomes if outcome['result'] not in ('refused', 'right', 'other')]
    assert bad == []
    assert memory < MEMORY_BOUND
    # Every error has a message.
    assert [outcome for outcome in outcomes if outcome['result'] == 'refused' and not outcome['error'].strip()] == []
    # The mutations must be neither all harmless nor all fatal.
    assert 0.5 * MUTATIONS < counts['refused'] < MUTATIONS and counts['right'] > 0
