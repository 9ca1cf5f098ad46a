"""Training: time and peak memory of a step, ours and timm's ConvMixer in one run.

    python benchmarks/training.py --quick
    python benchmarks/training.py --models convmixer_768_32 convmixer_1024_20_ks9_p14 --batch-sizes 8
    python benchmarks/training.py --device cuda     # AMP

A mode is an implementation (ours or timm) and steps joined by +: channels_last, checkpointing (timm's
--grad-checkpointing, that is set_grad_checkpointing()), compiled. A training step is forward, cross-entropy, backward,
AdamW, and gradients set to None, as in timm's train.py. Times come from interleaved rounds, on a CPU with an
interpreter for each mode. Memory comes from a fresh interpreter for each mode (see harness.measure_peak_memory): what
the second step needs at its peak beyond weights, buffers, optimizer state and batch, so activations above all. What a
model keeps from the first step for the second counts as if it were new.

Before anything is timed the loss, the gradients and the BatchNorm statistics after one step are compared with those of
timm's plain eager float32 model, both cut down to their first blocks: an untrained network with batch statistics
amplifies a rounding error from block to block, and the 32 of convmixer_768_32 make 0.2 of the 1e-7 between two memory
formats. A mode with a wrong loss or gradient is not timed, and the script ends with an error. Statistics that differ
are reported and timed nonetheless: those of timm's checkpointing do, it updates them twice a step.

``--largest-batch`` also looks for the largest batch that a GPU has memory for, in steps of an eighth; eager only.
With ``--budget``, what would not fit into that many seconds any more is named and left out.
"""
import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from harness import (
    RESULTS,
    autocast,
    elapsed,
    measure_peak_memory,
    milliseconds,
    print_table,
    run_rounds,
    run_worker,
    say,
    start_report,
    times,
    write_results,
)
from models import PRECISIONS, create, is_convmixer, load_weights
from timm_convmixer.comparison import random_images, relative_error
from timm_convmixer.kernels import empty_cache
from timm_convmixer.timing import Isolated, paired_ratio, summarize, synchronizer, timed

BASELINE = 'timm'
STEPS = ('channels_last', 'checkpointing', 'compiled')
MODES = (
    'timm', 'timm+channels_last', 'timm+checkpointing', 'timm+channels_last+checkpointing',
    'ours', 'ours+channels_last', 'ours+checkpointing', 'ours+channels_last+checkpointing',
)
CHECKED_BLOCKS = 4
# A multiple of what comes of rounding alone: in float32 of images that are off by 1e-6, which turns ReLUs on and off as
# sums in another order do; in another precision of timm's plain model in that precision. It must lie between these.
TOLERANCE_FACTOR = 4.
TOLERANCES = 1e-4, 0.2

CUDA = dict(
    models=['convmixer_1536_20', 'convmixer_768_32'],
    modes=['timm', 'timm+channels_last', 'ours', 'ours+checkpointing'],
    batch_sizes=[64],
    precision='amp_bfloat16',
    budget=460.,
)
# Seconds that may pass until a compiled mode has been checked and has made its first step, and for one search.
EXPECTED = dict(compiled=100., largest_batch=60.)
QUICK = dict(models=['convmixer_512_12_ks8_p7'], batch_sizes=[2], image_size=112, rounds=2, largest_batch=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', default=['convmixer_768_32', 'convmixer_1024_20_ks9_p14'],
        help='ConvMixers (default: %(default)s)')
    add('--modes', nargs='+', metavar='MODE', default=list(MODES), help='default: %(default)s')
    add('--batch-sizes', nargs='+', type=int, default=[4, 8], help='default: %(default)s')
    add('--image-size', type=int, default=224, help='default: %(default)s')
    add('--precision', choices=('float32', 'amp_bfloat16'), default='float32', help='default: %(default)s')
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    add('--rounds', type=int, default=5, help='default: %(default)s')
    add('--largest-batch', action='store_true', help='find the largest batch that fits; on a GPU')
    add('--budget', type=float, metavar='SECONDS',
        help='leave out what would take longer (default: no limit, 460 on a GPU)')
    add('--output', type=Path, help='results file (default: benchmarks/results/training_DEVICE.json)')
    add('--quick', action='store_true', help='a minute on two cores; defaults that other arguments override')
    add('--worker', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == 'cuda':
        parser.set_defaults(**CUDA)
        args = parser.parse_args()
    elif args.largest_batch:
        parser.error('argument --largest-batch: only a GPU has memory that ends without the machine')
    if args.quick:
        parser.set_defaults(**QUICK, output=RESULTS / f'training_quick_{args.device}.json')
        args = parser.parse_args()
    for name in args.models:
        if not timm.is_model(name) or not is_convmixer(name):
            parser.error(f'argument --models: {name!r} is not a ConvMixer')
    for mode in args.modes:
        implementation, *steps = mode.split('+')
        if implementation not in ('ours', 'timm') or any(step not in STEPS for step in steps):
            parser.error(
                f'argument --modes: {mode!r} must be ours or timm, then steps of {", ".join(STEPS)} joined by +')
    args.output = args.output or RESULTS / f'training_{args.device}.json'
    return args


# Loss, gradients, running means and variances, number of updates of those.
Outcome = Tuple[torch.Tensor, List[torch.Tensor], List[torch.Tensor], int]


class Trainer:
    """A model, its optimizer and one batch, in a mode."""

    def __init__(
            self,
            mode: str,
            name: str,
            batch_size: int,
            image_size: int,
            precision: str,
            device: str,
            blocks: Optional[int] = None,
    ):
        """
        Args:
            mode: Implementation and steps.
            name: ConvMixer.
            batch_size: Images of the batch.
            image_size: Side of the images.
            precision: ``'float32'``, or ``'amp_bfloat16'`` for autocast.
            device: Device to train on.
            blocks: Keep that many blocks, None for all.
        """
        implementation, *steps = mode.split('+')
        torch.manual_seed(0)
        model = create(implementation, name)
        # The same initial weights for every mode, whatever order an implementation draws its own in.
        torch.manual_seed(0)
        load_weights(model, create('timm', name).state_dict())
        if blocks is not None:
            model.blocks = model.blocks[:blocks]
        layout = torch.channels_last if 'channels_last' in steps else torch.preserve_format
        self.model = model.to(device=device, memory_format=layout).train()
        if 'checkpointing' in steps:
            self.model.set_grad_checkpointing()
        self.forward = torch.compile(self.model, dynamic=False) if 'compiled' in steps else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.device = device
        self.amp_dtype = PRECISIONS[precision][1]
        generator = torch.Generator().manual_seed(0)
        self.images = random_images(batch_size, image_size).to(device=device, memory_format=layout)
        self.targets = torch.randint(model.num_classes, (batch_size,), generator=generator).to(device)

    def backward(self) -> torch.Tensor:
        with autocast(self.device, self.amp_dtype):
            loss = F.cross_entropy(self.forward(self.images), self.targets)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weigh(self) -> Dict[str, Any]:
        """Peak memory of a step, the first of which has been, and of the weights."""
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

        def step() -> None:
            self.step()
            # Or what one step keeps for the next would not count.
            empty_cache()

        empty_cache()
        return dict(measure_peak_memory(step, self.device), weights_mb=weights / 1e6)

    def outcome(self) -> Outcome:
        """What one forward and backward pass from the initial weights does."""
        loss = self.backward()
        gradients = [parameter.grad.cpu() for parameter in self.model.parameters()]
        norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
        statistics = [buffer.cpu() for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        # The first block's: timm's checkpointing leaves the stem out, and so the stem's are updated once.
        return loss.cpu(), gradients, statistics, int(norms[1].num_batches_tracked)


def compare(
        actual: Outcome,
        expected: Outcome,
) -> Dict[str, Any]:
    """Errors of one :meth:`Trainer.outcome` against another, and how often a step updated the statistics."""
    return dict(
        loss_error=relative_error(actual[0], expected[0]),
        gradient_error=all_relative_error(actual[1], expected[1]),
        statistics_error=all_relative_error(actual[2], expected[2]),
        batches_tracked=actual[3],
    )


def all_relative_error(actual: List[torch.Tensor], expected: List[torch.Tensor]) -> float:
    """Error of many tensors as one: the norm of the difference against the norm."""
    if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
        return float('inf')
    difference = sum((a.double() - b.double()).square().sum() for a, b in zip(actual, expected)).sqrt()
    error = (difference / sum(b.double().square().sum() for b in expected).sqrt()).item()
    return error if error == error else float('inf')


def largest_fitting(fits: Callable[[int], bool]) -> Optional[int]:
    """The largest batch size that fits: to one up to 16, and to an eighth of the next smaller power of two beyond.

    Args:
        fits: Whether a batch size does.
    """
    power = 16
    while fits(2 * power):
        power *= 2
    if power == 16 and not fits(16):
        return next((batch_size for batch_size in range(15, 0, -1) if fits(batch_size)), None)
    step = power // 8
    low, high = 8, 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def largest_batch(task: Dict[str, Any]) -> Optional[int]:
    """The largest batch size of which a training step fits into the GPU's memory."""
    def fits(batch_size: int) -> bool:
        trainer = None
        try:
            trainer = Trainer(**task, batch_size=batch_size)
            for _ in range(2):  # the second with the optimizer's state
                trainer.step()
            torch.cuda.synchronize()
            return True
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            del trainer
            gc.collect()
            torch.cuda.empty_cache()

    return largest_fitting(fits)


def worker(task: Dict[str, Any]) -> None:
    if 'batch_size' not in task:
        print(json.dumps(dict(largest_batch=largest_batch(task))))
        return
    trainer = Trainer(**task)
    trainer.step()
    print(json.dumps(trainer.weigh()))


def prepare_step(mode: str, task: Dict[str, Any]) -> Callable[[], None]:
    """A training step, for an interpreter of its own."""
    return Trainer(mode, **task).step


def has_time(args: argparse.Namespace, report: Dict[str, Any], what: str, seconds: float) -> bool:
    """Whether ``seconds`` more fit into the budget; if not, ``what`` is noted as left out."""
    if args.budget is None or elapsed() + seconds <= args.budget:
        return True
    report['left_out'].append(what)
    say(f'left out for time: {what}')
    return False


def run_group(args: argparse.Namespace, report: Dict[str, Any], name: str, batch_size: int) -> Dict[str, Any]:
    """Check, time and weigh all modes of a model, and print the table."""
    say(f'training {name}, batch {batch_size}, {args.image_size}x{args.image_size}, {args.precision}')
    task = dict(
        name=name,
        batch_size=batch_size,
        image_size=args.image_size,
        precision=args.precision,
        device=args.device,
    )
    check = dict(task, blocks=CHECKED_BLOCKS)
    torch.backends.cudnn.allow_tf32 = False
    expected = Trainer(BASELINE, **dict(check, precision='float32')).outcome()
    torch.backends.cudnn.allow_tf32 = True
    plain = Trainer(BASELINE, **check)
    plain.images *= 1 + 1e-6 * torch.randn_like(plain.images)
    rounding = compare(plain.outcome(), expected)
    tolerance = TOLERANCE_FACTOR * max(rounding['loss_error'], rounding['gradient_error'])
    tolerance = min(max(tolerance, TOLERANCES[0]), TOLERANCES[1])

    rows: List[Dict[str, Any]] = []
    refused: List[Dict[str, Any]] = []
    trainers: Dict[str, Trainer] = {}
    steps: Dict[str, Callable[[], Any]] = {}
    for mode in args.modes:
        if 'compiled' in mode.split('+') and not has_time(args, report, f'{name}: {mode}', EXPECTED['compiled']):
            continue
        row = dict(mode=mode, **compare(Trainer(mode, **check).outcome(), expected))
        say(f'  {mode}, errors: loss {row["loss_error"]:.1e}, gradients {row["gradient_error"]:.1e} of at most '
            f'{tolerance:.1e}, statistics {row["statistics_error"]:.1e}')
        if not max(row['loss_error'], row['gradient_error']) <= tolerance:
            say('  WRONG: not timed')
            refused.append({key: min(value, 1e30) if key.endswith('error') else value for key, value in row.items()})
            continue
        if args.device == 'cuda':
            trainers[mode] = Trainer(mode, **task)
            steps[mode] = trainers[mode].step
        else:
            # As users train: in one interpreter one model's freed memory would serve the next.
            steps[mode] = Isolated(prepare_step, mode, task)
        row['first_seconds'] = timed(steps[mode], synchronizer(args.device))
        rows.append(row)

    samples = run_rounds(steps, args.rounds, args.device, warmup=False)
    for step in steps.values():
        if isinstance(step, Isolated):
            step.close()
    steps.clear()
    # A GPU's allocator tells one model's memory from another's, and a fresh interpreter would have to compile again.
    memory = {mode: trainer.weigh() for mode, trainer in trainers.items()} if args.device == 'cuda' else {}
    trainers.clear()
    gc.collect()
    for row in rows:
        row.update(
            seconds=summarize(samples[row['mode']]),
            samples=samples[row['mode']],
            memory=memory.get(row['mode']) or run_worker(__file__, dict(task, mode=row['mode'])),
            speedup=paired_ratio(samples[BASELINE], samples[row['mode']]) if BASELINE in samples else None,
        )
        say(f'  memory of {row["mode"]}: {row["memory"]["allocated_mb"]:.0f} MB')
    group = dict(model=name, batch_size=batch_size, image_size=args.image_size, precision=args.precision,
                 baseline=BASELINE, rows=rows, refused=refused)
    print_group(group)
    return group


def print_group(group: Dict[str, Any]) -> None:
    base = next((row for row in group['rows'] if row['mode'] == group['baseline']), None)
    table = []
    for row in group['rows']:
        memory = row['memory']
        table.append([
            row['mode'],
            *milliseconds(row['seconds']),
            times(row['speedup']),
            f'{memory["allocated_mb"]:.0f}',
            None if memory['resident_mb'] is None else f'{memory["resident_mb"]:.0f}',
            base and f'{memory["allocated_mb"] / base["memory"]["allocated_mb"]:.2f}',
            f'{row["gradient_error"]:.1e}',
            f'{row["statistics_error"]:.1e}',
            row['batches_tracked'],
        ])
    print_table(
        f'training step, {group["model"]}, batch {group["batch_size"]}, {group["image_size"]}x{group["image_size"]}, '
        f'{group["precision"]}; memory beyond weights and optimizer state',
        ['mode', 'ms', 'min', 'quartiles', f'times {group["baseline"]}', 'allocated MB', 'resident MB',
         f'of {group["baseline"]}', 'gradient error', 'statistics error', 'updates'],
        table,
    )
    for row in group['refused']:
        print(f'WRONG, not timed: {row["mode"]}: loss {row["loss_error"]:.1e}, gradients {row["gradient_error"]:.1e}')


def main() -> int:
    args = parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    # As timm's train.py has it.
    torch.backends.cudnn.benchmark = True
    report = start_report('training', args.device, {k: v for k, v in vars(args).items() if k != 'worker'})
    report.update(groups=[], left_out=[], largest_batches=[])
    for name in args.models:
        for batch_size in args.batch_sizes:
            report['groups'].append(run_group(args, report, name, batch_size))
            write_results(args.output, report)
            torch.compiler.reset()
            gc.collect()
    for name in args.models if args.largest_batch else ():
        for mode in args.modes:
            if 'compiled' in mode.split('+'):
                continue
            if has_time(args, report, f'{name}: largest batch of {mode}', EXPECTED['largest_batch']):
                found = run_worker(__file__, dict(
                    mode=mode, name=name, image_size=args.image_size, precision=args.precision, device=args.device))
                report['largest_batches'].append(dict(model=name, mode=mode, **found))
                print(f'largest batch of {name}, {mode}: {found["largest_batch"]}')
                write_results(args.output, report)
    say(f'wrote {args.output}')
    return int(any(group['refused'] for group in report['groups']))


if __name__ == '__main__':
    sys.exit(main())
