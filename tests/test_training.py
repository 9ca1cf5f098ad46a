"""What timm's train.py and validate.py do with a model, through timm's library.

test_scripts.py runs the scripts themselves, and needs a checkout.
"""
import argparse
import copy
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import FastCollateMixup, Mixup, create_dataset, create_loader
from timm.layers import (
    apply_test_time_pool,
    convert_splitbn_model,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils import (
    CheckpointSaver,
    ModelEmaV3,
    NativeScaler,
    ParseKwargs,
    dispatch_clip_grad,
    freeze,
    unfreeze,
)

from timm_convmixer.digits import load_digits

NAME = 'convmixer_512_12_ks8_p7'


pytestmark = pytest.mark.usefixtures('small_maps')


def create(**kwargs) -> nn.Module:
    """Create a small model of a variant that timm lacks, with all arguments that train.py passes."""
    arguments = dict(
        pretrained=False,
        in_chans=3,
        num_classes=10,
        drop_rate=0.,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path='',
        dim=16,
        depth=2,
    )
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**arguments, **kwargs})


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('digits')
    for label in range(10):
        (root / 'train' / str(label)).mkdir(parents=True)
    for index, (image, label) in enumerate(load_digits()['train'][:160]):
        image.save(root / 'train' / str(label) / f'{index:03d}.png')
    return root


@pytest.fixture(scope='module')
def batches(folder):
    """Four batches of images ``(40, 3, 32, 32)`` and their labels."""
    loader = create_loader(
        create_dataset('', folder, split='train', is_training=True),
        input_size=(3, 32, 32),
        batch_size=40,
        is_training=True,
        no_aug=True,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
    )
    torch.manual_seed(0)
    return list(loader)


def train(model, optimizer, batches, loss_fn=F.cross_entropy, autocast=None, ema=None, clip_grad=1.0):
    """Train on the batches in order, as train_one_epoch does, and return the losses."""
    model.train()
    losses = []
    for images, labels in batches:
        with torch.autocast('cpu', dtype=autocast, enabled=autocast is not None):
            loss = loss_fn(model(images), labels)
        loss.backward()
        dispatch_clip_grad(model_parameters(model), value=clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if ema is not None:
            ema.update(model, step=len(losses))
    return losses


def test_batches_take_the_fast_path(batches):
    assert create().route(batches[0][0]).reason == 'gradients are needed; every layer is plain'


def adamw(model, **kwargs):
    return create_optimizer_v2(model, opt='adamw', lr=0.01, weight_decay=2e-5, eps=1e-3, **kwargs)


def assert_states_equal(first: nn.Module, second: nn.Module, tolerance: float = 0.) -> None:
    assert list(first.state_dict()) == list(second.state_dict())
    for (key, value), expected in zip(first.state_dict().items(), second.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f'{key}: {text}')


def test_trains_from_scratch_on_digits(batches):
    model = create(drop_rate=0.1, drop_path_rate=0.1)
    losses = train(model, adamw(model), batches * 10)
    assert losses[-1] < 0.3 * losses[0]
    with torch.no_grad():
        assert (model.eval()(batches[0][0]).argmax(dim=1) == batches[0][1]).float().mean() > 0.8


def test_arguments_of_train_reach_the_model():
    model = create(drop_rate=0.2, drop_path_rate=0.3, bn_momentum=0.05, bn_eps=1e-3, global_pool='catavgmax')
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.05, 1e-3)}
    assert model.head_drop.p == 0.2
    assert model.blocks[-1][0].fn[3].drop_prob == pytest.approx(0.3)
    assert model.get_classifier().weight.shape == (10, 32)


@pytest.mark.parametrize('flag,message', [
    ('kernal_size=3', "unexpected keyword argument 'kernal_size'; did you mean 'kernel_size'"),
    ('act_layer=gleu', "Unknown act_layer='gleu'; give a name that timm knows"),
    ('norm_layer=batchnorm3d', "Unknown norm_layer='batchnorm3d'; give a name that timm knows"),
    ('dim=2.5', r'dim=2\.5 must be an integer of at least 1'),
    ('patch_size=0', 'patch_size=0 must be an integer of at least 1'),
])
def test_bad_model_kwargs_are_named(flag, message):
    """Values go through the parser of ``--model-kwargs``."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)
    with pytest.raises((TypeError, ValueError), match=message):
        create(**parser.parse_args(['--model-kwargs', flag]).model_kwargs)


def test_head_init():
    """``--head-init-scale`` and ``--head-init-bias``, for which train.py calls ``get_classifier()``."""
    model, expected = create(), create()
    with torch.no_grad():
        model.get_classifier().weight.mul_(0.5)
        nn.init.constant_(model.get_classifier().bias, 3.)
    x = torch.randn(2, 3, 32, 32)
    features = expected.forward_head(expected.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), 0.5 * features @ expected.head.weight.T + 3.)


def test_layer_decay_groups():
    model = create(depth=3)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.01, weight_decay=0.05, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {
        names[parameter]: (group['lr_scale'], group['weight_decay'])
        for group in optimizer.param_groups for parameter in group['params']
    }
    assert scales.keys() == set(names.values())
    for name, (scale, weight_decay) in scales.items():
        part = name.split('.')
        depth = {'stem': 0, 'blocks': 1 + int(part[1]) if part[0] == 'blocks' else None, 'head': 4}[part[0]]
        assert scale == 0.5 ** (4 - depth), name
        assert weight_decay == (0.05 if model.get_parameter(name).ndim > 1 else 0.), name
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=10)
    scheduler.step(5)
    assert [group['lr'] / group['lr_scale'] for group in optimizer.param_groups] == pytest.approx([0.005] * 10)


def test_head_parameters_come_last():
    # --clip-mode agc excludes the last two parameters, which timm assumes to be the classifier.
    model = create()
    clipped = list(model_parameters(model, exclude_head=True))
    assert len(clipped) == len(list(model.parameters())) - 2
    assert not {id(parameter) for parameter in clipped} & {id(p) for p in model.get_classifier().parameters()}


def test_resume_is_exact(batches, tmp_path):
    """A checkpoint preserves weights, running statistics, averaged weights and optimizer state exactly."""
    def setup():
        model = create(bn_momentum=0.2)
        return model, adamw(model), ModelEmaV3(model, decay=0.9)

    model, optimizer, ema = setup()
    train(model, optimizer, batches, ema=ema)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=1.0)
    halfway = copy.deepcopy(model)
    train(model, optimizer, batches, ema=ema)

    resumed, resumed_optimizer, _ = setup()
    assert resume_checkpoint(resumed, str(tmp_path / 'last.pth.tar'), resumed_optimizer) == 1
    resumed_ema = ModelEmaV3(resumed, decay=0.9)
    load_checkpoint(resumed_ema.module, str(tmp_path / 'last.pth.tar'), use_ema=True)
    assert_states_equal(resumed, halfway)
    train(resumed, resumed_optimizer, batches, ema=resumed_ema)
    assert_states_equal(resumed, model)
    assert_states_equal(resumed_ema.module, ema.module)
    assert not torch.equal(ema.module.head.weight, model.head.weight)


@pytest.mark.parametrize('route', ['initial-checkpoint', 'pretrained-path'])
def test_start_from_a_checkpoint(batches, tmp_path, route):
    model = create()
    optimizer = adamw(model)
    train(model, optimizer, batches)
    CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path)).save_checkpoint(epoch=0, metric=1.0)
    path = str(tmp_path / 'last.pth.tar')
    if route == 'initial-checkpoint':
        started = create(checkpoint_path=path)
        assert_states_equal(started, model)
    else:
        started = create(pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=-1), num_classes=5)
        assert started.head.weight.shape == (5, 16)
        started.head, model.head = nn.Identity(), nn.Identity()
        assert_states_equal(started, model)


def test_average_of_weights_follows_them(batches):
    model = create()
    first = copy.deepcopy(model)
    ema = ModelEmaV3(model, decay=0.75)
    train(model, adamw(model), batches)
    ema.update(model)
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first.state_dict()[key] + 0.25 * model.state_dict()[key])
            assert not torch.equal(value, model.state_dict()[key])


def test_grad_accumulation_with_frozen_statistics(batches):
    """Without batch statistics, accumulating two halves of a batch gives the gradients of the whole."""
    images, labels = batches[0]
    whole, halves = create(), create()
    for model, parts in ((whole, [slice(None)]), (halves, [slice(0, 20), slice(20, 40)])):
        train(model, adamw(model), batches)
        frozen = freeze_batch_norm_2d(model)
        for part in parts:
            (F.cross_entropy(frozen(images[part]), labels[part]) / len(parts)).backward()
    for (name, expected), actual in zip(whole.named_parameters(), halves.parameters()):
        assert actual.grad is not None, name
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_freeze_and_unfreeze(batches):
    """Modules frozen by timm's group names keep their weights and statistics."""
    model = create()
    train(model, adamw(model), batches)
    expected = model.eval()(batches[0][0])
    before = copy.deepcopy(model.state_dict())
    freeze(model, ['stem', 'blocks.0'])
    frozen = [*model.stem.modules(), *model.blocks[0].modules()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen)
    torch.testing.assert_close(model(batches[0][0]), expected)
    train(model, adamw(model), batches)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(('blocks.1', 'head'))}
    unfreeze(model)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 5
    assert list(model.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize('checkpointing', [False, True], ids=['', 'grad_checkpointing'])
def test_bfloat16_autocast(batches, checkpointing):
    model = create()
    model.set_grad_checkpointing(checkpointing)
    losses = train(model, adamw(model), batches * 3, autocast=torch.bfloat16)
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert model.eval().forward_features(batches[0][0]).dtype == torch.bfloat16


def test_loss_scaler(batches):
    """NativeScaler, for float16, clips unscaled gradients, so that its step equals a step without it."""
    scaled, plain = create(), create()
    optimizer = adamw(scaled)
    scaler = NativeScaler(device='cpu')
    scaled.train()
    for images, labels in batches:
        loss = F.cross_entropy(scaled(images), labels)
        scaler(loss, optimizer, clip_grad=0.5, parameters=model_parameters(scaled))
        optimizer.zero_grad()
    train(plain, adamw(plain), batches, clip_grad=0.5)
    assert scaler.state_dict()['scale'] >= 1
    assert_states_equal(scaled, plain, tolerance=1e-5)


def test_channels_last(batches):
    plain, channels_last = create(), create().to(memory_format=torch.channels_last)
    train(plain, adamw(plain), batches)
    train(channels_last, adamw(channels_last), [
        (images.contiguous(memory_format=torch.channels_last), labels) for images, labels in batches])
    assert_states_equal(channels_last, plain, tolerance=1e-3)


def test_compiled_training_step_has_no_graph_break(batches):
    torch._dynamo.reset()
    plain, compiled = create(), create()
    train(plain, adamw(plain), batches)
    train(torch.compile(compiled, backend='aot_eager', fullgraph=True), adamw(compiled), batches)
    assert_states_equal(compiled, plain, tolerance=1e-4)


def test_mixup_in_the_loader(folder):
    """RandAugment, random erasing, mixup and cutmix of the ImageNet recipe, as train.py builds them."""
    mixup = dict(mixup_alpha=0.5, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=10)
    loader = create_loader(
        create_dataset('', folder, split='train', is_training=True),
        input_size=(3, 32, 32),
        batch_size=40,
        is_training=True,
        # Without the recipe's mstd0.5: at a magnitude of 10 timm posterizes to 0 bits, an error in Pillow 13.
        auto_augment='rand-m9-inc1',
        re_prob=0.25,
        re_mode='pixel',
        num_workers=0,
        persistent_workers=False,
        collate_fn=FastCollateMixup(**mixup),
        device=torch.device('cpu'),
    )
    model = create()
    losses = train(model, adamw(model), loader, loss_fn=SoftTargetCrossEntropy())
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    images, labels = next(iter(loader))
    mixed, targets = Mixup(**mixup)(images, labels.argmax(dim=1))
    assert targets.shape == (40, 10)
    assert SoftTargetCrossEntropy()(model(mixed), targets).isfinite()


@pytest.mark.parametrize('task_class', [LogitDistillationTask, FeatureDistillationTask])
@pytest.mark.parametrize('student', [NAME, 'test_resnet'])
def test_distillation_from_a_convmixer(batches, student, task_class):
    model = create() if student == NAME else timm.create_model(student, num_classes=10)
    task = task_class(
        student_model=model, teacher_model='test_convmixer', criterion=nn.CrossEntropyLoss(), task_loss_weight=0.5)
    # timm 1.0.26 cannot exclude the teacher, but the teacher gets no gradient.
    optimizer = adamw(getattr(task, 'trainable_module', task))
    teacher = copy.deepcopy(task.teacher.state_dict())
    losses = []
    for images, labels in batches * 4:
        result = task(images, labels)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result['loss'].item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(value, teacher[key]) for key, value in task.teacher.state_dict().items())


@pytest.mark.parametrize('task_class', [LogitDistillationTask, FeatureDistillationTask])
def test_distillation_into_a_convmixer(batches, task_class):
    model = create()
    teacher = timm.create_model('test_resnet', num_classes=10)
    task = task_class(
        student_model=model, teacher_model=teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=0.)
    task(*batches[0])['loss'].backward()
    # The features come from before the head, which therefore gets no gradient.
    reached = {name for name, parameter in model.named_parameters() if parameter.grad.any()}
    expected = {name for name, _ in model.named_parameters()}
    assert reached == (expected if task_class is LogitDistillationTask else expected - {'head.weight', 'head.bias'})


def test_sync_batchnorm_conversion(batches):
    model = create()
    train(model, adamw(model), batches)
    expected, keys = model.eval()(batches[0][0]), list(model.state_dict())
    converted = convert_sync_batchnorm(model)
    norms = [module for module in converted.modules() if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm))]
    assert len(norms) == 5 and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(converted.state_dict()) == keys
    torch.testing.assert_close(converted.eval()(batches[0][0]), expected)
    create().load_state_dict(converted.state_dict())


def test_split_batchnorm_conversion(batches):
    model = create()
    model.load_state_dict({
        key: value for key, value in convert_splitbn_model(create(), 2).state_dict().items() if 'aux_bn' not in key})
    split = convert_splitbn_model(create(), 2).train()
    split(batches[0][0])
    norm = split.blocks[0][3]
    assert not torch.equal(norm.running_mean, norm.aux_bn[0].running_mean)


@pytest.mark.parametrize('patch_size', [None, 8])
def test_test_time_pooling(patch_size):
    """At a larger image size, ``--test-pool`` classifies windows of the training size."""
    kwargs = {} if patch_size is None else dict(patch_size=patch_size)
    model = timm.create_model('test_convmixer', **kwargs).eval()
    window = 32 // model.patch_size
    assert model.default_cfg['pool_size'] == (window, window)
    given = timm.create_model('test_convmixer', pretrained_cfg_overlay=dict(pool_size=(5, 5)), **kwargs)
    assert given.default_cfg['pool_size'] == (5, 5)
    same, pooled = apply_test_time_pool(model, dict(input_size=(3, 32, 32)))
    assert same is model and not pooled
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.forward_features(x)
        windows = F.avg_pool2d(features, window, stride=1)
        logits = model.head(windows.permute(0, 2, 3, 1)).flatten(1, 2)
        # timm pools the windows' logits by the mean of average and maximum.
        expected = (logits.mean(dim=1) + logits.amax(dim=1)) / 2
        model, pooled = apply_test_time_pool(model, dict(input_size=(3, 48, 48)))
        assert pooled
        torch.testing.assert_close(model(x), expected)
