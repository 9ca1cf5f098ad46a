"""timm's unchanged scripts on images of digits; TIMM_CONVMIXER_SCRIPTS names the folder that holds train.py.

Every script runs in a process of its own with the plugin installed, which takes five seconds or more; ``pytest --all``
runs them all. test_training.py makes the same calls into timm's library and needs no checkout of the scripts.
"""
import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict

import pytest
import safetensors.torch
import timm
import torch
import yaml
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import load_checkpoint

from hub_server import HubServer
from support import child_env, load_script
from timm_convmixer.digits import load_digits

VARIABLE = 'TIMM_CONVMIXER_SCRIPTS'
SCRIPTS = Path(os.environ.get(VARIABLE, '.'))
RECIPES = sorted((Path(__file__).parent.parent / 'timm_convmixer' / 'recipes').glob('*.yaml'))

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"set {VARIABLE} to a folder that holds timm's scripts: train.py, validate.py, ...",
)

slow = pytest.mark.slow

# For a variant that timm lacks, small enough to train in a second.
ARCHITECTURE = dict(dim=16, depth=2)
VARIANT = [
    '--model', 'convmixer_512_12_ks8_p7', '--model-kwargs', *(f'{k}={v}' for k, v in ARCHITECTURE.items()),
    '--input-size', '3', '32', '32', '--num-classes', '10',
]
# After initialisation only the order of the images is random, and the seed fixes it.
TRAIN = [
    '--data-dir', 'digits', '--device', 'cpu', '--workers', '1', '--output', 'runs', '--no-aug', '--batch-size', '16',
    '--opt', 'adamw', '--opt-eps', '1e-3', '--lr', '0.01', '--warmup-epochs', '0',
]
# train.py treats --lr 0 as not given; this rate changes weights by rounding at most.
FROZEN = ['--lr', '1e-12', '--epochs', '1']


def create_variant(**kwargs) -> torch.nn.Module:
    return timm.create_model('convmixer_512_12_ks8_p7', num_classes=10, **ARCHITECTURE, **kwargs)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder for the scripts, with eight images of each digit in digits/train and digits/validation."""
    root = tmp_path_factory.mktemp('scripts')
    for split, images in load_digits().items():
        for label in range(10):
            (root / 'digits' / split / str(label)).mkdir(parents=True)
            for index, image in enumerate([image for image, target in images if target == label][:8]):
                image.save(root / 'digits' / split / str(label) / f'{index}.png')
    return root


def call(folder: Path, script: str, *args: Any, status: int = 0, **env: str) -> str:
    """Run a script that must exit with ``status``. Returns standard error, then standard output with the results."""
    result = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, args)],
        cwd=folder,
        env=child_env(TORCHINDUCTOR_CACHE_DIR=str(folder / 'inductor'), **env),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == status, f'{script} {" ".join(map(str, args))}\n{result.stderr[-4000:]}'
    return f'{result.stderr}\n{result.stdout}'


def results(output: str) -> Any:
    return json.loads(output.split('--result\n')[1])


def load(path: Path) -> Dict[str, Any]:
    return torch.load(path, map_location='cpu', weights_only=False)


def train(folder: Path, name: str, *flags: Any, **env: str) -> SimpleNamespace:
    output = call(folder, 'train.py', *TRAIN, '--experiment', name, *flags, **env)
    run = folder / 'runs' / name
    with open(run / 'summary.csv') as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    return SimpleNamespace(log=output, folder=run, rows=rows, last=load(run / 'last.pth.tar'))


@torch.no_grad()
def evaluate(model: torch.nn.Module, folder: Path, **config) -> SimpleNamespace:
    """Return the metrics that train.py and validate.py must print for the held-out images."""
    config = resolve_data_config(config, model=model)
    config.pop('crop_mode')
    loader = create_loader(
        create_dataset('', folder / 'digits', split='validation'),
        batch_size=80,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        **config,
    )
    (images, labels), = loader
    logits = model.eval()(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    predictions = logits.argmax(dim=1)
    return SimpleNamespace(
        loss=loss.item(), top1=100 * (predictions == labels).float().mean().item(), predictions=predictions)


def assert_equal(actual: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor], tolerance: float = 0.) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=tolerance, atol=tolerance, msg=lambda m: f'{key}: {m}')


def largest_difference(first: Dict[str, torch.Tensor], second: Dict[str, torch.Tensor]) -> float:
    return max((first[key].double() - second[key].double()).abs().max().item() for key in first)


# Training


@pytest.fixture(scope='module')
def scratch(folder) -> SimpleNamespace:
    return train(folder, 'scratch', *VARIANT, '--epochs', '8')


# train.py restores weights, running statistics, averaged weights, optimizer, AMP scaler, epoch and learning rate. It
# restores no random generator: a resumed run draws order, augmentation, mixup and dropped paths anew. With all images
# in one batch and no augmentation, this only changes the order of summation.
RESUMABLE = [
    '--batch-size', '80', '--epochs', '16', '--bn-momentum', '0.3', '--model-ema', '--model-ema-decay', '0.7',
    '--checkpoint-hist', '16',
]


@pytest.fixture(scope='module')
def uninterrupted(folder) -> SimpleNamespace:
    return train(folder, 'uninterrupted', *VARIANT, *RESUMABLE)


def test_train_from_scratch(folder, scratch):
    losses = [row['train_loss'] for row in scratch.rows]
    assert [row['epoch'] for row in scratch.rows] == list(range(8))
    assert losses[-1] < losses[0] - 0.5
    assert scratch.rows[-1]['eval_top1'] > 40
    assert scratch.last['arch'] == 'convmixer_512_12_ks8_p7'
    model = create_variant()
    assert list(scratch.last['state_dict']) == list(model.state_dict())
    model.load_state_dict(scratch.last['state_dict'])
    expected = evaluate(model, folder, input_size=(3, 32, 32))
    assert scratch.rows[-1]['eval_loss'] == pytest.approx(expected.loss, rel=1e-4)
    assert scratch.rows[-1]['eval_top1'] == pytest.approx(expected.top1)


def test_train_resumed_ends_where_uninterrupted_does(folder, uninterrupted):
    halfway = uninterrupted.folder / 'checkpoint-7.pth.tar'
    resumed = train(folder, 'resumed', *VARIANT, *RESUMABLE, '--resume', halfway)
    assert [row['epoch'] for row in resumed.rows] == list(range(8, 16))
    assert [row['lr'] for row in resumed.rows] == [row['lr'] for row in uninterrupted.rows[8:]]
    for key in ('state_dict', 'state_dict_ema'):
        moved = largest_difference(load(halfway)[key], uninterrupted.last[key])
        assert largest_difference(resumed.last[key], uninterrupted.last[key]) < 1e-4 * moved
    for state, expected in zip(*(run.last['optimizer']['state'].values() for run in (resumed, uninterrupted))):
        assert state['step'] == expected['step'] == 16
        torch.testing.assert_close(state['exp_avg_sq'], expected['exp_avg_sq'], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize('flags', [
    pytest.param(['--initial-checkpoint'], marks=slow),
    ['--pretrained', '--pretrained-path'],
], ids=' '.join)
def test_train_from_a_checkpoint(folder, uninterrupted, flags):
    # Running statistics are frozen too, and timm starts from averaged weights if there are any.
    run = train(
        folder, flags[-1].strip('-'), *VARIANT, *FROZEN, '--bn-momentum', '0',
        *flags, uninterrupted.folder / 'last.pth.tar')
    expected = dict(uninterrupted.last['state_dict_ema'])
    actual = dict(run.last['state_dict'])
    for key in [key for key in expected if key.endswith('num_batches_tracked')]:
        assert actual.pop(key) == expected.pop(key) + 5
    if '--pretrained' in flags:
        # train.py requests another number of classes, and so a new head.
        assert largest_difference({0: actual.pop('head.weight')}, {0: expected.pop('head.weight')}) > 0.01
        del actual['head.bias'], expected['head.bias']
    assert_equal(actual, expected, tolerance=1e-7)


def test_train_pretrained_from_the_hub(folder, tmp_path):
    """Weights of a published model, from a local server with the Hub's protocol."""
    torch.manual_seed(7)
    published = timm.create_model('convmixer_768_32', **ARCHITECTURE)
    published.stem[2].running_mean.uniform_()
    with HubServer() as hub:
        hub.add_repo('timm/convmixer_768_32.in1k').commit({
            'model.safetensors': safetensors.torch.save(published.state_dict())})
        run = train(
            folder, 'pretrained', '--model', 'convmixer_768_32', '--pretrained', *VARIANT[2:], *FROZEN,
            '--bn-momentum', '0', HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET='1', HF_HUB_OFFLINE='0',
            HF_HOME=str(tmp_path))
        assert '/timm/convmixer_768_32.in1k/resolve/main/model.safetensors' in hub.sent('HEAD')
    actual, expected = dict(run.last['state_dict']), published.state_dict()
    assert actual['head.weight'].shape == (10, 16)
    for key in list(expected):
        if key.startswith('head.') or key.endswith('num_batches_tracked'):
            del actual[key], expected[key]
    assert_equal(actual, expected, tolerance=1e-7)


@pytest.mark.parametrize('flags,message', [
    (['--model-kwargs', 'kernal_size=3'], "unexpected keyword argument 'kernal_size'; did you mean 'kernel_size'?"),
    *(pytest.param(flags, message, marks=slow) for flags, message in (
        (['--model-kwargs', 'act_layer=gleu'], "Unknown act_layer='gleu'; give a name that timm knows"),
        (['--drop-path', '1.5'], 'drop_path_rate=1.5 must be a finite number of at least 0 and less than 1'),
        (['--input-size', '3', '4', '4'], "Kernel size can't be greater than actual input size"),
        (['--in-chans', '1'], 'to have 1 channels, but got 3 channels instead'),
    )),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_train_names_what_is_wrong(folder, flags, message):
    variant = [*VARIANT, *flags] if flags[0] != '--model-kwargs' else [*VARIANT[:2], *VARIANT[5:], *flags]
    assert message in call(folder, 'train.py', *TRAIN, '--experiment', 'wrong', *variant, '--epochs', '1', status=1)


def test_train_flags_of_the_model(folder):
    run = train(
        folder, 'flags', *VARIANT, *FROZEN,
        '--bn-momentum', '0', '--bn-eps', '0.5', '--head-init-scale', '3', '--grad-accum-steps', '2')
    torch.manual_seed(42)
    model = create_variant(bn_eps=0.5)
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.head.bias.mul_(3)
    expected = model.state_dict()
    for key in expected:
        if key.endswith('num_batches_tracked'):
            expected[key] += 5
    assert_equal(run.last['state_dict'], expected, tolerance=1e-7)
    with_flag, without = (create_variant(bn_eps=eps) for eps in (0.5, None))
    for model in (with_flag, without):
        model.load_state_dict(expected)
    loss = run.rows[-1]['eval_loss']
    assert loss == pytest.approx(evaluate(with_flag, folder, input_size=(3, 32, 32)).loss, rel=1e-4)
    assert loss != pytest.approx(evaluate(without, folder, input_size=(3, 32, 32)).loss, rel=1e-3)
    # Five batches, two per update, are three updates.
    assert all(state['step'] == 3 for state in run.last['optimizer']['state'].values())


def test_train_grad_checkpointing_changes_nothing(folder, scratch):
    plain, checkpointed = (
        train(folder, name, *VARIANT, '--epochs', '1', '--drop', '0.1', '--drop-path', '0.3', *flags).last['state_dict']
        for name, flags in (('drop', []), ('drop-checkpointing', ['--grad-checkpointing']))
    )
    assert_equal(checkpointed, plain)
    assert largest_difference(plain, load(scratch.folder / 'checkpoint-0.pth.tar')['state_dict']) > 1e-3


@slow
def test_train_compiled_in_channels_last(folder, scratch):
    run = train(folder, 'compiled', *VARIANT, '--epochs', '1', '--torchcompile', '--channels-last')
    assert 'backend=inductor' in run.log
    # train.py saves the module inside the compiled one, with plain keys.
    assert_equal(run.last['state_dict'], load(scratch.folder / 'checkpoint-0.pth.tar')['state_dict'], tolerance=1e-3)


def test_train_fine_tuning_shipped_weights(folder):
    run = train(
        folder, 'fine-tuned', '--model', 'test_convmixer', '--pretrained', '--epochs', '2', '--lr', '1e-3',
        '--layer-decay', '0.5', '--model-ema', '--model-ema-decay', '0.9', '--amp', '--amp-dtype', 'bfloat16')
    assert 'Using native Torch AMP' in run.log
    # Groups of the stem, four blocks and the head, each with and without weight decay.
    groups = run.last['optimizer']['param_groups']
    assert sorted({group['lr_scale'] for group in groups}) == [0.5 ** power for power in range(5, -1, -1)]
    assert len(groups) == 12
    # Of stem and blocks: convolution weights; then biases and BatchNorm parameters.
    assert sorted((group['lr_scale'], len(group['params'])) for group in groups if group['weight_decay']) == [
        (0.5 ** 5, 1), *((0.5 ** power, 2) for power in range(4, 0, -1)), (1., 1)]
    raw, averaged = run.last['state_dict'], run.last['state_dict_ema']
    shipped = timm.create_model('test_convmixer', pretrained=True).state_dict()
    assert 0 < largest_difference({0: averaged['head.weight']}, {0: shipped['head.weight']}) \
        < largest_difference({0: raw['head.weight']}, {0: shipped['head.weight']})
    assert all(value.dtype == shipped[key].dtype for key, value in raw.items())
    assert run.rows[-1]['eval_top1'] > 95


@slow
@pytest.mark.parametrize('student,flags', [
    (VARIANT, ['--kd-distill-type', 'logit', '--task-loss-weight', '0']),
    (['--model', 'test_resnet', '--input-size', '3', '32', '32', '--num-classes', '10'],
     ['--kd-distill-type', 'feature', '--distill-loss-weight', '10']),
], ids=['logits to a ConvMixer', 'features to a ResNet'])
def test_train_distillation(folder, student, flags):
    run = train(folder, f'distilled-{flags[1]}', *student, *flags, '--kd-model-name', 'test_convmixer', '--epochs', '9')
    assert 'DistillationTask' in run.log
    losses = [row['train_loss'] for row in run.rows]
    assert losses[-1] < 0.8 * losses[0]
    # Without a task loss the student learns only from the teacher.
    assert run.rows[-1]['eval_top1'] > 40
    assert 'teacher' not in ' '.join(run.last['state_dict'])


@pytest.mark.parametrize('name,flags', [
    pytest.param('digits', ['--epochs', '1'], marks=slow),
    # At the recipe's magnitudes timm sometimes posterizes to 0 bits, an error in Pillow 13.
    ('imagenet', [
        *VARIANT, '--amp-dtype', 'bfloat16', '--aa', 'rand-m9-inc1', '--epochs', '1', '--warmup-epochs', '1',
    ]),
], ids=['digits', 'imagenet'])
def test_train_with_a_recipe(folder, name, flags):
    path = next(path for path in RECIPES if path.stem == name)
    output = call(
        folder, 'train.py', '--config', path, '--data-dir', 'digits', '--device', 'cpu', '--workers', '1',
        '--batch-size', '16', '--output', 'runs', '--experiment', name, *flags)
    recipe, run = yaml.safe_load(path.read_text()), folder / 'runs' / name
    used = yaml.safe_load((run / 'args.yaml').read_text())
    changed = {'data_dir', 'workers', 'batch_size', *(flag[2:].replace('-', '_') for flag in flags if flag[:2] == '--')}
    assert {key: used[key] for key in recipe if key not in changed} == {
        key: value for key, value in recipe.items() if key not in changed}
    assert f'LR stepped per {"update" if recipe.get("sched_on_updates") else "epoch"}' in output
    with open(run / 'summary.csv') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == used['epochs'] + (used['warmup_epochs'] if used['warmup_prefix'] else 0)
    assert all(math.isfinite(float(row['train_loss'])) for row in rows)
    assert load(run / 'last.pth.tar')['arch'] == used['model']


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipe_through_the_parser_of_train(recipe, monkeypatch):
    script = load_script(SCRIPTS / 'train.py')
    actions = {action.dest: action for action in script.parser._actions}
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(recipe)])
    args, _ = script._parse_args()
    settings = yaml.safe_load(recipe.read_text())
    # The parser silently accepts unknown keys and values of any type.
    assert not settings.keys() - actions.keys()
    for key, value in settings.items():
        assert getattr(args, key) == value
        values = value if isinstance(value, list) else [value]
        if actions[key].type in (int, float):
            assert all(actions[key].type(item) == item and not isinstance(item, (bool, str)) for item in values), key
        assert isinstance(value, list) == (actions[key].nargs in ('+', 3)), key
        assert isinstance(value, bool) == isinstance(actions[key].const, bool), key
    assert timm.is_model(args.model)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs: nccl, and SyncBatchNorm is for GPUs')
def test_train_on_several_gpus(folder):
    """One process per GPU, each with a share of the batch, gives the result of one process."""
    processes = torch.cuda.device_count()
    flags = [*TRAIN, *VARIANT, '--device', 'cuda', '--epochs', '3', '--smoothing', '0']
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    single = [sys.executable, SCRIPTS / 'train.py', *flags, '--experiment', 'one-gpu', '--batch-size', '80']
    several = [
        sys.executable, *torchrun, SCRIPTS / 'train.py', *flags, '--experiment', 'several-gpus', '--sync-bn',
        '--batch-size', 80 // processes,
    ]
    outputs = []
    for command in (single, several):
        command = [str(part) for part in command]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, result.stderr[-4000:]
        outputs.append(result.stderr + result.stdout)
    assert f'total {processes}' in outputs[1] and 'Synchronized BatchNorm' in outputs[1]
    one, many = (load(folder / 'runs' / name / 'last.pth.tar')['state_dict'] for name in ('one-gpu', 'several-gpus'))
    create_variant().load_state_dict(many)
    if 80 % processes == 0:
        torch.manual_seed(42)
        moved = largest_difference(create_variant().state_dict(), one)
        assert largest_difference(one, many) < 0.05 * moved


# Validation, inference, benchmark


def validate(folder: Path, *flags: Any) -> SimpleNamespace:
    output = call(
        folder, 'validate.py', '--data-dir', 'digits', '--device', 'cpu', '--workers', '1', '--batch-size', '80',
        *flags)
    loss, = re.findall(r'Loss: +[\d.]+ \(([\d.]+)\)', output)
    return SimpleNamespace(loss=float(loss), log=output, **results(output))


@pytest.mark.parametrize('flags', [
    pytest.param([], marks=slow),
    pytest.param(['--use-ema'], marks=slow),
    ['--use-ema', '--reparam'],
    pytest.param(['--torchcompile'], marks=slow),
], ids=lambda flags: ' '.join(flags) or 'plain')
def test_validate(folder, uninterrupted, flags):
    checkpoint = uninterrupted.folder / 'last.pth.tar'
    validated = validate(folder, *VARIANT, '--checkpoint', checkpoint, *flags)
    expected, other = [], []
    for use_ema, found in ((False, other), (True, expected)) if '--use-ema' in flags else (
            (False, expected), (True, other)):
        model = create_variant()
        load_checkpoint(model, str(checkpoint), use_ema=use_ema)
        found.append(evaluate(model, folder, input_size=(3, 32, 32)))
    assert validated.loss == pytest.approx(expected[0].loss, abs=2e-4)
    assert validated.loss != pytest.approx(other[0].loss, abs=0.01)
    assert validated.top1 == pytest.approx(expected[0].top1, abs=1e-3)


@slow
def test_validate_test_time_pooling(folder):
    """At twice the image size, timm classifies windows of the training size and pools their logits."""
    validated = validate(folder, '--model', 'test_convmixer', '--img-size', '64', '--test-pool')
    model = timm.create_model('test_convmixer', pretrained=True).eval()
    pooled, _ = timm.layers.apply_test_time_pool(model, dict(input_size=(3, 64, 64)))
    expected = evaluate(pooled, folder, input_size=(3, 64, 64), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    assert 'using test time pooling' in validated.log
    assert validated.crop_pct == 1.0 and validated.img_size == 64
    assert validated.loss == pytest.approx(expected.loss, abs=1e-3)
    assert validated.top1 == pytest.approx(expected.top1, abs=1e-3)


@slow
def test_inference(folder):
    pytest.importorskip('pandas')
    output = call(
        folder, 'inference.py', '--data-dir', 'digits', '--model', 'test_convmixer', '--device', 'cpu',
        '--workers', '1', '--batch-size', '80', '--label-type', 'name', '--include-index', '--fullname',
        '--results-file', 'predictions')
    expected = evaluate(timm.create_model('test_convmixer', pretrained=True), folder)
    with open(folder / 'predictions.csv') as file:
        rows = list(csv.DictReader(file))
    assert [int(row['index']) for row in rows] == expected.predictions.tolist()
    correct = [row['label'] == Path(row['filename']).parent.name for row in rows]
    assert 100 * sum(correct) / len(correct) == pytest.approx(expected.top1) and expected.top1 > 95
    assert all(0 < float(row['prob']) <= 1 for row in rows)
    assert len(results(output)) == 80


@slow
def test_benchmark(folder):
    measured = results(call(
        folder, 'benchmark.py', '--model', 'convmixer_512_12_ks8_p7', '--model-kwargs', 'dim=16', 'depth=2',
        '--img-size', '32', '--device', 'cpu', '--batch-size', '4', '--num-warm-iter', '1', '--num-bench-iter', '5',
        '--bench', 'both', '--grad-checkpointing'))
    assert measured['infer_samples_per_sec'] > 0 and measured['train_samples_per_sec'] > 0
    assert (measured['infer_img_size'], measured['train_batch_size'], measured['param_count']) == (32, 4, 0.02)


# Checkpoints


@slow
def test_average_checkpoints(folder, uninterrupted):
    call(folder, 'avg_checkpoints.py', '--input', uninterrupted.folder, '--filter', 'checkpoint-*.pth.tar', '-n', '2',
         '--no-use-ema', '--output', 'averaged.safetensors', '--safetensors')
    checkpoints = {str(path): load(path) for path in uninterrupted.folder.glob('checkpoint-*.pth.tar')}
    assert len(checkpoints) == 16
    order = sorted(checkpoints, key=lambda path: (checkpoints[path]['metric'], path))
    best = [checkpoints[path] for path in order[-2:]]
    model = create_variant()
    load_checkpoint(model, str(folder / 'averaged.safetensors'))
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(checkpoint['state_dict'][key] for checkpoint in best) / 2)


@pytest.mark.parametrize(
    'flags', [[], pytest.param(['--no-use-ema', '--safetensors'], marks=slow)], ids=['average', 'safetensors'])
def test_clean_checkpoint(folder, uninterrupted, flags):
    suffix = '.safetensors' if flags else '.pth'
    call(folder, 'clean_checkpoint.py', '--checkpoint', uninterrupted.folder / 'last.pth.tar',
         '--output', f'clean{suffix}', '--no-hash', *flags)
    model = create_variant()
    load_checkpoint(model, str(folder / f'clean{suffix}'))
    assert_equal(model.state_dict(), uninterrupted.last['state_dict' if flags else 'state_dict_ema'])


# Export


@slow
@pytest.mark.parametrize('flags', [[], ['--reparam', '--dynamo']], ids=['traced', 'reparam dynamo'])
def test_onnx(folder, flags):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    if flags:
        pytest.importorskip('onnxscript')
        # The scripts import timm from their own checkout.
        source = SCRIPTS / 'timm' / 'utils' / 'onnx.py'
        removed = not hasattr(torch.onnx, 'dynamo_export')  # in PyTorch 2.9, while timm still uses it
        if removed and source.exists() and "hasattr(torch.onnx, 'dynamo_export')" not in source.read_text():
            pytest.skip("this checkout's timm exports by torch.onnx.dynamo_export, which this PyTorch has no longer")
    # onnx_export.py has no --model-kwargs, so it can only export variants of their own size.
    path = f'{len(flags)}.onnx'
    call(folder, 'onnx_export.py', path, '--model', 'test_convmixer', '--batch-size', '2', '--check-forward', *flags)
    output = call(
        folder, 'onnx_validate.py', 'digits', '--onnx-input', path, '--workers', '1', '--batch-size', '40',
        '--img-size', '32', '--crop-pct', '1.0', '--interpolation', 'bicubic',
        '--mean', '0.5', '0.5', '0.5', '--std', '0.5', '0.5', '0.5')
    top1 = float(re.search(r'\* Prec@1 ([\d.]+)', output)[1])
    assert top1 == pytest.approx(evaluate(timm.create_model('test_convmixer', pretrained=True), folder).top1, abs=1e-3)
