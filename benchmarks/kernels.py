"""ConvMixer inference on a GPU: our Triton kernels and models beside timm's ConvMixer in each of its modes, in one run.

    python benchmarks/kernels.py                        # everything that fits into 460 seconds, on the CUDA device
    python benchmarks/kernels.py --only ceilings max-autotune  # some stages, into a file of their own
    python benchmarks/kernels.py --quick --device cpu   # a test of this script on tiny shapes; its figures mean nothing

Stages, the most important first: `ceilings` (matrix rate and memory bandwidth of this device, in this run, against
which fractions are given), `eager` (whole models, batch 256, both layouts), `operators` (depthwise and pointwise mixing
by themselves), `compile` (whole models under torch.compile), `latency` (batch 1, CUDA graphs against
`reduce-overhead`), `peers` (resnet50, deit_small, convnext_tiny), `max-autotune`, `gradients` (the kernels
of a training step by themselves; whole steps are training.py's). What runs together is timed in
interleaved rounds, so that a drift of the clock meets all of it; medians, quartiles and ratios come from those rounds.
A stage that does not fit into the budget any more is named and left out; what fails is named, and the rest goes on.
`python benchmarks/plot.py` draws what this writes.

Random weights, random images, no gradients, bfloat16. "ours" is `timm.create_model(name)` with this package installed,
after `timm.utils.reparameterize_model`; "timm" is `timm.models.convmixer.ConvMixer` with the same weights.
"""
import argparse
import copy
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import timm
import timm.models.convmixer
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model

from harness import RESULTS, start_report, write_results
from timm_convmixer import kernels
from timm_convmixer.kernels import depthwise_launch, depthwise_training, pointwise

STAGES = ('ceilings', 'eager', 'operators', 'compile', 'latency', 'peers', 'max-autotune', 'gradients')
PEERS = ('resnet50', 'deit_small_patch16_224', 'convnext_tiny')


class Variant(NamedTuple):
    """A ConvMixer by its architecture."""
    name: str
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act: str


VARIANTS = (
    Variant('convmixer_1536_20', 1536, 20, 9, 7, 'gelu'),
    Variant('convmixer_768_32', 768, 32, 7, 7, 'relu'),
    Variant('convmixer_1024_20_ks9_p14', 1024, 20, 9, 14, 'gelu'),
)

# Seconds a stage is expected to take at most, for one variant where it says so; measured nowhere yet, from the number
# of compilations.
EXPECTED = {
    'ceilings': 15, 'eager': 20, 'operators': 25, 'compile': 75, 'latency': 50, 'peers': 45, 'max-autotune': 110,
    'gradients': 30,
}


class Budget:
    """Time left, and what was left out for want of it."""

    def __init__(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.seconds = seconds
        self.left_out: List[str] = []

    def allows(self, what: str, seconds: float) -> bool:
        """Whether `seconds` more fit; if not, `what` is noted as left out."""
        used = time.monotonic() - self.start
        if used + seconds <= self.seconds:
            return True
        self.left_out.append(what)
        print(
            f'-- left out for time: {what} (used {used:.0f} s of {self.seconds:.0f} s, may take {seconds:.0f} s)',
            flush=True,
        )
        return False


class Bench:
    """Runs, times and prints; keeps every row."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.quick = args.quick
        self.rounds = args.rounds
        self.milliseconds = 1.0 if args.quick else 60.0
        self.batch = args.batch
        self.dtype = torch.bfloat16
        self.budget = Budget(args.budget)
        self.rows: List[Dict[str, Any]] = []
        self.ceilings: Dict[str, float] = {}
        self.failed = False

    def synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def elapsed(self, run: Callable[[], Any], repeat: int) -> float:
        """Milliseconds per call over `repeat` calls."""
        if self.device.type == 'cuda':
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeat):
                run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / repeat
        start_time = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - start_time) * 1e3 / repeat

    def compare(
            self,
            stage: str,
            subject: str,
            contenders: Dict[str, Callable[[], Any]],
            **facts: Any,
    ) -> Dict[str, Dict[str, Any]]:
        """Time the contenders in interleaved rounds and print a table; one that fails is reported and left out."""
        ready: Dict[str, Tuple[Callable[[], Any], int]] = {}
        for name, run in contenders.items():
            try:
                began = time.monotonic()
                with torch.inference_mode():
                    run()
                    run()
                    self.synchronize()
                    warm = time.monotonic() - began
                    once = self.elapsed(run, 2)
                ready[name] = run, max(1, min(1000, round(self.milliseconds / max(once, 1e-3))))
            except Exception as error:
                self.report_failure(stage, subject, name, error)
                continue
            if warm > 20:
                print(f'   ({name}: first calls took {warm:.0f} s)', flush=True)
        times: Dict[str, List[float]] = {name: [] for name in ready}
        with torch.inference_mode():
            for _ in range(self.rounds):
                for name, (run, repeat) in ready.items():
                    times[name].append(self.elapsed(run, repeat))
        results = {}
        for name, samples in times.items():
            quartiles = statistics.quantiles(samples, n=4, method='inclusive') if len(samples) > 1 else [samples[0]] * 3
            results[name] = {
                'stage': stage, 'subject': subject, 'contender': name, 'ms': statistics.median(samples),
                'ms_quartiles': [quartiles[0], quartiles[2]], 'samples': samples, **facts,
            }
        self.rows.extend(results.values())
        return results

    def report_failure(self, stage: str, subject: str, contender: str, error: Exception) -> None:
        """Note what failed and go on: the time on a GPU is short, and the other figures are worth having."""
        message = f'{type(error).__name__}: {error}'
        print(f'-- {stage} {subject}: {contender} failed: {message.splitlines()[0][:150]}', flush=True)
        self.rows.append({'stage': stage, 'subject': subject, 'contender': contender, 'error': message[:500]})
        self.failed = True

    def table(
            self,
            title: str,
            results: Dict[str, Dict[str, Any]],
            batch: int,
            floor_ms: Optional[float] = None,
    ) -> None:
        """Print results, each beside our first one."""
        ours = next((r['ms'] for name, r in results.items() if name.startswith('ours')), None)
        print(f'\n{title}')
        for name, result in results.items():
            low, high = result['ms_quartiles']
            result['images_per_second'] = batch * 1e3 / result['ms']
            line = f'  {name:<38}{result["ms"]:>10.3f} ms  [{low:.3f}, {high:.3f}]'
            line += f' {result["images_per_second"]:>10.0f} img/s'
            if ours is not None:
                result['ours_is_faster_by'] = result['ms'] / ours
                line += f'  ours is {result["ms"] / ours:5.2f}x'
            if floor_ms is not None:
                result['fraction_of_floor'] = floor_ms / result['ms']
                line += f'  {floor_ms / result["ms"]:6.1%} of the floor'
            print(line, flush=True)

    # Stages

    def measure_ceilings(self) -> None:
        size, elements = (256, 2 ** 16) if self.quick else (8192, 2 ** 30)
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        source = torch.randn(elements, device=self.device, dtype=self.dtype)
        target = torch.empty_like(source)
        results = self.compare('ceilings', 'device', {
            'matrix product': lambda: torch.mm(a, b),
            'copy': lambda: target.copy_(source),
        })
        self.ceilings = {
            'flops_per_second': 2 * size ** 3 / results['matrix product']['ms'] * 1e3,
            'bytes_per_second': 2 * source.nbytes / results['copy']['ms'] * 1e3,
        }
        print(
            f'\nceilings: {self.ceilings["flops_per_second"] / 1e12:.1f} TFLOP/s ({size}^3, {self.dtype}), '
            f'{self.ceilings["bytes_per_second"] / 1e12:.3f} TB/s (copy of {source.nbytes / 1e9:.1f} GB)',
            flush=True,
        )

    def floor_ms(self, variant: Variant, batch: int) -> Optional[float]:
        """The time of all products, the depthwise ones as banded products of single rows, at the measured rate."""
        if not self.ceilings:
            return None
        width = self.image_size(variant) // variant.patch_size
        dim, depth = self.dimensions(variant)
        per_output = dim + variant.kernel_size * width
        macs = batch * depth * dim * width * width * per_output
        return 2 * macs / self.ceilings['flops_per_second'] * 1e3

    def dimensions(self, variant: Variant) -> Tuple[int, int]:
        return (16, 2) if self.quick else (variant.dim, variant.depth)

    def image_size(self, variant: Variant) -> int:
        return 4 * variant.patch_size if self.quick else 224

    def images(self, variant: Variant, batch: int, channels_last: bool) -> torch.Tensor:
        size = self.image_size(variant)
        x = torch.randn(batch, 3, size, size, device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def models(self, variant: Variant) -> Tuple[torch.nn.Module, Optional[torch.nn.Module]]:
        """timm's model and ours, with the same weights and random statistics of the normalisations."""
        dim, depth = self.dimensions(variant)
        act = {'gelu': torch.nn.GELU, 'relu': torch.nn.ReLU}[variant.act]
        torch.manual_seed(0)
        theirs = timm.models.convmixer.ConvMixer(
            dim=dim, depth=depth, kernel_size=variant.kernel_size, patch_size=variant.patch_size, act_layer=act)
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        entry_point = timm.models.model_entrypoint(variant.name)
        if entry_point.__module__.startswith('timm.'):
            print(f'-- {variant.name}: the registry holds timm\'s own model, so there is no "ours" to time')
            return theirs.eval().to(self.device, self.dtype), None
        ours = timm.create_model(variant.name, **(dict(dim=dim, depth=depth) if self.quick else {}))
        ours.load_state_dict(theirs.state_dict())
        ours, theirs = ours.eval(), theirs.eval()
        ours = reparameterize_model(ours)
        x = torch.randn(1, 3, self.image_size(variant), self.image_size(variant), device=self.device)
        with torch.inference_mode():
            expected = theirs.to(self.device)(x)
            actual = ours.to(self.device, self.dtype)(x.to(self.dtype)).float()
            own = theirs.to(self.dtype)(x.to(self.dtype)).float()
        error, own_error = ((y - expected).norm() / expected.norm() for y in (actual, own))
        print(f'{variant.name}: error of the logits, {self.dtype}: ours {error:.2e}, timm {own_error:.2e}', flush=True)
        if not error <= 2 * own_error + 1e-3:
            raise RuntimeError(f'{variant.name}: ours is wrong: relative error {error:.3g} of the logits')
        return theirs, ours

    def eager(self, variant: Variant) -> None:
        theirs, ours = self.models(variant)
        contenders = {}
        x = self.images(variant, self.batch, False)
        y = self.images(variant, self.batch, True)
        if ours is not None:
            contenders['ours, eager'] = with_autotune(False, lambda: ours(x))
            contenders['ours, eager, autotuned'] = with_autotune(True, lambda: ours(x))
        nhwc = clone(theirs).to(memory_format=torch.channels_last)
        contenders['timm, eager'] = lambda: theirs(x)
        contenders['timm, eager, channels_last'] = lambda: nhwc(y)
        results = self.compare('eager', variant.name, contenders, batch=self.batch, dtype=str(self.dtype))
        self.table(f'{variant.name}, batch {self.batch}', results, self.batch, self.floor_ms(variant, self.batch))

    def compiled(self, variant: Variant, stage: str, mode: Optional[str]) -> None:
        theirs, ours = self.models(variant)
        contenders = {}
        x = self.images(variant, self.batch, False)
        y = self.images(variant, self.batch, True)
        label = mode or 'torch.compile'
        if ours is not None:
            contenders['ours, eager'] = with_autotune(False, lambda: ours(x))
            ours_compiled = torch.compile(clone(ours), mode=mode)
            contenders[f'ours, {label}'] = lambda: ours_compiled(x)
        nchw = torch.compile(clone(theirs), mode=mode)
        nhwc = torch.compile(clone(theirs).to(memory_format=torch.channels_last), mode=mode)
        contenders[f'timm, {label}'] = lambda: nchw(x)
        contenders[f'timm, {label}, channels_last'] = lambda: nhwc(y)
        results = self.compare(stage, variant.name, contenders, batch=self.batch, dtype=str(self.dtype))
        title = f'{variant.name}, batch {self.batch}, {label}'
        self.table(title, results, self.batch, self.floor_ms(variant, self.batch))

    def latency(self, variant: Variant) -> None:
        theirs, ours = self.models(variant)
        contenders = {}
        x = self.images(variant, 1, False)
        y = self.images(variant, 1, True)
        if ours is not None:
            contenders['ours, CUDA graph'] = captured(ours, x)
        contenders['timm, CUDA graph'] = captured(theirs, x)
        nchw = torch.compile(clone(theirs), mode='reduce-overhead')
        nhwc = torch.compile(clone(theirs).to(memory_format=torch.channels_last), mode='reduce-overhead')
        contenders['timm, reduce-overhead'] = lambda: nchw(x)
        contenders['timm, reduce-overhead, channels_last'] = lambda: nhwc(y)
        results = self.compare('latency', variant.name, contenders, batch=1, dtype=str(self.dtype))
        self.table(f'{variant.name}, batch 1', results, 1)

    def peers(self) -> None:
        contenders: Dict[str, Callable[[], Any]] = {}
        size = 224
        x = torch.randn(self.batch, 3, size, size, device=self.device, dtype=self.dtype)
        y = x.contiguous(memory_format=torch.channels_last)
        for name in PEERS[:1] if self.quick else PEERS:
            model = timm.create_model(name).eval().to(self.device, self.dtype)
            nhwc = clone(model).to(memory_format=torch.channels_last)
            contenders[f'{name}, eager'] = lambda model=model: model(x)
            contenders[f'{name}, eager, channels_last'] = lambda nhwc=nhwc: nhwc(y)
            if not self.quick:
                faster = torch.compile(clone(nhwc))
                contenders[f'{name}, torch.compile, channels_last'] = lambda faster=faster: faster(y)
        results = self.compare('peers', 'peers', contenders, batch=self.batch, dtype=str(self.dtype))
        self.table(f'peers, batch {self.batch}', results, self.batch)

    def operators(self, variant: Variant) -> None:
        channels, _ = self.dimensions(variant)
        size = self.image_size(variant) // variant.patch_size
        kernel, act = variant.kernel_size, variant.act

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        x = new(self.batch, channels, size, size)
        y = x.contiguous(memory_format=torch.channels_last)
        bias, scale, shift = (new(channels) for _ in range(3))
        for name, weight, function, ref, support, macs in (
                ('depthwise', new(channels, 1, kernel, kernel) / kernel, kernels.depthwise_mixing,
                 kernels.depthwise_mixing_ref, kernels.depthwise_mixing_support, kernel * kernel),
                ('pointwise', new(channels, channels, 1, 1) / channels ** 0.5, kernels.pointwise_mixing,
                 kernels.pointwise_mixing_ref, kernels.pointwise_mixing_support, channels),
        ):
            arguments = (weight, bias, scale, shift, act)
            groups = channels if name == 'depthwise' else 1
            compiled = torch.compile(ref)
            contenders: Dict[str, Callable[[], Any]] = {
                'ours': with_autotune(False, lambda: function(x, *arguments)),
                'PyTorch, eager': lambda: ref(x, *arguments),
                'PyTorch, eager, channels_last': lambda: ref(y, *arguments),
                'PyTorch, torch.compile': lambda: compiled(x, *arguments),
                'convolution alone': lambda: F.conv2d(x, weight, bias, padding='same', groups=groups),
                'convolution alone, channels_last': lambda: F.conv2d(y, weight, bias, padding='same', groups=groups),
            }
            if support(x, weight, bias, scale, shift) and self.device.type == 'cuda':
                out = torch.empty_like(x)
                for index, config in enumerate(configurations(name, x, weight)[1:], 1):
                    contenders[f'ours, candidate {index} {tuple(config)}'] = launcher(name, x, arguments, out, config)
            subject = f'{name} of {variant.name}'
            results = self.compare('operators', subject, contenders, batch=self.batch, dtype=str(self.dtype))
            reason = support(x, weight, bias, scale, shift).reason
            self.table(f'{subject}: {tuple(x.shape)}, {reason}', results, self.batch)
            if self.ceilings:
                for result in results.values():
                    seconds = result['ms'] / 1e3
                    result['matrix_fraction'] = 2 * macs * x.numel() / seconds / self.ceilings['flops_per_second']
                    result['memory_fraction'] = 2 * x.nbytes / seconds / self.ceilings['bytes_per_second']
                ours = results.get('ours')
                if ours:
                    print(
                        f'  ours: {ours["memory_fraction"]:.1%} of the bandwidth (one read, one write), '
                        f'{ours["matrix_fraction"]:.1%} of the matrix rate (direct multiply-adds)',
                        flush=True,
                    )

    def gradients(self, variant: Variant) -> None:
        """The kernels of a training step beside what PyTorch would run instead, each with the bytes it has to move."""
        channels, _ = self.dimensions(variant)
        size, kernel, act = self.image_size(variant) // variant.patch_size, variant.kernel_size, variant.act

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        x, grad, residual = (new(self.batch, channels, size, size) for _ in range(3))
        y, grad_y, residual_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad, residual))
        weight, bias = new(channels, 1, kernel, kernel) / kernel, new(channels)
        scale, shift = (torch.randn(channels, device=self.device) for _ in range(2))
        mean, var = kernels.activation_statistics_ref(x, act)
        invstd = (var + 1e-5).rsqrt()
        statistics, affine, backward = (
            torch.compile(function) for function in (
                kernels.activation_statistics_ref, kernels.activation_affine_ref, kernels.activation_norm_backward_ref))
        norm = (act, scale, mean, invstd, True)
        convolutions = {
            'depthwise convolution': (2, {
                'ours': lambda: kernels.depthwise_convolution(x, weight, bias),
                'PyTorch, eager': lambda: kernels.depthwise_convolution_ref(x, weight, bias),
                'PyTorch, eager, channels_last': lambda: kernels.depthwise_convolution_ref(y, weight, bias),
            }),
            'depthwise input gradient': (3, {
                'ours': lambda: kernels.depthwise_input_gradient(grad, weight, residual),
                'PyTorch, eager': lambda: library_gradients(x, grad, weight, (True, False, False))[0].add_(residual),
                'PyTorch, eager, channels_last': lambda: library_gradients(
                    y, grad_y, weight, (True, False, False))[0].add_(residual_y),
            }),
            'depthwise weight gradient': (2, {
                'ours': lambda: kernels.depthwise_weight_gradient(x, grad, kernel),
                'PyTorch, eager': lambda: library_gradients(x, grad, weight, (False, True, True)),
                'PyTorch, eager, channels_last': lambda: library_gradients(y, grad_y, weight, (False, True, True)),
                **self.weight_gradient_candidates(x, grad, kernel),
            }),
        }
        others = {
            'statistics': (1, {
                'ours': lambda: kernels.activation_statistics(x, act),
                'PyTorch, torch.compile': lambda: statistics(x, act),
            }),
            'affine': (3, {
                'ours': lambda: kernels.activation_affine(x, scale, shift, act, residual),
                'PyTorch, torch.compile': lambda: affine(x, scale, shift, act, residual),
            }),
            'norm gradient': (5, {
                'ours': lambda: kernels.activation_norm_backward(grad, x, *norm),
                'PyTorch, torch.compile': lambda: backward(grad, x, *norm),
            }),
        }
        for name, (maps, contenders) in {**convolutions, **others}.items():
            subject = f'{name} of {variant.name}'
            results = self.compare('gradients', subject, contenders, batch=self.batch, dtype=str(self.dtype))
            reason = kernels.depthwise_convolution_support(x, weight, bias).reason
            self.table(f'{subject}: {tuple(x.shape)}, {reason}', results, self.batch)
            for result in results.values() if self.ceilings else ():
                seconds = result['ms'] / 1e3
                result['memory_fraction'] = maps * x.nbytes / seconds / self.ceilings['bytes_per_second']
            if self.ceilings and 'ours' in results:
                print(f'  ours: {results["ours"]["memory_fraction"]:.1%} of the bandwidth ({maps} maps)', flush=True)

    def weight_gradient_candidates(
            self,
            x: torch.Tensor,
            grad: torch.Tensor,
            kernel: int,
    ) -> Dict[str, Callable[[], None]]:
        """Launches in the configurations that are not the default."""
        if self.device.type != 'cuda':
            return {}
        batch, channels, height, width = x.shape
        configs = depthwise_training.weight_gradient_candidates(
            batch, channels, height, width, kernel, x.element_size(), 'tf32', *depthwise_launch.device_limits(x.device))
        gradients = (
            torch.empty(channels, 1, kernel, kernel, device=self.device), torch.empty(channels, device=self.device))
        return {
            f'ours, candidate {index} {tuple(config)}': lambda config=config: depthwise_training.run_weight_gradient(
                x, grad, *gradients, config, 'tf32')
            for index, config in enumerate(configs) if index
        }

    def run(self, only: List[str]) -> None:
        scale = 0 if self.quick else 1
        for stage in STAGES:
            if stage not in only:
                continue
            if stage == 'ceilings' and self.budget.allows(stage, scale * EXPECTED[stage]):
                self.measure_ceilings()
            elif stage == 'peers' and self.budget.allows(stage, scale * EXPECTED[stage]):
                self.peers()
            elif stage not in ('ceilings', 'peers'):
                for variant in VARIANTS:
                    if not self.budget.allows(f'{stage} of {variant.name}', scale * EXPECTED[stage]):
                        continue
                    torch.compiler.reset()
                    try:
                        self.run_stage(stage, variant)
                    except Exception as error:
                        self.report_failure(stage, variant.name, 'all', error)
            if self.device.type == 'cuda':
                torch.cuda.empty_cache()

    def run_stage(self, stage: str, variant: Variant) -> None:
        if stage == 'eager':
            self.eager(variant)
        elif stage == 'operators':
            self.operators(variant)
        elif stage == 'compile':
            self.compiled(variant, stage, None)
        elif stage == 'latency' and self.device.type == 'cuda':
            self.latency(variant)
        elif stage == 'max-autotune' and self.device.type == 'cuda':
            self.compiled(variant, stage, 'max-autotune')
        elif stage == 'gradients':
            self.gradients(variant)


def clone(model: torch.nn.Module) -> torch.nn.Module:
    """A copy to convert or compile without touching the original."""
    return copy.deepcopy(model)


def configurations(name: str, x: torch.Tensor, weight: torch.Tensor) -> List[Any]:
    """The launch configurations the operator considers, the default first."""
    processors, shared_memory = depthwise_launch.device_limits(x.device)
    batch, channels, height, width = x.shape
    if name == 'depthwise':
        return depthwise_launch.candidates(
            batch, channels, height, width, weight.shape[2], x.element_size(), processors, shared_memory)
    return pointwise.candidates(
        batch, weight.shape[0], height * width, x.element_size(), 'tf32', processors, shared_memory)


def library_gradients(
        x: torch.Tensor,
        grad: torch.Tensor,
        weight: torch.Tensor,
        wanted: Tuple[bool, bool, bool],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients of input, weight and bias by the library behind PyTorch's convolutions; for odd kernels."""
    channels, padding = weight.shape[0], weight.shape[2] // 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], [1, 1], [padding, padding], [1, 1], False, [0, 0], channels, wanted)


def launcher(
        name: str,
        x: torch.Tensor,
        arguments: Tuple[Any, ...],
        out: torch.Tensor,
        config: Any,
) -> Callable[[], None]:
    """A launch of one of the mixing kernels in one configuration."""
    weight, bias, scale, shift, act = arguments
    if name == 'pointwise':
        return lambda: pointwise.run_kernel(x, *arguments, out, config, 'tf32')
    return lambda: depthwise_launch.run_kernel(
        x, weight, out, config, 'tf32', bias=bias, act=act, scale=scale, shift=shift, residual=x)


def with_autotune(enable: bool, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` with autotuning on or off."""
    def wrapped() -> Any:
        kernels.set_autotune(enable)
        try:
            return run()
        finally:
            kernels.set_autotune(False)
    return wrapped


def captured(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A replay of the model's CUDA graph; captured at the first call, inside the caller's inference mode."""
    graphs: List[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    model(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x)
            graphs.append(graph)
        graphs[0].replay()
    return replay


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--quick', action='store_true', help='tiny shapes: tests the script, measures nothing')
    parser.add_argument('--only', nargs='+', choices=STAGES, default=list(STAGES), help='stages to run')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--budget', type=float, default=460.0, help='seconds; what does not fit is left out and named')
    parser.add_argument(
        '--json',
        type=Path,
        help='default: results/kernels.json, with some stages results/kernels_STAGES.json, nowhere in a quick run',
    )
    args = parser.parse_args()
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error('no CUDA device; `--quick --device cpu` tests the script')
    if args.device == 'cpu' and not args.quick:
        parser.error('this measures GPU kernels; on a CPU only `--quick` makes sense')
    if args.quick:
        args.batch, args.rounds = 2, 2
    if args.json is None and not args.quick:
        some = '' if set(args.only) == set(STAGES) else '_' + '_'.join(args.only)
        args.json = RESULTS / f'kernels{some}.json'

    report = start_report('kernels', args.device, vars(args))
    # Max-autotune logs a table per convolution.
    logging.getLogger('torch._inductor').setLevel(logging.ERROR)
    bench = Bench(args)
    try:
        bench.run(args.only)
    finally:
        # Also when interrupted: what was measured until then is worth keeping.
        report.update(
            ceilings=bench.ceilings,
            left_out=bench.budget.left_out,
            batch=args.batch,
            seconds=time.monotonic() - bench.budget.start,
            rows=bench.rows,
        )
        if args.json:
            write_results(args.json, report)
            print(f'\nwritten: {args.json}')
    print(f'\n{report["seconds"]:.0f} s; left out: {", ".join(report["left_out"]) or "nothing"}')
    return int(bench.failed)


if __name__ == '__main__':
    sys.exit(main())
