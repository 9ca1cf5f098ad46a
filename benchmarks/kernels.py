"""ConvMixer on a GPU: our Triton kernels beside PyTorch's operators, and timm's ConvMixer in each of its modes.

    python benchmarks/kernels.py 1 --out FOLDER         # ceilings, operators, tests, profiles: 560 seconds at most
    python benchmarks/kernels.py 2 --out FOLDER         # whole models, training, CUDA graphs, small batches, peers
    python benchmarks/kernels.py 3 --out FOLDER         # races, all tests, timm's model under max-autotune
    python benchmarks/kernels.py 2 --out FOLDER --seconds 300 --models convmixer_768_32 --batches 256 1
    python benchmarks/kernels.py --stages operators latency
    python benchmarks/kernels.py --dry-run --out FOLDER # a test of this script on a CPU; its figures mean nothing

For a machine that is lent for minutes: every stage is a process of its own with a time limit of its own, since an
illegal access spoils a process for good and a kernel may hang, and FOLDER/kernels_1.json is written anew after every
row. What fails, hangs or no longer fits is named there, and the rest goes on. Beside it lie at most a log of each
lease's stages, a profile (torch.profiler), a report of Nsight Compute, and the results of training.py.

Every contender is checked before it is timed, at the size that is timed: memory that it allocates holds NaN
beforehand, and its results must be as close to float32 as PyTorch's own. Contenders are timed in interleaved rounds;
one that takes over 0.3 s a call gets three.

Random weights, random images, bfloat16, kernels on (``set_gpu_kernels``). "ours" is ``timm.create_model(name)`` with
this package installed, after ``timm.utils.reparameterize_model`` unless said otherwise; "timm" is timm's class with the
same weights. ``python benchmarks/plot.py`` draws what this writes.
"""
import argparse
import contextlib
import copy
import json
import logging
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model

from harness import RESULTS, describe_machine, elapsed, run_rounds, say, start_report, write_results
from models import create, load_weights
from timm_convmixer import kernels
from timm_convmixer.comparison import random_images, randomize_trivial, relative_error
from timm_convmixer.timing import summarize, timed

MODELS = ('convmixer_768_32', 'convmixer_1536_20', 'convmixer_1024_20_ks9_p14')
PEERS = ('resnet50', 'deit_small_patch16_224', 'convnext_tiny')
BATCHES = (256, 64, 8, 1)
DTYPE = torch.bfloat16
# A contender whose error relative to float32 is larger is not timed: bfloat16 rounds off 2e-3 once.
TOLERANCE = 1.2e-2
SLOW_SECONDS = 0.3
# Compiled under poison they would hold it.
COMPILED = {'torch.compile', 'max-autotune', 'reduce-overhead'}
ROW = '@row '
Contenders = Dict[str, Callable[[], Any]]


class Stage(NamedTuple):
    """A part of a run, in a process of its own for each subject.

    Attributes:
        lease: Command it belongs to, 0 for all.
        seconds: Limit for one subject.
        subjects: What it is run for.
        dry_run: Whether a dry run has it, for its last subject.
    """
    lease: int
    seconds: float
    subjects: Sequence[str] = ('',)
    dry_run: bool = False


# The most important first: what does not fit into the time is left out.
STAGES = {
    'ceilings': Stage(0, 30, dry_run=True),
    'precompile': Stage(1, 80),
    'operators': Stage(1, 60, MODELS, dry_run=True),
    'tests': Stage(1, 120),
    'ncu': Stage(1, 80),
    'profile': Stage(1, 45, ('convmixer_768_32',)),
    'precompile-models': Stage(2, 80),
    'models': Stage(2, 90, MODELS, dry_run=True),
    'training': Stage(2, 150),
    'latency': Stage(2, 40, MODELS),
    'peers': Stage(2, 90),
    'racecheck': Stage(3, 60),
    'all-tests': Stage(3, 200),
    'max-autotune': Stage(3, 200, ('convmixer_768_32',)),
}


# What a stage's process does.

def widened(value: Any) -> Any:
    """A tensor in float32."""
    return value.float() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated holds NaN until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def as_tensors(value: Any) -> List[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


class Worker:
    """Runs one stage for one subject, and prints a row for each result."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.dry_run, self.out, self.stage, self.subject = args.dry_run, args.out, args.worker[0], args.worker[1]
        self.batches = args.batches
        self.device = 'cpu' if args.dry_run else 'cuda'
        self.rounds = 2 if args.dry_run else args.rounds
        self.rates: Dict[str, float] = json.loads(args.ceilings)
        torch.manual_seed(0)
        if args.dry_run:
            torch.set_num_threads(1)

    def emit(self, **row: Any) -> None:
        print(ROW + json.dumps(dict(stage=self.stage, subject=self.subject, **row)), flush=True)

    def new(self, *shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def compare(
            self,
            contenders: Contenders,
            expected: Optional[Callable[[], Any]] = None,
            tolerance: float = TOLERANCE,
            facts: Optional[Callable[[float], Dict[str, Any]]] = None,
            **row: Any,
    ) -> None:
        """Check contenders, time those that are right, and emit a row for each.

        Args:
            contenders: What to call, by name.
            expected: Returns what they must return, in float32; None for nothing to check.
            tolerance: The largest relative error.
            facts: More for the row of a contender, from its seconds.
            row: More for every row.
        """
        wanted = as_tensors(expected()) if expected else []
        ready: Dict[str, Tuple[Callable[[], Any], float, Optional[float]]] = {}
        for name, call in contenders.items():
            try:
                error = None
                with poisoned_memory() if wanted and not COMPILED.intersection(name.split(', ')) else nullcontext():
                    outputs = as_tensors(call())
                if wanted:
                    error = max(relative_error(a.float(), b.float()) for a, b in zip(outputs, wanted))
                    if not error <= tolerance:
                        raise ValueError(f'wrong: relative error {error:.3g}, allowed {tolerance:.3g}')
                del outputs
                call()
                ready[name] = call, timed(call, self.synchronize), error
            except Exception as failure:
                message = f'{type(failure).__name__}: {failure}'
                say(f'{self.stage} {self.subject} {name}: {message.splitlines()[0][:200]}')
                self.emit(contender=name, failed=message[:500], **row)
        for slow in (False, True):
            group = {name: call for name, (call, seconds, _) in ready.items() if (seconds > SLOW_SECONDS) == slow}
            if not group:
                continue
            samples = run_rounds(group, 3 if slow else self.rounds, self.device, 0. if self.dry_run else 0.03)
            for name, seconds in samples.items():
                summary = summarize(seconds)
                self.emit(
                    contender=name, error=ready[name][2], ms=1e3 * summary['median'],
                    ms_quartiles=[1e3 * summary['q1'], 1e3 * summary['q3']], samples=seconds,
                    **(facts(summary['median']) if facts else {}), **row)

    def synchronize(self) -> None:
        if self.device == 'cuda':
            torch.cuda.synchronize()

    def set_switches(self) -> None:
        kernels.set_gpu_kernels()
        torch.backends.cudnn.allow_tf32 = False  # of what is float32, the expected values alone
        torch.backends.cudnn.benchmark = True  # as timm's scripts have it

    def run(self) -> None:
        self.set_switches()
        # Max-autotune logs a table per convolution.
        logging.getLogger('torch._inductor').setLevel(logging.ERROR)
        # Profiles are of training as well; nothing else here has gradients.
        with torch.inference_mode(self.stage != 'profile'):
            getattr(self, self.stage.replace('-', '_'))()

    # Stages

    def ceilings(self) -> None:
        """The matrix rate and the memory bandwidth of this device now, which fractions are given of."""
        self.emit(machine=describe_machine(self.device))
        size, elements = (64, 2 ** 12) if self.dry_run else (8192, 2 ** 30)
        a, b, source = self.new(size, size), self.new(size, size), self.new(elements)
        target = torch.empty_like(source)
        for name, call, quantity, amount in (
                ('square product', lambda: torch.mm(a, b), 'flops', 2 * size ** 3),
                ('copy', lambda: target.copy_(source), 'bytes', 2 * source.nbytes),
        ):
            # Of the same row, or the parent would not know what it is a ceiling of.
            self.compare({name: call}, facts=lambda seconds: {f'{quantity}_per_second': amount / seconds})

    def operators(self) -> None:
        """Every operation in every configuration, beside PyTorch's, at each batch size."""
        problem = self.problem()
        if not self.dry_run:
            for batch in self.batches:
                self.mixing(batch, *problem)
                self.training_operations(batch, *problem)
                torch.cuda.empty_cache()
            return
        self.mixing(2, *problem)
        self.training_operations(2, *problem)
        self.compare({'a contender that is wrong': lambda: torch.zeros(2)}, lambda: torch.ones(2))
        self.compare({'a contender that crashes': os.abort})

    def precompile(self) -> None:
        """What the operators launch."""
        self.at_once(compile_operators, [(model, batch) for batch in self.batches for model in MODELS])

    def precompile_models(self) -> None:
        """What torch.compile makes of timm's models."""
        self.at_once(compile_model, [(model, self.batches[0]) for model in MODELS])

    def at_once(self, function: Callable[[Tuple[str, int]], float], tasks: Sequence[Tuple[str, int]]) -> None:
        """Compile by all cores, into the caches on disk: one after the other would take minutes."""
        with multiprocessing.get_context('spawn').Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
            for seconds in pool.imap_unordered(function, tasks):
                self.emit(note=f'compiled in {seconds:.0f} s')

    def problem(self) -> Tuple[int, int, int, str]:
        """Channels, side of the map, side of the kernel and activation of the model's blocks."""
        if self.dry_run:
            return 4, 4, 3, 'relu'
        model = timm.create_model(self.subject, device='meta')
        act = 'relu' if isinstance(model.stem[1], nn.ReLU) else 'gelu'
        convolution = model.blocks[0][0].fn[0]
        return model.num_features, 224 // model.stem[0].kernel_size[0], convolution.kernel_size[0], act

    def fractions(self, maps: float, macs: int, elements: int) -> Callable[[float], Dict[str, Any]]:
        """Of the ceilings: for an operation that moves so many maps and multiplies so often an element."""
        def facts(seconds: float) -> Dict[str, Any]:
            return {
                f'{name}_fraction': amount / seconds / self.rates[ceiling]
                for name, amount, ceiling in (
                    ('memory', maps * elements * DTYPE.itemsize, 'bytes_per_second'),
                    ('matrix', 2 * macs * elements, 'flops_per_second'))
                if ceiling in self.rates
            }
        return facts

    def mixing(self, batch: int, channels: int, size: int, kernel: int, act: str) -> None:
        """The two operations of inference."""
        from timm_convmixer.kernels.gpu import depthwise, launch, pointwise

        x = self.new(batch, channels, size, size)
        y = x.contiguous(memory_format=torch.channels_last)
        bias, scale, shift = (self.new(channels) for _ in range(3))
        limits = launch.device_limits(x.device)
        for name, ref, weight, configs, make, inputs in (
                ('depthwise mixing', kernels.depthwise_mixing_ref, self.new(channels, 1, kernel, kernel) / kernel,
                 depthwise.candidates(x.shape, kernel, DTYPE, 'tf32', limits),
                 lambda config: depthwise.make_launch(x.device, x.shape, kernel, config, act), (x,)),
                ('pointwise mixing', kernels.pointwise_mixing_ref, self.new(channels, channels, 1, 1) / channels ** 0.5,
                 pointwise.candidates(x.shape, channels, DTYPE, 'tf32', limits),
                 lambda config: pointwise.make_launch(x.device, x.shape, channels, config, act, 'tf32'), ()),
        ):
            arguments = weight, bias, scale, shift
            ours = kernels.depthwise_mixing if inputs else kernels.pointwise_mixing

            def candidate(config: Any, run: Any, arguments: Any = arguments, inputs: Any = inputs) -> Callable[[], Any]:
                def call() -> torch.Tensor:
                    out = torch.empty_like(x)
                    run(x, *arguments, *inputs, out)
                    return out
                return call

            contenders: Contenders = {
                'ours': lambda: ours(x, *arguments, act),
                **{f'ours, candidate {i} {tuple(config)}': candidate(config, make(config))
                   for i, config in enumerate(configs) if i},
                'PyTorch': lambda: ref(x, *arguments, act),
                'PyTorch, channels_last': lambda: ref(y, *arguments, act),
            }
            if not inputs:
                matrix = weight.flatten(1).expand(batch, -1, -1)

                def by_cublas() -> torch.Tensor:
                    product = torch.baddbmm(bias.view(1, -1, 1), matrix, x.flatten(2)).view_as(x)
                    return kernels.activation_affine(product, scale.float(), shift.float(), act)

                contenders['ours, cuBLAS and a pass'] = by_cublas
            macs = kernel * kernel if inputs else channels
            self.compare(
                contenders, lambda: ref(*map(widened, (x, *arguments)), act),
                facts=self.fractions(2, macs, x.numel()), operation=name, batch=batch)

    def training_operations(self, batch: int, channels: int, size: int, kernel: int, act: str) -> None:
        """The operations of a training segment."""
        from timm_convmixer.kernels.gpu import depthwise_weight_gradient, launch

        x, grad, residual = (self.new(batch, channels, size, size) for _ in range(3))
        nhwc = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad, residual)]
        weight, bias = self.new(channels, 1, kernel, kernel) / kernel, self.new(channels)
        square = self.new(channels, channels, 1, 1) / channels ** 0.5
        scale, shift = (self.new(channels, dtype=torch.float32) for _ in range(2))
        mean, var = kernels.activation_statistics_ref(x, act)
        norm = act, scale, mean, (var + 1e-5).rsqrt(), True
        configs = depthwise_weight_gradient.candidates(x.shape, kernel, DTYPE, 'tf32', launch.device_limits(x.device))

        macs = kernel ** 2
        # Operation: maps read and written, multiplications an element, the reference with its arguments, contenders.
        operations: Dict[str, Tuple[int, int, Callable[..., Any], Tuple[Any, ...], Contenders]] = {
            'depthwise convolution': (2, macs, kernels.depthwise_convolution_ref, (x, weight, bias), {
                'ours': lambda: kernels.depthwise_convolution(x, weight, bias),
                'PyTorch': lambda: kernels.depthwise_convolution_ref(x, weight, bias),
                'PyTorch, channels_last': lambda: kernels.depthwise_convolution_ref(nhwc[0], weight, bias),
            }),
            'depthwise input gradient': (3, macs, kernels.depthwise_input_gradient_ref, (grad, weight, residual), {
                'ours': lambda: kernels.depthwise_input_gradient(grad, weight, residual),
                'PyTorch': lambda: kernels.depthwise_input_gradient_ref(grad, weight, residual),
                'PyTorch, channels_last': lambda: kernels.depthwise_input_gradient_ref(nhwc[1], weight, nhwc[2]),
            }),
            'depthwise weight gradient': (2, macs, kernels.depthwise_weight_gradient_ref, (x, grad, kernel), {
                **{f'ours, candidate {i} {tuple(config)}' if i else 'ours': lambda run=run: run(x, grad)
                   for i, config in enumerate(configs)
                   for run in (depthwise_weight_gradient.make_launches(x.device, x.shape, kernel, config, 'tf32'),)},
                'PyTorch': lambda: kernels.depthwise_weight_gradient_ref(x, grad, kernel),
                'PyTorch, channels_last': lambda: kernels.depthwise_weight_gradient_ref(*nhwc[:2], kernel),
            }),
            'pointwise convolution': (2, channels, kernels.pointwise_convolution_ref, (x, square, bias), {
                'ours': lambda: kernels.pointwise_convolution(x, square, bias),
                'PyTorch': lambda: kernels.pointwise_convolution_ref(x, square, bias),
                'PyTorch, channels_last': lambda: kernels.pointwise_convolution_ref(nhwc[0], square, bias),
            }),
            'pointwise weight gradient': (2, channels, kernels.pointwise_weight_gradient_ref, (x, grad), {
                'ours': lambda: kernels.pointwise_weight_gradient(x, grad),
                'PyTorch': lambda: kernels.pointwise_weight_gradient_ref(x, grad),
                'PyTorch, channels_last': lambda: kernels.pointwise_weight_gradient_ref(*nhwc[:2]),
            }),
            'statistics': (1, 0, kernels.activation_statistics_ref, (x, act), {
                'ours': lambda: kernels.activation_statistics(x, act),
                'PyTorch': lambda: kernels.activation_statistics_ref(x, act),
            }),
            'affine': (3, 0, kernels.activation_affine_ref, (x, scale, shift, act, residual), {
                'ours': lambda: kernels.activation_affine(x, scale, shift, act, residual),
                'PyTorch': lambda: kernels.activation_affine_ref(x, scale, shift, act, residual),
            }),
            'norm gradient': (5, 0, kernels.activation_norm_backward_ref, (grad, x, *norm), {
                'ours': lambda: kernels.activation_norm_backward(grad, x, *norm),
                'PyTorch': lambda: kernels.activation_norm_backward_ref(grad, x, *norm),
            }),
        }
        for name, (maps, each, ref, arguments, contenders) in operations.items():
            self.compare(
                contenders, lambda: ref(*map(widened, arguments)), facts=self.fractions(maps, each, x.numel()),
                operation=name, batch=batch)

    def models_of_subject(self) -> Tuple[nn.Module, nn.Module, nn.Module]:
        """Ours in inference form, ours as created, and timm's: in eval mode, on the device, of the same weights."""
        name = 'test_convmixer' if self.dry_run else self.subject
        with torch.inference_mode(False):
            theirs, ours = create('timm', name), create('ours', name)
            randomize_trivial(theirs, convmixer=True)
            load_weights(ours, theirs.state_dict())
            created, theirs = ours.eval().to(self.device), theirs.eval().to(self.device)
            return reparameterize_model(created), created, theirs

    def images(self, batch: int) -> Tuple[torch.Tensor, torch.Tensor]:
        """A batch in bfloat16, in both memory formats."""
        x = random_images(batch, 32 if self.dry_run else 224).to(self.device, DTYPE)
        return x, x.contiguous(memory_format=torch.channels_last)

    def logits(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Of a model in float32, a few images at a time."""
        return torch.cat([model(chunk.float()) for chunk in x.split(32)])

    def compare_models(self, contenders: Contenders, expected: torch.Tensor, tolerance: float, batch: int) -> None:
        def facts(seconds: float) -> Dict[str, Any]:
            found: Dict[str, Any] = dict(images_per_second=batch / seconds)
            if 'flops_per_second' in self.rates and not self.dry_run:
                channels, size, kernel, _ = self.problem()
                depth = len(timm.create_model(self.subject, device='meta').blocks)
                # All products, the depthwise ones as Toeplitz products of single rows.
                macs = batch * depth * channels * size ** 2 * (channels + kernel * size)
                found['fraction_of_floor'] = 2 * macs / self.rates['flops_per_second'] / seconds
            return found

        self.compare(contenders, lambda: expected, tolerance, facts, batch=batch)

    def graph(self, model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A replay of the model's CUDA graph; captured at the first call."""
        captured: List[Any] = []

        def replay() -> torch.Tensor:
            if not captured:
                # What poisons memory must not be recorded.
                torch.use_deterministic_algorithms(False)
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        model(x)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    captured.append(model(x))
                captured.append(graph)
                captured[0].fill_(float('nan'))
            captured[1].replay()
            return captured[0]
        return replay

    def prepared(self, batch: int) -> Tuple[List[nn.Module], torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The models in bfloat16, images in both formats, the logits in float32, and the error allowed."""
        models = self.models_of_subject()
        x, y = self.images(batch)
        expected = self.logits(models[-1], x)
        ours, created, theirs = (model.to(DTYPE) for model in models)
        own = relative_error(theirs(x).float(), expected)
        self.emit(note=f"error of timm's logits in {DTYPE}: {own:.2e}; ours takes {ours.route(x)}", batch=batch)
        return [ours, created, theirs], x, y, expected, 2 * own + 1e-3

    def models(self) -> None:
        """Whole models, batch 256."""
        batch = 2 if self.dry_run else self.batches[0]
        (ours, created, theirs), x, y, expected, tolerance = self.prepared(batch)
        nhwc = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        contenders: Contenders = {
            'ours, eager': lambda: ours(x),
            'ours, eager, as created': lambda: created(x),
            'timm, eager': lambda: theirs(x),
            'timm, eager, channels_last': lambda: nhwc(y),
        }
        if self.device == 'cuda':
            contenders['ours, CUDA graph'] = self.graph(ours, x)
            faster = torch.compile(copy.deepcopy(nhwc))
            contenders['timm, torch.compile, channels_last'] = lambda: faster(y)
        self.compare_models(contenders, expected, tolerance, batch)
        if self.dry_run:
            self.compare({'a contender that hangs': lambda: time.sleep(600)})

    def max_autotune(self) -> None:
        """Whole models under torch.compile at its most thorough, batch 256."""
        batch = self.batches[0]
        (ours, _, theirs), x, y, expected, tolerance = self.prepared(batch)
        nchw = torch.compile(copy.deepcopy(theirs), mode='max-autotune')
        nhwc = torch.compile(copy.deepcopy(theirs).to(memory_format=torch.channels_last), mode='max-autotune')
        self.compare_models({
            'ours, eager': lambda: ours(x),
            'timm, max-autotune, channels_last': lambda: nhwc(y),
            'timm, max-autotune': lambda: nchw(x),
        }, expected, tolerance, batch)

    def latency(self) -> None:
        """Whole models at smaller batches, and as CUDA graphs."""
        for batch in reversed(self.batches[1:]):
            (ours, _, theirs), x, y, expected, tolerance = self.prepared(batch)
            nhwc = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
            contenders: Contenders = {
                'ours, eager': lambda: ours(x),
                'ours, CUDA graph': self.graph(ours, x),
                'timm, eager': lambda: theirs(x),
                'timm, eager, channels_last': lambda: nhwc(y),
                'timm, CUDA graph': self.graph(theirs, x),
                'timm, CUDA graph, channels_last': self.graph(nhwc, y),
            }
            if batch == 1:
                reduced = torch.compile(copy.deepcopy(nhwc), mode='reduce-overhead')
                contenders['timm, reduce-overhead, channels_last'] = lambda: reduced(y)
            self.compare_models(contenders, expected, tolerance, batch)

    def peers(self) -> None:
        x, y = self.images(self.batches[0])
        for name in PEERS:
            with torch.inference_mode(False):
                model = timm.create_model(name).eval().to(self.device, DTYPE)
            nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
            self.compare({
                f'{name}, eager': lambda: model(x),
                f'{name}, eager, channels_last': lambda: nhwc(y),
            }, facts=lambda seconds: dict(images_per_second=self.batches[0] / seconds), batch=self.batches[0])

    def profile(self) -> None:
        """Where the time of a forward pass and of a training step goes, ours and timm's."""
        from torch.profiler import ProfilerActivity, profile

        with torch.no_grad():
            (ours, _, theirs), x, y, _, _ = self.prepared(self.batches[0])
        nhwc = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        trained = timm.create_model(self.subject).to(self.device)

        def step() -> None:
            with torch.autocast(self.device, dtype=DTYPE):
                trained(x[:64].float()).float().logsumexp(dim=1).sum().backward()

        def forward(model: nn.Module, images: torch.Tensor) -> None:
            with torch.inference_mode():
                model(images)

        for name, call in (
                ('ours', lambda: forward(ours, x)),
                ('timm, channels_last', lambda: forward(nhwc, y)),
                ('ours, training', step),
        ):
            call()
            self.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                call()
                self.synchronize()
            averages = profiler.key_averages()
            with open(self.out / 'kernels_profile.txt', 'a') as file:
                file.write(f'\n{self.subject}, {name}\n{averages.table(sort_by="device_time_total", row_limit=30)}\n')
            top = sorted(averages, key=lambda event: -event.self_device_time_total)[:12]
            self.emit(contender=name, kernels=[
                dict(name=event.key[:120], count=event.count, ms=event.self_device_time_total / 1e3) for event in top])

    def launches(self) -> None:
        """One launch each of what Nsight Compute is to look at, at the size that is timed."""
        self.subject = MODELS[0]
        channels, size, kernel, act = self.problem()
        x, grad = (self.new(self.batches[0], channels, size, size) for _ in range(2))
        vectors = [self.new(channels) for _ in range(3)]
        kernels.depthwise_mixing(x, self.new(channels, 1, kernel, kernel), *vectors, act)
        kernels.pointwise_mixing(x, self.new(channels, channels, 1, 1), *vectors, act)
        kernels.depthwise_weight_gradient(x, grad, kernel)
        kernels.activation_statistics(x, act)
        self.synchronize()

    def race(self) -> None:
        """Programs of several tiles, small enough to be watched."""
        x, grad = (self.new(40, 8, 32, 32) for _ in range(2))
        weight, vectors = self.new(8, 1, 9, 9), [self.new(8) for _ in range(3)]
        from timm_convmixer.kernels.gpu import depthwise, depthwise_weight_gradient, launch
        limits = launch.device_limits(x.device)
        config = depthwise.candidates(x.shape, 9, DTYPE, 'tf32', limits)[0]._replace(tiles=4)
        depthwise.make_launch(x.device, x.shape, 9, config, 'gelu')(x, weight, *vectors, x, torch.empty_like(x))
        config = depthwise_weight_gradient.candidates(x.shape, 9, DTYPE, 'tf32', limits)[0]._replace(tiles=4)
        depthwise_weight_gradient.make_launches(x.device, x.shape, 9, config, 'tf32')(x, grad)
        kernels.pointwise_mixing(x, self.new(8, 8, 1, 1), *vectors, 'gelu')
        kernels.activation_statistics(x, 'gelu')
        self.synchronize()


def compile_operators(task: Tuple[str, int]) -> float:
    """Compile what :meth:`Worker.operators` launches for a model and a batch size, into Triton's cache on disk."""
    from timm_convmixer.kernels.gpu.launch import Launch

    def compile_only(self: Launch, tensors: Any) -> None:
        self.kernel.warmup(*tensors, *self.values, grid=self.grid, **self.options)

    def call_ours(contenders: Contenders, *args: Any, **row: Any) -> None:
        for name, call in contenders.items():
            if name.startswith('ours'):
                with contextlib.suppress(Exception):  # the stage itself reports it
                    call()

    start = time.monotonic()
    worker = Worker(argparse.Namespace(
        dry_run=False, out=None, worker=('operators', task[0]), rounds=0, ceilings='{}', batches=BATCHES))
    worker.compare = call_ours  # type: ignore[method-assign]
    Launch._launch = compile_only  # type: ignore[method-assign]
    kernels.set_gpu_kernels()
    with torch.inference_mode():
        worker.mixing(task[1], *worker.problem())
        worker.training_operations(task[1], *worker.problem())
    return time.monotonic() - start


def compile_model(task: Tuple[str, int]) -> float:
    """Compile timm's model as :meth:`Worker.models` does, into PyTorch's cache on disk."""
    start = time.monotonic()
    worker = Worker(argparse.Namespace(
        dry_run=False, out=None, worker=('models', task[0]), rounds=0, ceilings='{}', batches=[task[1]]))
    worker.set_switches()
    with torch.inference_mode():
        theirs, y = worker.models_of_subject()[-1].to(DTYPE), worker.images(task[1])[1]
        torch.compile(theirs.to(memory_format=torch.channels_last))(y)
    return time.monotonic() - start


# What the process that starts the stages does.

def command_of(stage: str, subject: str, args: argparse.Namespace, seconds: float) -> Sequence[str]:
    """The command line of a stage; empty if the tool for it is missing."""
    this = [sys.executable, str(Path(__file__).resolve())]
    worker = [*this, '--out', str(args.out), '--rounds', str(args.rounds), '--ceilings', json.dumps(args.ceilings),
              '--batches', *map(str, args.batches)]
    if args.dry_run:
        worker.append('--dry-run')
    if stage.endswith('tests'):
        tests = ['tests/test_kernels.py', 'tests/test_training_kernels.py', 'tests/block_grid.py']
        return [sys.executable, '-m', 'pytest', '-q', '-n', str(min(14, os.cpu_count() or 1)), '--maxfail', '30',
                *(['--all'] if stage == 'all-tests' else []), '-p', 'no:cacheprovider', *tests]
    if stage == 'training':
        size = ['--quick', '--rounds', '1', '--image-size', '32', '--models', 'test_convmixer', '--modes', 'ours']
        if not args.dry_run:
            size = ['--device', 'cuda', '--models', *args.models, '--budget', str(seconds - 10)]
        return [sys.executable, str(Path(__file__).parent / 'training.py'), *size,
                '--output', str(args.out / 'kernels_training.json')]
    tools = {
        'ncu': ('ncu', ['--clock-control', 'none', '--set', 'full', '--log-file', str(args.out / 'kernels_ncu.txt'),
                        '--kernel-name', 'regex:^depthwise_kernel|pointwise_kernel|^weight_gradient|^statistics'],
                'launches'),
        'racecheck': ('compute-sanitizer', ['--tool', 'racecheck', '--error-exitcode', '1'], 'race'),
    }
    if stage in tools:
        tool, options, target = tools[stage]
        return [tool, *options, *worker, '--worker', target, ''] if shutil.which(tool) else []
    return [*worker, '--worker', stage, subject]


def run_stage(
        command: Sequence[str],
        seconds: float,
        log: Path,
        take: Callable[[Dict[str, Any]], None],
        silence: Optional[float] = None,
        **environment: str,
) -> str:
    """Run a command, hand on the rows it prints, and end it, with what it started, at its limit.

    Args:
        command: The command.
        seconds: Its limit.
        log: File that takes what else it writes.
        take: Called with each row.
        silence: Seconds that may pass between two rows, None for any number.
        environment: More variables.

    Returns:
        ``'done'``, or what went wrong.
    """
    with open(log, 'a') as file:
        file.write(f'\n$ {" ".join(command)}\n')
        file.flush()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True,
            cwd=Path(__file__).parent.parent, env={**os.environ, **environment})
        deadline = start = time.monotonic()
        deadline += seconds
        lines: queue.Queue[Optional[str]] = queue.Queue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                line = lines.get(timeout=max(0., deadline - time.monotonic()))
                if line is None:
                    code = process.wait(timeout=max(0., deadline - time.monotonic()))
                    return 'done' if code == 0 else f'exit status {code}'
                if line.startswith(ROW) and line.endswith('\n'):
                    take(json.loads(line[len(ROW):]))
                    if silence is not None:
                        deadline = min(start + seconds, time.monotonic() + silence)
                else:
                    file.write(line)
        except (queue.Empty, subprocess.TimeoutExpired):
            return f'ended after {time.monotonic() - start:.0f} s: its limit'
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('lease', nargs='?', type=int, choices=(1, 2, 3), help='a part that fits into 570 seconds (default: all)')
    add('--stages', nargs='+', choices=STAGES, help='these alone')
    add('--out', type=Path, default=RESULTS, help='folder for the results (default: %(default)s)')
    add('--seconds', type=float, help='what no longer fits is left out and named (default: 560 for a part, else none)')
    add('--rounds', type=int, default=7, help='default: %(default)s')
    add('--models', nargs='+', choices=MODELS, default=list(MODELS), metavar='NAME', help='default: %(default)s')
    add('--batches', nargs='+', type=int, default=list(BATCHES), metavar='N',
        help='the first is that of whole models (default: %(default)s)')
    add('--dry-run', action='store_true', help='tiny shapes on a CPU, with contenders that are wrong, crash and hang')
    add('--worker', nargs=2, help=argparse.SUPPRESS)
    add('--ceilings', default='{}', help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


def main() -> int:
    args = parse_args()
    if args.worker:
        Worker(args).run()
        return 0
    if args.dry_run and args.out == RESULTS:
        raise SystemExit('give a folder (--out) for the results of a dry run, which mean nothing')
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = args.seconds or (560. if args.lease else float('inf'))
    args.ceilings = {}
    name = 'kernels' + (f'_{args.lease}' if args.lease else '')
    settings = dict(vars(args), quick=args.dry_run, seconds=args.seconds)
    # This process leaves the GPU to the stages: the first of them says what it is.
    report = start_report('kernels', 'cpu', settings)
    report.update(device='cpu' if args.dry_run else 'cuda', batch=args.batches[0], rows=[], stages=[], left_out=[])

    def take(row: Dict[str, Any]) -> None:
        if 'machine' in row:
            report['machine'] = row['machine']
        else:
            args.ceilings.update({key: row[key] for key in ('flops_per_second', 'bytes_per_second') if key in row})
            report['rows'].append(row)
            figures = f'{row["ms"]:10.3f} ms' if 'ms' in row else row.get('failed', row.get('note', ''))
            more = ''.join(
                f'  {row[key]:.1%} {key}' for key in ('memory_fraction', 'matrix_fraction', 'fraction_of_floor')
                if row.get(key))
            what = (row['stage'], row['subject'], row.get('operation'), row.get('batch'), row.get('contender'))
            print(' '.join(str(part) for part in what if part), figures, more, flush=True)
        write_results(args.out / f'{name}.json', report)

    for stage, about in STAGES.items():
        if args.stages:
            wanted = stage in args.stages
        elif args.dry_run:
            wanted = about.dry_run
        else:
            wanted = args.lease in (None, about.lease) or about.lease == 0
        if not wanted:
            continue
        subjects = [subject for subject in about.subjects if subject in ('', *args.models)]
        for subject in subjects[-1:] if args.dry_run else subjects:
            limit = min(about.seconds, seconds - elapsed())
            command = command_of(stage, subject, args, limit) if limit > 10 else []
            title = f'{stage} {subject}'.strip()
            if not command:
                report['left_out'].append(title + (': no time' if limit <= 10 else ': the tool for it is missing'))
                continue
            say(f'{title}, {limit:.0f} s at most')
            start = time.monotonic()
            outcome = run_stage(
                command, limit, args.out / f'{name}_log.txt', take, silence=3. if args.dry_run else None,
                TIMM_CONVMIXER_GPU_KERNELS='1', TRITON_INTERPRET='1' if args.dry_run else '0',
                PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]))
            report['stages'].append(dict(stage=title, outcome=outcome, seconds=time.monotonic() - start))
            say(f'{title}: {outcome}')
            write_results(args.out / f'{name}.json', report)
    left_out = ', '.join(report['left_out']) or 'nothing'
    print(f'\n{elapsed():.0f} s; left out: {left_out}; written: {args.out / name}.json')
    return int(any(stage['outcome'] != 'done' for stage in report['stages']))


if __name__ == '__main__':
    sys.exit(main())
