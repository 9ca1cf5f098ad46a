"""Inference: our ConvMixers, timm's, the paper's block and what one would pick instead, by every route, in one run.

    python benchmarks/throughput.py --quick
    python benchmarks/throughput.py --models convmixer_768_32 peers --batch-sizes 1 4 --precisions float32 bfloat16
    python benchmarks/throughput.py --device cuda --batch-sizes 1 64 256 --precisions amp_bfloat16

All candidates for a model, an image size and a batch size form a group. They hold equal weights, and before anything is
timed the logits of each are compared with those of plain eager float32; one whose error is too large is not timed, and
the script ends with an error. Then they run in interleaved rounds, on a CPU each in an interpreter of its own, as a
user would run it. Ratios are medians of each round's ratio to the plain eager form (timm's ConvMixer, or the peer
itself) in the same precision.

Two things besides run in the rounds of a group. The convolutions of a ConvMixer alone, all its pointwise and all its
depthwise ones, by whatever runs them fastest, in PyTorch or in a runtime: both together are the limit that "of limit"
is a fraction of. And one matrix product that is the same in every group: where it differs between groups, the machine
was not as fast in one as in the other.

"create" is ``timm.create_model``, "prepare" what the route needs before an inference (reparameterisation, conversion,
ONNX export, loading it into the runtime), "first" the first inference, in which ``torch.compile`` compiles, its caches
cold.
"""
import argparse
import gc
import math
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils import mkldnn as mkldnn_utils

from harness import RESULTS, milliseconds, print_table, run_rounds, say, start_report, times, write_results
from models import PEERS, PRECISIONS, Route, Unsupported, create, is_convmixer, load_weights, prepare, prepare_saved
from timm_convmixer.comparison import architecture, random_images, randomize_trivial, relative_error, tolerance
from timm_convmixer.kernels.support import onednn_supports
from timm_convmixer.timing import Isolated, paired_ratio, summarize, synchronizer, timed

_RUNTIMES = ('onnxruntime', 'openvino')
_REPARAM = ('reparam', 'reparam+channels_last', 'reparam+channels_last+compiled')
_PLAIN = ('eager', 'channels_last', 'channels_last+compiled')
_GPU = ('compiled', 'graphs', 'channels_last+graphs')
_GPU_REPARAM = ('reparam+compiled', 'reparam+graphs', 'reparam+channels_last+graphs')

# Device -> implementation -> routes.
ROUTES = {
    'cpu': dict(
        ours=(*_PLAIN, *_REPARAM, *_RUNTIMES, *(f'reparam+{runtime}' for runtime in _RUNTIMES)),
        timm=(*_PLAIN, *_RUNTIMES),
        paper=('eager',),
        peer=(*_PLAIN, *_RUNTIMES),
    ),
    'cuda': dict(
        ours=(*_PLAIN, *_GPU, *_REPARAM, *_GPU_REPARAM),
        timm=(*_PLAIN, *_GPU),
        paper=('eager',),
        peer=(*_PLAIN, *_GPU),
    ),
}

QUICK = dict(
    models=['convmixer_512_12_ks8_p7', 'resnet50'],
    image_sizes=[112],
    batch_sizes=[1],
    routes=['eager', 'channels_last', 'reparam', 'reparam+channels_last', 'onnxruntime', 'reparam+onnxruntime'],
    rounds=3,
    shared=True,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--models', nargs='+', metavar='NAME', default=['convmixer_768_32', 'convmixer_1536_20',
                                                        'convmixer_1024_20_ks9_p14', 'peers'],
        help='model names; peers stands for the other architectures (default: %(default)s)')
    add('--implementations', nargs='+', choices=('ours', 'timm', 'paper'), default=['ours', 'timm', 'paper'],
        help='implementations of a ConvMixer (default: %(default)s)')
    add('--routes', nargs='+', metavar='ROUTE', help='routes, see models.py (default: what suits device and model)')
    add('--precisions', nargs='+', choices=PRECISIONS, default=['float32'], help='default: %(default)s')
    add('--batch-sizes', nargs='+', type=int, default=[1, 4], help='default: %(default)s')
    add('--image-sizes', nargs='+', type=int, default=[224], help='default: %(default)s')
    add('--device', choices=('cpu', 'cuda'), default='cpu', help='default: %(default)s')
    add('--rounds', type=int, default=7, help='rounds of a group (default: %(default)s)')
    add('--min-rounds', type=int, default=3, help='rounds that --group-seconds does not cut (default: %(default)s)')
    add('--group-seconds', type=float, help='no more rounds after this (default: no limit)')
    add('--exporter', choices=('torchscript', 'dynamo'), default='torchscript',
        help="ONNX exporter, by default that of timm's onnx_export.py")
    add('--shared', action=argparse.BooleanOptionalAction,
        help='all in one interpreter, which is quicker to set up (default on a GPU)')
    add('--output', type=Path, help='results file (default: benchmarks/results/throughput_DEVICE.json)')
    add('--quick', action='store_true', help='a minute on two cores; defaults that other arguments override')
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK, output=RESULTS / f'throughput_quick_{args.device}.json')
        args = parser.parse_args()
    args.models = [name for model in args.models for name in (PEERS if model == 'peers' else (model,))]
    for name in args.models:
        if not timm.is_model(name):
            parser.error(f'argument --models: timm knows no model {name!r}')
    try:
        args.routes = args.routes and [str(Route.parse(route)) for route in args.routes]
    except ValueError as error:
        parser.error(f'argument --routes: {error}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('argument --device: cuda is not available here')
    if args.shared is None:
        args.shared = args.device == 'cuda'
    args.output = args.output or RESULTS / f'throughput_{args.device}.json'
    return args


def measure_creation(implementations: List[str], name: str, repeats: int = 3) -> Dict[str, Dict[str, float]]:
    """Seconds that creating a model takes, the implementations in turn."""
    for implementation in implementations:
        create(implementation, name)  # caches what it asks of our model
    samples: Dict[str, List[float]] = {implementation: [] for implementation in implementations}
    for _ in range(repeats):
        for implementation in implementations:
            samples[implementation].append(timed(lambda: create(implementation, name)))
    return {implementation: summarize(seconds) for implementation, seconds in samples.items()}


def _has_blocked_layouts(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and onednn_supports(dtype)


def ceiling_candidates(
        name: str,
        image_size: int,
        batch_size: int,
        precision: str,
        device: str,
) -> Dict[Tuple[str, str], Callable[[], Any]]:
    """All the pointwise and all the depthwise convolutions of a ConvMixer alone, by the two fastest ways of each.

    Every layer has weights of its own, which stream from memory as they do in the model. The ways are PyTorch's memory
    formats, oneDNN's blocked one, matrix products, and the runtimes, whose kernels are not PyTorch's.
    """
    config = architecture(name)
    dim, depth, kernel_size = config['dim'], config['depth'], config['kernel_size']
    dtype = PRECISIONS[precision][1] or PRECISIONS[precision][0]
    side = image_size // config['patch_size']
    x = torch.randn(batch_size, dim, side, side).to(device, dtype)
    # An even kernel pads unevenly, which 'same' does by copying the map: here the nearest that pads for free, as wide.
    convs = dict(
        pointwise=[nn.Conv2d(dim, dim, 1) for _ in range(depth)],
        depthwise=[
            nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim) for _ in range(depth)
        ],
    )

    def run_all(layers: List[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for layer in layers:
                    layer(x)

        return run

    candidates = {}
    for part, layers in convs.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            copies = [nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding, groups=layer.groups,
            ).to(device=device, dtype=dtype, memory_format=layout) for layer in layers]
            layout_name = str(layout).removeprefix('torch.').removesuffix('_format')
            candidates[part, layout_name] = run_all(copies, x.contiguous(memory_format=layout))
        if device == 'cpu' and _has_blocked_layouts(dtype):
            # oneDNN's own blocked layouts, weights reordered beforehand: the output of one convolution has the layout
            # that the next one likes best.
            with torch.inference_mode():
                blocked = [mkldnn_utils.to_mkldnn(layer.eval(), dtype) for layer in layers]
                candidates[part, 'onednn_blocked'] = run_all(blocked, blocked[0](x.to_mkldnn()))
        for runtime in _RUNTIMES:
            try:
                candidates[part, runtime] = prepare(
                    nn.Sequential(*layers).eval(), Route(backend=runtime), precision, x.float().cpu(), device)
            except Unsupported:
                continue
    weights = [torch.randn(dim, dim, device=device, dtype=dtype) for _ in range(depth)]
    candidates['pointwise', 'matmul'] = run_all([weight.matmul for weight in weights], x.flatten(2))
    positions = x.permute(0, 2, 3, 1).reshape(-1, dim)
    candidates['pointwise', 'linear'] = run_all(
        [lambda rows, weight=weight: F.linear(rows, weight) for weight in weights], positions)

    # The slow ways would take a fifth of the run to say that they are slow.
    synchronize = synchronizer(device)
    for run in candidates.values():
        run()
    once = {key: timed(run, synchronize) for key, run in candidates.items()}
    return {
        key: candidates[key]
        for part in convs for key in sorted((key for key in once if key[0] == part), key=once.get)[:2]
    }


def anchor(device: str) -> Callable[[], Any]:
    """One matrix product, the same in every group."""
    size = 1024 if device == 'cpu' else 8192
    a, b = torch.randn(2, size, size, device=device)
    return lambda: torch.mm(a, b)


def run_group(
        args: argparse.Namespace,
        name: str,
        image_size: int,
        batch_size: int,
) -> Dict[str, Any]:
    """Prepare, check and time all candidates of a group, and print its tables."""
    with ExitStack() as stack:
        group = _run_group(args, name, image_size, batch_size, stack)
    print_group(group)
    return group


def _run_group(
        args: argparse.Namespace,
        name: str,
        image_size: int,
        batch_size: int,
        stack: ExitStack,
) -> Dict[str, Any]:
    say(f'{name}, batch {batch_size}, {image_size}x{image_size}')
    convmixer = is_convmixer(name)
    implementations = args.implementations if convmixer else ['peer']
    baseline_implementation = 'timm' if convmixer else 'peer'
    creation = measure_creation(implementations, name)

    images = random_images(batch_size, image_size)
    torch.manual_seed(0)
    reference_model = create(baseline_implementation, name)
    randomize_trivial(reference_model.eval(), convmixer)
    weights = reference_model.state_dict()
    if not args.shared:
        weights_file = str(Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'weights.pt')
        torch.save(weights, weights_file)
    with torch.inference_mode():
        reference = reference_model(images)

    candidates: Dict[Any, Callable[[], Any]] = {}
    rows: List[Dict[str, Any]] = []
    skipped: List[Dict[str, str]] = []
    refused: List[Dict[str, Any]] = []
    for precision in args.precisions:
        plain = prepare(reference_model, Route(), precision, images, args.device)
        plain_error = relative_error(plain(), reference)
        limit = tolerance(args.device, PRECISIONS[precision][1] or PRECISIONS[precision][0], plain_error)
        for implementation in implementations:
            if args.shared:
                model = create(implementation, name)
                load_weights(model, weights)
                model.eval()
            for route in args.routes or ROUTES[args.device][implementation]:
                row = dict(implementation=implementation, route=route, precision=precision)
                if 'reparam' in route and implementation != 'ours':
                    continue
                outcome: List[Any] = []

                def prepare_candidate() -> None:
                    outcome.append(
                        prepare(model, Route.parse(route), precision, images, args.device, args.exporter))

                try:
                    if args.shared:
                        row['prepare_seconds'] = timed(prepare_candidate, synchronizer(args.device))
                        run = outcome.pop()
                    else:
                        run = Isolated(
                            prepare_saved, implementation, name, weights_file, route, precision, batch_size, image_size,
                            args.device, args.exporter)
                        stack.callback(run.close)
                        row['prepare_seconds'] = run.make_seconds
                    row['first_seconds'] = timed(lambda: outcome.append(run()), synchronizer(args.device))
                except Unsupported as error:
                    skipped.append(dict(row, reason=str(error)))
                    continue
                row['error'] = relative_error(outcome.pop(), reference)
                say(f'  {implementation} {route} {precision}: prepared in {row["prepare_seconds"]:.1f} s, '
                    f'first inference {row["first_seconds"]:.1f} s, '
                    f'error {row["error"]:.1e} of at most {limit:.1e}')
                if not row['error'] <= limit:
                    say('  WRONG: not timed')
                    refused.append(dict(row, error=min(row['error'], 1e30), tolerance=limit))
                    continue
                rows.append(row)
                candidates[implementation, route, precision] = run
        if convmixer:
            ceiling = ceiling_candidates(name, image_size, batch_size, precision, args.device)
            candidates.update((('ceiling', key, precision), run) for key, run in ceiling.items())
    candidates['anchor'] = anchor(args.device)

    samples = run_rounds(
        candidates,
        rounds=args.rounds,
        device=args.device,
        budget_seconds=args.group_seconds or math.inf,
        min_rounds=args.min_rounds,
        warmup=False,
    )
    ceilings = {}
    for precision in args.precisions if convmixer else ():
        parts = {part: {
            key[1][1]: summarize(seconds)
            for key, seconds in samples.items() if key[0] == 'ceiling' and key[1][0] == part and key[2] == precision
        } for part in ('pointwise', 'depthwise')}
        fastest = {part: min(layouts, key=lambda name: layouts[name]['median']) for part, layouts in parts.items()}
        total = sum(parts[part][layout]['median'] for part, layout in fastest.items())
        ceilings[precision] = dict(parts, fastest=fastest, seconds=total)

    for row in rows:
        precision = row['precision']
        seconds = samples[row['implementation'], row['route'], precision]
        baseline = samples.get((baseline_implementation, 'eager', precision))
        row.update(
            seconds=summarize(seconds),
            samples=seconds,
            images_per_second=batch_size / statistics.median(seconds),
            speedup=baseline and paired_ratio(baseline, seconds),
            of_limit=ceilings[precision]['seconds'] / statistics.median(seconds) if convmixer else None,
        )
    group = dict(
        model=name,
        image_size=image_size,
        batch_size=batch_size,
        baseline=baseline_implementation,
        create_seconds=creation,
        anchor_seconds=summarize(samples['anchor']),
        ceilings=ceilings,
        rows=rows,
        skipped=skipped,
        refused=refused,
    )
    return group


def print_group(group: Dict[str, Any]) -> None:
    for precision in dict.fromkeys(row['precision'] for row in group['rows']):
        table = []
        for row in group['rows']:
            if row['precision'] == precision:
                table.append([
                    row['implementation'],
                    row['route'],
                    *milliseconds(row['seconds']),
                    f'{row["images_per_second"]:.2f}',
                    times(row['speedup']),
                    row['of_limit'] and f'{row["of_limit"]:.2f}',
                    f'{row["error"]:.1e}',
                    f'{row["prepare_seconds"]:.2f}',
                    f'{row["first_seconds"]:.2f}',
                ])
        ceiling = group['ceilings'].get(precision)
        if ceiling:
            for part in ('pointwise', 'depthwise'):
                for layout, summary in ceiling[part].items():
                    mark = ' *' if layout == ceiling['fastest'][part] else ''
                    table.append([f'{part} alone', f'{layout}{mark}', *milliseconds(summary), *[None] * 6])
        print_table(
            f'{group["model"]}, batch {group["batch_size"]}, {group["image_size"]}x{group["image_size"]}, {precision}',
            ['model', 'route', 'ms', 'min', 'quartiles', 'images/s', f'times {group["baseline"]} eager', 'of limit',
             'error', 'prepare s', 'first s'],
            table,
        )
    for implementation, seconds in group['create_seconds'].items():
        print(f'create {implementation}: {seconds["median"]:.2f} s')
    anchor_ms = milliseconds(group['anchor_seconds'])
    print(f'the same matrix product in every group: {anchor_ms[0]} ms ({anchor_ms[2]})')
    for row in group['skipped']:
        print(f'left out: {row["implementation"]} {row["route"]} {row["precision"]}: {row["reason"]}')
    for row in group['refused']:
        print(f'WRONG, not timed: {row["implementation"]} {row["route"]} {row["precision"]}: error {row["error"]:.1e}')


def main() -> int:
    args = parse_args()
    report = start_report('throughput', args.device, vars(args))
    if any('compiled' in route or 'graphs' in route for route in args.routes or ['compiled']):
        # What the compiler does once per process is not the first model's to pay for.
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=args.device))
    report['groups'] = []
    for image_size in args.image_sizes:
        for batch_size in args.batch_sizes:
            for name in args.models:
                report['groups'].append(run_group(args, name, image_size, batch_size))
                write_results(args.output, report)
                torch.compiler.reset()
                gc.collect()
    say(f'wrote {args.output}')
    return int(any(group['refused'] for group in report['groups']))


if __name__ == '__main__':
    sys.exit(main())
