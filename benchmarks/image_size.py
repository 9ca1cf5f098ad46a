"""Inference cost against image size: time and memory of a ConvMixer grow linearly with the number of pixels.

    python benchmarks/image_size.py --quick
    python benchmarks/image_size.py --models convmixer_768_32 --batch-size 1

Times in interleaved rounds, per size, on a CPU each model in an interpreter of its own; peak memory beyond the weights
and the images in a fresh interpreter for each row (see harness.measure_peak_memory). The exponent of the growth is the
slope of the logarithms between the smallest and the largest size: 1 is linear in pixels.
"""
import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Dict, List

import torch

from harness import (
    RESULTS,
    measure_peak_memory,
    milliseconds,
    print_table,
    run_rounds,
    run_worker,
    say,
    start_report,
    write_results,
)
from models import PRECISIONS, Route, Unsupported, create, is_convmixer, prepare
from timm_convmixer.comparison import random_images
from timm_convmixer.timing import Isolated, summarize

QUICK = dict(models=['convmixer_512_12_ks8_p7'], sizes=[112, 224], rounds=3)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', default=['convmixer_768_32'], help='default: %(default)s')
    add('--routes', nargs='+', metavar='ROUTE', default=['eager', 'reparam'],
        help='routes, see models.py; reparam is for ours alone (default: %(default)s)')
    add('--sizes', nargs='+', type=int, default=[224, 336, 448, 672, 896], help='default: %(default)s')
    add('--batch-size', type=int, default=1, help='default: %(default)s')
    add('--precision', choices=PRECISIONS, default='float32', help='default: %(default)s')
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    add('--rounds', type=int, default=5, help='default: %(default)s')
    add('--output', type=Path, help='results file (default: benchmarks/results/image_size_DEVICE.json)')
    add('--quick', action='store_true', help='a minute on two cores; defaults that other arguments override')
    add('--worker', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK, output=RESULTS / f'image_size_quick_{args.device}.json')
        args = parser.parse_args()
    args.output = args.output or RESULTS / f'image_size_{args.device}.json'
    return args


def prepare_row(row: Dict[str, Any], precision: str, device: str) -> Any:
    torch.manual_seed(0)
    images = random_images(row['batch_size'], row['image_size'])
    model = create(row['implementation'], row['model']).eval()
    return prepare(model, Route.parse(row['route']), precision, images, device)


def worker(task: Dict[str, Any]) -> None:
    run = prepare_row(task['row'], task['precision'], task['device'])
    run()
    print(json.dumps(measure_peak_memory(run, task['device'])))


def growth(rows: List[Dict[str, Any]], value: Any) -> float:
    """Exponent of a quantity's growth with the number of pixels, between the first row and the last."""
    first, last = rows[0], rows[-1]
    return math.log(value(last) / value(first)) / (2 * math.log(last['image_size'] / first['image_size']))


def main() -> int:
    args = parse_args()
    if args.worker:
        worker(args.worker)
        return 0
    report = start_report('image_size', args.device, {k: v for k, v in vars(args).items() if k != 'worker'})
    report['rows'] = rows = []
    report['skipped'] = skipped = []
    for size in args.sizes:
        candidates = {}
        for name in args.models:
            for implementation in ('timm', 'ours') if is_convmixer(name) else ('peer',):
                for route in args.routes:
                    if 'reparam' in route and implementation != 'ours':
                        continue
                    row = dict(
                        model=name,
                        implementation=implementation,
                        route=str(Route.parse(route)),
                        precision=args.precision,
                        image_size=size,
                        batch_size=args.batch_size,
                    )
                    try:
                        make = (row, args.precision, args.device)
                        candidates[len(rows)] = (
                            prepare_row(*make) if args.device == 'cuda' else Isolated(prepare_row, *make))
                    except Unsupported as error:
                        skipped.append(dict(row, reason=str(error)))
                        continue
                    rows.append(row)
        say(f'{size}x{size}')
        for i, samples in run_rounds(candidates, args.rounds, args.device).items():
            rows[i].update(seconds=summarize(samples), samples=samples)
            if args.device != 'cuda':
                candidates[i].close()
        for i in candidates:
            task = dict(row=rows[i], precision=args.precision, device=args.device)
            memory = rows[i]['memory'] = run_worker(__file__, task)
            say(f'  memory of {rows[i]["implementation"]} {rows[i]["route"]}: {memory["allocated_mb"]:.0f} MB')
        write_results(args.output, report)

    print_table(
        f'batch {args.batch_size}, {args.precision}; memory beyond weights and images',
        ['model', '', 'route', 'image', 'ms', 'min', 'quartiles', 'ns/pixel', 'allocated MB', 'resident MB'],
        [[
            row['model'], row['implementation'], row['route'], row['image_size'], *milliseconds(row['seconds']),
            f'{1e9 * row["seconds"]["median"] / args.batch_size / row["image_size"] ** 2:.1f}',
            *(value if value is None else f'{value:.0f}' for value in (
                row['memory']['allocated_mb'], row['memory']['resident_mb'])),
        ] for row in rows],
    )
    report['growth'] = []
    for key in dict.fromkeys((row['model'], row['implementation'], row['route']) for row in rows):
        own = [row for row in rows if (row['model'], row['implementation'], row['route']) == key]
        if len(own) > 1:
            exponents = dict(
                time=growth(own, lambda row: row['seconds']['median']),
                memory=growth(own, lambda row: row['memory']['allocated_mb']),
            )
            report['growth'].append(dict(zip(('model', 'implementation', 'route'), key), **exponents))
            print(f'{" ".join(key)}: time grows as pixels to the power {exponents["time"]:.2f}, '
                  f'memory {exponents["memory"]:.2f}')
    for row in skipped:
        print(f'left out: {row["implementation"]} {row["route"]}: {row["reason"]}')
    write_results(args.output, report)
    say(f'wrote {args.output}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
