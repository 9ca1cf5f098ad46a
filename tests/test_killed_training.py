"""Training killed at random moments and resumed equals uninterrupted training; no checkpoint is ever truncated.

``pytest --all`` kills training 20 times instead of 5. If TIMM_CONVMIXER_SCRIPTS names a folder with timm's scripts, it
also kills train.py, twice. TIMM_CONVMIXER_KILLS sets both numbers.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch

from killed_trainer import EPOCHS
from support import ALL, ROOT, child_env
from timm_convmixer.digits import load_digits

KILLS = int(os.environ.get('TIMM_CONVMIXER_KILLS', '20' if ALL else '5'))
SCRIPT_KILLS = int(os.environ.get('TIMM_CONVMIXER_KILLS', '2'))
SCRIPTS = os.environ.get('TIMM_CONVMIXER_SCRIPTS')
ENVIRONMENT = child_env()

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='forks, and kills with SIGKILL')


def load(path: Path) -> Dict[str, Any]:
    return torch.load(path, map_location='cpu', weights_only=False)


def tensors(checkpoint: Any, prefix: str = '') -> Dict[str, torch.Tensor]:
    """Return all tensors and numbers of a nested checkpoint by path."""
    if isinstance(checkpoint, torch.Tensor):
        return {prefix: checkpoint}
    if isinstance(checkpoint, (int, float)):
        return {prefix: torch.tensor(checkpoint, dtype=torch.float64)}
    items = checkpoint.items() if isinstance(checkpoint, dict) else enumerate(checkpoint) if isinstance(
        checkpoint, (list, tuple)) else ()
    return {path: value for key, child in items for path, value in tensors(child, f'{prefix}/{key}').items()}


def trained(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    kept = {key: checkpoint[key] for key in ('epoch', 'state_dict', 'state_dict_ema', 'optimizer')}
    return tensors(kept)


def assert_equal(actual: Dict[str, Any], expected: Dict[str, Any]) -> None:
    actual, expected = trained(actual), trained(expected)
    assert actual.keys() == expected.keys() and len(expected) > 50
    assert [key for key, value in expected.items() if not torch.equal(actual[key], value)] == []


class Trainer:
    """The trainer's process and its children."""

    def __init__(self, log: Path):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / 'tests' / 'killed_trainer.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(log, 'w'), text=True, env=ENVIRONMENT)

    def start(self, folder: Path) -> int:
        self.process.stdin.write(f'{folder}\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def result(self) -> str:
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=300)
        self.process.stdout.close()


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp('trainer') / 'log')
    yield trainer
    trainer.close()


@pytest.fixture(scope='module')
def uninterrupted(trainer, tmp_path_factory) -> Tuple[List[Dict[str, Any]], float]:
    """The checkpoint of every epoch, and the duration of the training."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    checkpoints: Dict[int, Dict[str, Any]] = {}
    trainer.start(folder)
    start = time.monotonic()
    assert trainer.result() == '0'
    duration = time.monotonic() - start
    # The saver keeps only the best three and the last: copy the others after each epoch of an equal run.
    last = load(folder / 'last.pth.tar')
    for path in folder.glob('checkpoint-*.pth.tar'):
        checkpoint = load(path)
        checkpoints[checkpoint['epoch']] = checkpoint
    checkpoints[last['epoch']] = last
    assert last['epoch'] == EPOCHS - 1
    return checkpoints, duration


def assert_intact(folder: Path, expected: Dict[int, Dict[str, Any]]) -> int:
    """Assert that every checkpoint is complete and equals the uninterrupted run's, and return their number."""
    paths = [path for path in folder.glob('*.pth.tar') if path.name != 'tmp.pth.tar']
    for path in paths:
        checkpoint = load(path)
        if checkpoint['epoch'] in expected:
            assert_equal(checkpoint, expected[checkpoint['epoch']])
    return len(paths)


def test_killed_and_resumed(trainer, uninterrupted, tmp_path, record_property):
    expected, duration = uninterrupted
    rng = random.Random(0)
    kills, runs, unfinished, lasts_missing = 0, 0, 0, 0
    folder = tmp_path / '0'
    folder.mkdir()
    while True:
        process = trainer.start(folder)
        if kills < KILLS:
            time.sleep(rng.uniform(0, 0.5 * duration))
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it exited first
        result = trainer.result()
        assert result in ('0', 'killed')
        intact = assert_intact(folder, expected)
        if result == 'killed':
            kills += 1
            unfinished += (folder / 'tmp.pth.tar').exists()
            lasts_missing += intact > 0 and not (folder / 'last.pth.tar').exists()
            continue
        assert_equal(load(folder / 'last.pth.tar'), expected[EPOCHS - 1])
        shutil.rmtree(folder)
        runs += 1
        if kills >= KILLS:
            break
        folder = tmp_path / str(runs)
        folder.mkdir()
    record_property('kills', kills)
    print(f'{kills} kills, {runs} trainings; {unfinished} left tmp.pth.tar, unfinished or not, {lasts_missing} no last')
    assert kills == KILLS


SAVER = '''
import os, signal, sys
import timm, torch
from timm.utils import CheckpointSaver
torch.set_num_threads(1)
for call in sys.argv[1:]:
    process = os.fork()
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        continue
    os.mkdir(call)
    model = timm.create_model('test_convmixer')
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=1.), checkpoint_dir=call)
    saver.save_checkpoint(0, 1.)
    setattr(os, call, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    saver.save_checkpoint(1, 2.)
os._exit(0)  # torch takes seconds to leave the ordinary way
'''


def test_what_timms_saver_leaves_when_killed_at_its_worst(tmp_path):
    """timm deletes ``last`` before it renames ``tmp``. If it is killed in between, only ``tmp`` is left."""
    first = {'checkpoint-0.pth.tar': 0, 'model_best.pth.tar': 0}
    left = {
        'unlink': {**first, 'last.pth.tar': 0, 'tmp.pth.tar': 1},
        'replace': {**first, 'tmp.pth.tar': 1},
        'link': {**first, 'last.pth.tar': 1},
    }
    result = subprocess.run(
        [sys.executable, '-c', SAVER, *left],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for call, expected in left.items():
        assert {path.name: load(path)['epoch'] for path in (tmp_path / call).iterdir()} == expected, call


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="set TIMM_CONVMIXER_SCRIPTS to a folder that holds timm's scripts")
def test_train_script_killed_and_resumed(tmp_path):
    """train.py itself, with all images in one batch, because a resumed run draws another order."""
    for split, images in load_digits().items():
        for label in range(10):
            (tmp_path / 'digits' / split / str(label)).mkdir(parents=True)
            for index, image in enumerate([image for image, target in images if target == label][:8]):
                image.save(tmp_path / 'digits' / split / str(label) / f'{index}.png')
    command = [
        sys.executable, str(Path(SCRIPTS) / 'train.py'), '--data-dir', 'digits', '--device', 'cpu', '--workers', '1',
        '--output', 'runs', '--no-aug', '--batch-size', '80', '--model', 'convmixer_512_12_ks8_p7',
        '--model-kwargs', 'dim=16', 'depth=2', '--input-size', '3', '32', '32', '--num-classes', '10',
        '--opt', 'adamw', '--opt-eps', '1e-3', '--lr', '0.01', '--warmup-epochs', '0', '--bn-momentum', '0.3',
        '--epochs', '16', '--checkpoint-hist', '16', '--model-ema', '--model-ema-decay', '0.7',
    ]

    def start(name: str, *flags: str) -> subprocess.Popen:
        log = open(tmp_path / f'{name}.log', 'a')
        # Its own process group, so that its data loader is killed too.
        return subprocess.Popen(
            [*command, '--experiment', name, *flags], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log,
            start_new_session=True)

    begin = time.monotonic()
    assert start('uninterrupted').wait(timeout=900) == 0
    duration = time.monotonic() - begin
    saved = {
        checkpoint['epoch']: checkpoint
        for checkpoint in map(load, (tmp_path / 'runs' / 'uninterrupted').glob('checkpoint-*.pth.tar'))}
    assert sorted(saved) == list(range(16))
    first, last = trained(saved[0]), trained(saved[15])
    moved = max(
        (first[key].double() - last[key].double()).abs().max().item() for key in last if key.startswith('/state_dict'))

    def assert_checkpoints_of(folder: Path) -> None:
        for path in folder.glob('*.pth.tar'):
            if path.name == 'tmp.pth.tar':
                continue
            actual = load(path)
            expected = trained(saved[actual['epoch']])
            for key, value in trained(actual).items():
                if key.startswith('/state_dict'):
                    assert (value.double() - expected[key].double()).abs().max() <= 1e-4 * moved, (path, key)

    rng, kills, run = random.Random(1), 0, 0
    while True:
        folder = tmp_path / 'runs' / f'killed-{run}'
        last = folder / 'last.pth.tar'
        process = start(folder.name, *(['--resume', str(last)] if last.exists() else []))
        try:
            code = process.wait(timeout=rng.uniform(0.3, 1.0) * duration if kills < SCRIPT_KILLS else 900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        assert_checkpoints_of(folder)
        if code == -signal.SIGKILL:
            kills += 1
            continue
        assert code == 0, (tmp_path / f'{folder.name}.log').read_text()[-3000:]
        assert load(last)['epoch'] == 15
        run += 1
        if kills >= SCRIPT_KILLS:
            break
