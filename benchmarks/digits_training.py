"""Does training with the fast paths end where training without them does? Loss and accuracy over several seeds.

    python benchmarks/digits_training.py
    python benchmarks/digits_training.py --device cuda --model convmixer_256_8_ks9_p1 --epochs 30

``test_convmixer`` from scratch on the 1,442 digits for training: with the fast paths, with gradient checkpointing
as well, and without (TIMM_CONVMIXER_FUSED=0), from the same seeds: the same weights, order and shifts of images. On a
CPU the fast paths are the two maps a block and the depthwise gradients, on a GPU the Triton kernels. Prints the
accuracy on the 355 held-out digits; ``plot.py --pictures digits_training`` draws the curves.
"""
import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import timm
import torch
import torch.nn.functional as F

from harness import RESULTS, print_table, say, start_report, write_results
from timm_convmixer.digits import load_digits
from timm_convmixer.kernels import set_fused

MODES = ('fused', 'fused+checkpointing', 'plain')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--model', default='test_convmixer', help='ConvMixer (default: %(default)s)')
    add('--epochs', type=int, default=12, help='default: %(default)s')
    add('--seeds', type=int, default=5, help='default: %(default)s')
    add('--batch-size', type=int, default=64, help='default: %(default)s')
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    add('--quick', action='store_true', help='one seed, two epochs')
    add('--output', type=Path, help='results file (default: benchmarks/results/digits_training_DEVICE.json)')
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(epochs=2, seeds=1, output=RESULTS / f'digits_training_quick_{args.device}.json')
        args = parser.parse_args()
    args.output = args.output or RESULTS / f'digits_training_{args.device}.json'
    return args


def load(split: str, device: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images ``(B, 3, 32, 32)`` in [-1, 1] and labels ``(B,)``."""
    images, labels = zip(*load_digits()[split])
    pixels = torch.stack([torch.from_numpy(np.array(image, dtype=np.float32)).unsqueeze(0) for image in images])
    pixels = F.interpolate(pixels / 127.5 - 1, size=(32, 32), mode='bicubic').expand(-1, 3, -1, -1)
    return pixels.contiguous().to(device), torch.tensor(labels).to(device)


def train(mode: str, seed: int, args: argparse.Namespace, data: Dict[str, Any]) -> Dict[str, Any]:
    """Train one model and return its losses, epoch by epoch, and its accuracy."""
    set_fused(mode != 'plain')
    torch.manual_seed(seed)
    model = timm.create_model(args.model, num_classes=10, drop_path_rate=0.05).to(args.device)
    model.set_grad_checkpointing('checkpointing' in mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=2e-5, eps=1e-3)
    images, labels = data['train']
    steps = args.epochs * -(-len(images) // args.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    losses: List[float] = []
    for _ in range(args.epochs):
        total = 0.
        for index in torch.randperm(len(images)).to(args.device).split(args.batch_size):
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[index].roll(shift, (2, 3))), labels[index])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item() * len(index)
        losses.append(total / len(images))
    images, labels = data['validation']
    with torch.no_grad():
        correct = (model.eval()(images).argmax(dim=1) == labels).sum().item()
    set_fused(True)
    return dict(mode=mode, seed=seed, losses=losses, correct=correct, images=len(images))


def main() -> int:
    args = parse_args()
    report = start_report('digits_training', args.device, vars(args))
    data = {split: load(split, args.device) for split in ('train', 'validation')}
    report['runs'] = []
    for seed in range(args.seeds):
        for mode in MODES:
            run = train(mode, seed, args, data)
            report['runs'].append(run)
            say(f'  seed {seed}, {mode}: loss {run["losses"][-1]:.4f}, {run["correct"]} of {run["images"]}')
    table = []
    for mode in MODES:
        runs = [run for run in report['runs'] if run['mode'] == mode]
        correct = [run['correct'] for run in runs]
        table.append([
            mode,
            f'{statistics.mean(run["losses"][-1] for run in runs):.4f}',
            f'{100 * statistics.mean(correct) / runs[0]["images"]:.2f}%',
            f'{min(correct)}-{max(correct)} of {runs[0]["images"]}',
        ])
    print_table(f'{args.model} on digits, {args.epochs} epochs, {args.seeds} seeds',
                ['mode', 'last loss', 'accuracy', 'correct'], table)
    write_results(args.output, report)
    say(f'wrote {args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
