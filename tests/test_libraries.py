"""What libraries do to a ConvMixer, done to ours and to timm's alike: a route through the surgery of surgery.py.

Each test skips where its library is not installed: ``pip install 'timm-convmixer[libraries]'``. README.md beside this
file lists versions and outcomes.
"""
import logging
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from surgery import Case, Program, differences

pytestmark = pytest.mark.filterwarnings('ignore')

LABELS = torch.tensor([1, 2, 3])  # one an image
Results = Dict[str, Optional[torch.Tensor]]
Usage = Callable[[Case, torch.Tensor], Results]


def library(name: str) -> ModuleType:
    return pytest.importorskip(name, reason=f"needs {name}: pip install 'timm-convmixer[libraries]'")


def check(usages: Dict[str, Usage], way: str, *sizes: str) -> None:
    """Compare what usages of a library give for our model and for timm's, at sizes where the fast paths run."""
    def seeded(usage: Usage) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            random.seed(0)
            np.random.seed(0)
            return usage(case, x)

        return run

    failed = []
    for name, usage in usages.items():
        for size in sizes or ('relu', 'gelu'):
            found = differences(Program((), way, size, run=seeded(usage)))
            failed += [f'{name}, {size}: {text}' for text in found]
    assert not failed, '\n'.join(failed)


def named(value: Any, name: str = 'output') -> Results:
    """Tensors of a nested result by name."""
    if isinstance(value, dict):
        return {key: item for label, part in value.items() for key, item in named(part, f'{name} {label}').items()}
    if isinstance(value, (tuple, list)):
        return named(dict(enumerate(value)), name)
    if isinstance(value, torch.Tensor):
        value = value.detach().as_subclass(torch.Tensor)
    elif value is not None:
        value = torch.as_tensor(value)
    return {name: value}


def parameters(model: nn.Module) -> Results:
    """Of a model that may have been trained. Its buffers are compared in any case."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def count(case: Case, label: str, counted: Any) -> None:
    """Note something that must be exactly the same."""
    if isinstance(counted, dict):
        counted = sorted((str(key), value) for key, value in counted.items())
    case.calls[f'{label}: {counted}'] += 1


def batches(x: torch.Tensor) -> DataLoader:
    x = x.detach()
    return DataLoader(TensorDataset(torch.cat([x, 1.5 * x.flip(0)]), torch.cat([LABELS, LABELS])), batch_size=len(x))


# What can be cut open: of the inference form there are the stem, the blocks and the pooling alone.
LAYERS: Dict[str, Callable[[nn.Module], nn.Module]] = {
    'the last block': lambda model: model.blocks[-1],
    'the stem': lambda model: model.stem,
    'the branch': lambda model: model.blocks[-1][0].fn,
    'the depthwise convolution': lambda model: model.blocks[0][0].fn[0],
    'the last normalisation of the first block': lambda model: model.blocks[0][3],
}


def layers(way: str) -> Dict[str, Callable[[nn.Module], nn.Module]]:
    return dict(list(LAYERS.items())[:2] if way == 'reparam' else LAYERS)


@pytest.mark.parametrize('way', ['train', 'eval', 'reparam'])
def test_grad_cam(way):
    cams = library('pytorch_grad_cam')
    from pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    targets = [ClassifierOutputTarget(label) for label in LABELS.tolist()]

    def explain(method: str, find: Sequence[Callable], **kwargs) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            training = case.model.training
            with getattr(cams, method)(model=case.model, target_layers=[layer(case.model) for layer in find]) as cam:
                case.model.train(training)  # the constructor ends it
                return dict(cam=torch.as_tensor(cam(input_tensor=x, targets=targets, **kwargs)), logits=cam.outputs)

        return run

    usages = {
        f'{method} of {name}': explain(method, [find])
        for method in ('GradCAM', 'GradCAMPlusPlus', 'HiResCAM', 'LayerCAM', 'GradCAMElementWise')
        for name, find in layers(way).items()
    }
    last, first = LAYERS['the last block'], LAYERS['the stem']
    usages['GradCAM of two layers'] = explain('GradCAM', [first, last])
    usages['GradCAM smoothed'] = explain('GradCAM', [last], aug_smooth=True)
    usages.update({method: explain(method, [last]) for method in ('XGradCAM', 'ScoreCAM', 'AblationCAM', 'RandomCAM')})
    if way != 'reparam':  # biases of other layers
        usages['FullGrad'] = lambda case, x: dict(cam=torch.as_tensor(
            cams.FullGrad(model=case.model, target_layers=[])(input_tensor=x, targets=targets)))
    usages['GuidedBackpropReLUModel'] = lambda case, x: dict(gradient=torch.as_tensor(
        GuidedBackpropReLUModel(model=case.model, device='cpu')(x[:1].detach(), target_category=2)))
    check(usages, way)


@pytest.mark.parametrize('way', ['train', 'eval', 'reparam'])
def test_captum(way):
    attr, robust = library('captum.attr'), library('captum.robust')

    def attribute(method: str, *args: Any, **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            found = getattr(attr, method)(case.model).attribute(x, *args, target=LABELS, **kwargs)
            # Attributions by method are rounded to the largest of them, as gradients are.
            return named(found, 'gradient')

        return run

    def of_layer(method: str, find: Callable, *args: Any, **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            explainer = getattr(attr, method)(case.model, find(case.model))
            return named(explainer.attribute(x, *args, **kwargs), 'gradient')

        return run

    def perturb(method: str, feature_mask: bool = False, **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            if feature_mask:
                kwargs['feature_mask'] = (torch.arange(x.shape[-1]) // 8).expand(1, 1, *x.shape[-2:])
            found = getattr(attr, method)(case.model).attribute(x, target=LABELS, **kwargs)
            # Differences of logits, rounded to those.
            return dict(output=found + case.model(x).abs().max())

        return run

    usages = {
        'Saliency': attribute('Saliency', abs=False),
        'InputXGradient': attribute('InputXGradient'),
        'IntegratedGradients': attribute('IntegratedGradients', n_steps=8),
        'IntegratedGradients in parts': attribute('IntegratedGradients', n_steps=8, internal_batch_size=5),
        'GuidedBackprop': attribute('GuidedBackprop'),
        'Deconvolution': attribute('Deconvolution'),
        'DeepLift': attribute('DeepLift'),
        'GradientShap': lambda case, x: named(attr.GradientShap(case.model).attribute(
            x, baselines=0 * x, target=LABELS, n_samples=4), 'gradient'),
        'DeepLiftShap': lambda case, x: named(attr.DeepLiftShap(case.model).attribute(
            x, baselines=torch.cat([0 * x, x.flip(0)]).detach()[1:5], target=LABELS), 'gradient'),
        'LRP': attribute('LRP'),  # has no rule for some layer of either
        'NoiseTunnel': lambda case, x: named(attr.NoiseTunnel(attr.Saliency(case.model)).attribute(
            x, nt_samples=4, nt_type='smoothgrad_sq', target=LABELS), 'gradient'),
        'Occlusion': perturb('Occlusion', sliding_window_shapes=(3, 8, 8), strides=(3, 8, 8)),
        'FeatureAblation': perturb('FeatureAblation', feature_mask=True, perturbations_per_eval=2),
        'FGSM': lambda case, x: named(robust.FGSM(case.model).perturb(x, 0.01, LABELS)),
        'PGD': lambda case, x: named(robust.PGD(case.model).perturb(x, 0.05, 0.01, 3, LABELS)),
    }
    for name, find in layers(way).items():
        for method in ('LayerGradCam', 'GuidedGradCam', 'LayerGradientXActivation', 'LayerDeepLift'):
            usages[f'{method} of {name}'] = of_layer(method, find, target=LABELS)
        for method in ('LayerConductance', 'InternalInfluence', 'LayerIntegratedGradients'):
            usages[f'{method} of {name}'] = of_layer(method, find, target=LABELS, n_steps=4)
        usages[f'LayerActivation of {name}'] = of_layer('LayerActivation', find)
        usages[f'NeuronGradient of {name}'] = of_layer('NeuronGradient', find, (0, 1, 1))
    check(usages, way)


# Of the inference form, whose layers have no gradients, nobody prunes channels.
@pytest.mark.parametrize('way', ['train', 'eval'])
def test_torch_pruning(way):
    pruning = library('torch_pruning')
    importance = pruning.importance

    def used(case: Case, x: torch.Tensor) -> Results:
        """Outputs and gradients after the surgery, and without gradients."""
        for name, parameter in case.model.named_parameters():
            count(case, name, tuple(parameter.shape))
        count(case, 'MACs and parameters', pruning.utils.count_ops_and_params(case.model, x.detach()))
        output = case.model(x)
        wanted = dict(case.model.named_parameters(), images=x)
        gradients = torch.autograd.grad(output.square().sum(), list(wanted.values()))
        with torch.no_grad():
            return {
                'output': output,
                'output without gradients': case.model(x),
                **{f'gradient of {name}': gradient for name, gradient in zip(wanted, gradients)},
            }

    def prune(make: Callable, pruner: str = 'BasePruner', **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            case.model(x).square().sum().backward()  # Taylor's importance needs gradients
            options = dict(importance=make(), pruning_ratio=0.5, ignored_layers=[case.model.head], **kwargs)
            getattr(pruning.pruner, pruner)(case.model, x.detach(), **options).step()
            return used(case, x)

        return run

    def prune_one(case: Case, x: torch.Tensor) -> Results:
        graph = pruning.DependencyGraph().build_dependency(case.model, example_inputs=x.detach())
        count(case, 'groups', len(list(graph.get_all_groups(ignored_layers=[case.model.head]))))
        group = graph.get_pruning_group(case.model.blocks[0][1], pruning.prune_conv_out_channels, idxs=[2, 6, 9])
        count(case, 'layers', sorted(type(entry.target.module).__name__ for entry, _ in group))
        group.prune()
        return used(case, x)

    check({
        'GroupMagnitudeImportance': prune(importance.GroupMagnitudeImportance),
        'rounded to 4': prune(importance.GroupMagnitudeImportance, round_to=4),
        'one of three steps': prune(importance.GroupMagnitudeImportance, iterative_steps=3),
        'GroupTaylorImportance': prune(importance.GroupTaylorImportance),
        'BNScalePruner': prune(importance.BNScaleImportance, pruner='BNScalePruner'),
        'LAMPImportance, global': prune(importance.LAMPImportance, global_pruning=True),
        'GroupNormPruner': prune(importance.GroupMagnitudeImportance, pruner='GroupNormPruner'),
        'one group': prune_one,
    }, way, 'relu', 'gelu', 'even')


def test_opacus():
    opacus = library('opacus')
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.grad_sample.utils import wrap_model
    from opacus.validators import ModuleValidator

    def fixed(case: Case) -> nn.Module:
        count(case, 'errors', sorted(
            type(error).__name__ for error in ModuleValidator.validate(case.model, strict=False)))
        case.model = ModuleValidator.fix(case.model)
        return case.model

    def per_sample(mode: str) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            if mode == 'ghost':
                model = GradSampleModuleFastGradientClipping(fixed(case), max_grad_norm=1., use_ghost_clipping=True)
            else:
                model = wrap_model(fixed(case), grad_sample_mode=mode)
            output = model(x.detach())
            F.cross_entropy(output, LABELS).backward()
            kept = '_norm_sample' if mode == 'ghost' else 'grad_sample'
            return dict(output=output, **{
                f'gradient of {name.removeprefix("_module.")}': getattr(parameter, kept)
                for name, parameter in model.named_parameters()})

        return run

    def private(mode: str, fix: bool = True) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            model, criterion = fixed(case) if fix else case.model, nn.CrossEntropyLoss()
            made = opacus.PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
                criterion=criterion,
                data_loader=batches(x),
                noise_multiplier=0.5,
                max_grad_norm=1.,
                poisson_sampling=False,
                grad_sample_mode=mode,
                noise_generator=torch.Generator().manual_seed(1),
            )
            wrapped, optimizer, *between, loader = made
            criterion = between[0] if between else criterion
            for images, labels in loader:
                optimizer.zero_grad()
                criterion(wrapped(images), labels).backward()
                optimizer.step()
            return parameters(model)

        return run

    modes = ('hooks', 'functorch', 'ew', 'ghost')
    sizes = ('relu', 'gelu', 'even', 'ks3')
    check({f'per-sample gradients by {mode}': per_sample(mode) for mode in modes}, 'train', *sizes)
    # The others refuse to run outside training.
    check({'per-sample gradients by ew': per_sample('ew')}, 'eval', *sizes)
    check({
        **{f'make_private by {mode}': private(mode) for mode in ('hooks', 'functorch', 'ghost')},
        'make_private with BatchNorm': private('hooks', fix=False),  # which it refuses
    }, 'train')


@pytest.mark.parametrize('way', ['train', 'eval', 'reparam'])
def test_torchattacks(way):
    attacks = library('torchattacks')

    def attack(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            case.model.to(dtype)
            adversarial = getattr(attacks, name)(case.model, **kwargs)(x.detach().sigmoid().to(dtype), LABELS)
            count(case, 'training', case.model.training)
            return dict(output=adversarial)

        return run

    check({
        'FGSM': attack('FGSM', torch.float32),
        'PGD': attack('PGD', torch.float32, steps=4),
        'Square': attack('Square', torch.float32, n_queries=20),
        'OnePixel': attack('OnePixel', torch.float32, steps=2, popsize=4),
        # In double precision: these ask for the signs of gradients that are nearly zero.
        'PGD in double': attack('PGD', steps=4),
        'PGDL2': attack('PGDL2', steps=3),
        'MIFGSM': attack('MIFGSM', steps=3),
        'TPGD': attack('TPGD', steps=3),
        'CW': attack('CW', steps=5),
        'DeepFool': attack('DeepFool', steps=3),
        'APGD': attack('APGD', steps=4),
        'FAB': attack('FAB', steps=3, n_classes=10),
    }, way)


# The inference form has other layers to count.
@pytest.mark.parametrize('way', ['train', 'eval'])
def test_fvcore(way):
    fvcore = library('fvcore.nn')

    def flops(case: Case, x: torch.Tensor) -> Results:
        counter = fvcore.FlopCountAnalysis(case.model, x.detach()).unsupported_ops_warnings(False)
        count(case, 'FLOPs', counter.total())
        count(case, 'FLOPs by module', counter.by_module())
        count(case, 'FLOPs by operator', counter.by_operator())
        count(case, 'not counted', counter.unsupported_ops())
        count(case, 'not called', dict.fromkeys(counter.uncalled_modules()))
        return {}

    def activations(case: Case, x: torch.Tensor) -> Results:
        counter = fvcore.ActivationCountAnalysis(case.model, x.detach()).unsupported_ops_warnings(False)
        count(case, 'activations by module', counter.by_module())
        count(case, 'parameters', fvcore.parameter_count(case.model))
        return {}

    def precise_statistics(case: Case, x: torch.Tensor) -> Results:
        if case.model.training:
            fvcore.update_bn_stats(case.model, [x.detach(), 2 * x.detach().flip(0)], 2)
        return {}

    check(dict(flops=flops, activations=activations, precise_statistics=precise_statistics), way)


@pytest.mark.parametrize('way', ['train', 'eval'])
def test_torchinfo(way):
    torchinfo = library('torchinfo')

    def summarize(**kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            images = {} if 'input_size' in kwargs else dict(input_data=x.detach())
            summary = torchinfo.summary(case.model, verbose=0, depth=9, mode=way, **images, **kwargs)
            for name in ('total_params', 'trainable_params', 'total_mult_adds', 'total_input', 'total_output_bytes'):
                count(case, name, getattr(summary, name))
            count(case, 'layers', [
                (info.var_name, info.depth, *info.input_size, *info.output_size, info.num_params, info.macs)
                for info in summary.summary_list])
            return {}

        return run

    check({'images': summarize(), 'size': summarize(input_size=(2, 3, 112, 112))}, way)


@pytest.mark.parametrize('way', ['train', 'eval', 'reparam'])
def test_lightning(way, monkeypatch):
    lightning = library('lightning')
    from lightning.fabric.utilities.throughput import measure_flops
    from lightning.pytorch import callbacks

    for name in ('lightning', 'lightning.pytorch', 'lightning.fabric'):
        monkeypatch.setattr(logging.getLogger(name), 'disabled', True)
    for name in ('lightning.pytorch.utilities.rank_zero', 'lightning.fabric.utilities.rank_zero'):
        monkeypatch.setattr(logging.getLogger(name), 'disabled', True)

    class Classifier(lightning.LightningModule):

        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model
            self.losses = []

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.detach())
            return loss

        def validation_step(self, batch, index):
            self.log('loss', F.cross_entropy(self.model(batch[0]), batch[1]))

        def predict_step(self, batch, index):
            return self.model(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02, momentum=0.9)

    class Finetuning(callbacks.BaseFinetuning):
        """Freezes statistics as well: it takes ``track_running_stats`` from normalisations."""

        def __init__(self, train_bn: bool):
            super().__init__()
            self.train_bn = train_bn

        def freeze_before_training(self, module):
            self.freeze([module.model.stem, module.model.blocks[0]], train_bn=self.train_bn)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.model.blocks[0], optimizer)

    def trainer(folder: str, **kwargs: Any) -> Any:
        return lightning.Trainer(
            accelerator='cpu',
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **kwargs,
        )

    def fit(make: Callable[[nn.Module], list] = lambda model: [], low_precision: bool = False, **kwargs: Any) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            case.low_precision = low_precision
            module, loader = Classifier(case.model), batches(x)
            with tempfile.TemporaryDirectory() as folder:
                loop = trainer(folder, callbacks=make(case.model), **{'max_epochs': 1, **kwargs})
                loop.fit(module, loader, loader)
                # Normalisations of the validation and after it, of their mode.
                count(case, 'in training mode', [
                    layer.training for layer in case.model.modules() if type(layer) in (nn.Conv2d, nn.BatchNorm2d)])
                results = named([module.losses, dict(loop.callback_metrics), loop.predict(module, loader)])
            return {**results, **parameters(case.model)}

        return run

    def predict(case: Case, x: torch.Tensor) -> Results:
        with tempfile.TemporaryDirectory() as folder:
            return named(trainer(folder).predict(Classifier(case.model), batches(x)))

    def count_flops(case: Case, x: torch.Tensor) -> Results:
        count(case, 'FLOPs', measure_flops(case.model, lambda: case.model(x.detach())))
        return {}

    usages = dict(predict=predict, flops=count_flops)
    if way == 'train':
        usages.update({
            'two steps': fit(max_steps=2, max_epochs=-1),
            'clipped and accumulated': fit(gradient_clip_val=0.5, accumulate_grad_batches=2),
            'bf16-mixed': fit(precision='bf16-mixed', low_precision=True),
            '64-true': fit(precision='64-true'),
            'detect_anomaly': fit(detect_anomaly=True),
            'BaseFinetuning': fit(lambda model: [Finetuning(True)], max_epochs=2),
            'BaseFinetuning, statistics frozen': fit(lambda model: [Finetuning(False)], max_epochs=2),
            'StochasticWeightAveraging': fit(
                lambda model: [callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)], max_epochs=2),
            'EMAWeightAveraging': fit(lambda model: [callbacks.EMAWeightAveraging(decay=0.5)], max_epochs=2),
            'ModelPruning': fit(lambda model: [callbacks.ModelPruning('l1_unstructured', amount=0.3)], max_epochs=2),
        })
    check(usages, way)


@pytest.mark.parametrize('way', ['train', 'eval', 'reparam'])
def test_fastai(way):
    vision = library('fastai.vision.all')
    fastai_hooks, unet = library('fastai.callback.hook'), library('fastai.vision.models.unet')

    def learner(model: nn.Module, x: torch.Tensor, stack: ExitStack, **kwargs: Any) -> Any:
        items = [
            (vision.TensorImage(image), vision.TensorCategory(label))
            for images, labels in batches(x) for image, label in zip(images, labels)]
        loaders = vision.DataLoaders.from_dsets(
            items, items, bs=len(x), num_workers=0, shuffle=False, drop_last=False, device='cpu')
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        learn = vision.Learner(
            loaders, model, loss_func=vision.CrossEntropyLossFlat(), opt_func=vision.SGD, path=Path(folder), **kwargs)
        stack.enter_context(learn.no_bar())
        stack.enter_context(learn.no_logging())
        return learn

    def fit(make: Callable[[], list] = list, method: str = 'fit', low_precision: bool = False, **kwargs) -> Usage:
        def run(case: Case, x: torch.Tensor) -> Results:
            case.low_precision = low_precision
            with ExitStack() as stack:
                learn = learner(case.model, x, stack, cbs=make())
                getattr(learn, method)(**kwargs)
                losses, predictions = list(learn.recorder.losses), learn.get_preds()[0]
            return {**named(losses), 'predictions': predictions, **parameters(case.model)}

        return run

    def finetune(case: Case, x: torch.Tensor) -> Results:
        body = vision.create_body(case.model, pretrained=False, cut=-3)
        model = nn.Sequential(body, nn.Sequential(vision.AdaptiveConcatPool2d(), nn.Flatten(), nn.Linear(32, 10)))
        with ExitStack() as stack:
            learn = learner(model, x, stack, splitter=vision.default_split)
            learn.freeze()
            learn.fit(1, 1e-2)
            learn.unfreeze()
            learn.fit(1, slice(1e-3, 1e-2))
        return parameters(model)

    def statistics(case: Case, x: torch.Tensor) -> Results:
        watched = [case.model.blocks[0], case.model.blocks[-1][0].fn, case.model.blocks[0][1]]
        with ExitStack() as stack:
            stats = vision.ActivationStats(modules=watched, every=1)
            learner(case.model, x, stack, cbs=[stats]).fit(1, 1e-2)
            found = [[dict(entry) for entry in step if entry is not None] for step in stats.stats]
        return {**named(found), **parameters(case.model)}

    def cam(case: Case, x: torch.Tensor) -> Results:
        layer = case.model.blocks[-1]
        with fastai_hooks.hook_output(layer) as forward, fastai_hooks.hook_output(layer, grad=True) as backward:
            output = case.model(x)
            output[0, 1].backward()
            return dict(output=output, stored=forward.stored, gradient=backward.stored[0])

    def images(case: Case, x: torch.Tensor) -> Results:
        """Of fastai's subclass of tensors."""
        return named(case.model(vision.TensorImage(x.detach())))

    def body(case: Case, x: torch.Tensor) -> Results:
        return dict(output=vision.create_body(case.model, pretrained=False, cut=-3)(x))

    def dynamic_unet(case: Case, x: torch.Tensor) -> Results:
        """Takes what comes before each change of size, of which a ConvMixer has none after its stem."""
        encoder = vision.create_body(case.model, pretrained=False, cut=-3)
        return named(unet.DynamicUnet(encoder, 2, tuple(x.shape[-2:]))(x))

    usages = dict(cam=cam, images=images, body=body)
    if way != 'reparam':
        usages.update(dynamic_unet=dynamic_unet)
    if way == 'train':
        usages.update({
            'fit': fit(n_epoch=2, lr=1e-2),
            'fit_one_cycle': fit(method='fit_one_cycle', n_epoch=2, lr_max=1e-2),
            'MixUp': fit(lambda: [vision.MixUp()], n_epoch=1, lr=1e-2),
            'CutMix': fit(lambda: [vision.CutMix()], n_epoch=1, lr=1e-2),
            'GradientAccumulation': fit(
                lambda: [vision.GradientAccumulation(6), vision.GradientClip(0.5)], n_epoch=2, lr=1e-2),
            'BnFreeze': fit(lambda: [vision.BnFreeze()], n_epoch=2, lr=1e-2),
            'ChannelsLast': fit(lambda: [vision.ChannelsLast()], n_epoch=1, lr=1e-2),
            'MixedPrecision': fit(
                lambda: [vision.MixedPrecision(amp_mode='bf16')], n_epoch=1, lr=1e-2, low_precision=True),
            'finetune': finetune,
            'ActivationStats': statistics,
        })
    check(usages, way)
