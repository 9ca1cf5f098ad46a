"""The command line, ``python -m timm_convmixer``: results on standard output, progress and errors on standard error."""
import argparse
import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

# Top-1 accuracy on ImageNet-1k (the last two: CIFAR-10), where a public source states it: the authors' repositories,
# timm's results tables, papers that cite it, or KerasCV's training history.
PUBLISHED_TOP1 = {
    'convmixer_1536_20': '81.37',
    'convmixer_1024_20_ks9_p14': '76.94',
    'convmixer_1024_12_ks8_p7': '77.75',
    'convmixer_768_32': '80.16',
    'convmixer_512_16_ks8_p7': '73.76',
    'tf_convmixer_512_16_ks8_p7': '74.38 (KerasCV)',
    'convmixer_256_8_ks5_p2': 'over 94 (CIFAR-10)',
    'convmixer_256_8_ks9_p1': '96.03 (CIFAR-10)',
}


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ['-' * width for width in widths], *rows]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _report(step: str) -> None:
    print(f'{step} ...', file=sys.stderr, flush=True)


def list_variants(args: argparse.Namespace) -> int:
    _report('counting parameters and multiply-accumulates')
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for name in timm.list_models(module='convmixer'):
        model = timm.create_model(name, device='meta').eval()
        cfg = model.pretrained_cfg
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *cfg['input_size'], device='meta'))
        if cfg.get('hf_hub_id'):
            weights = f'hf-hub:{cfg["hf_hub_id"]}'
        elif cfg.get('file'):
            weights = f'in the package: {name}.{cfg["tag"]}'
        else:
            weights = '-'
        rows.append((
            name,
            f'{sum(p.numel() for p in model.parameters()) / 1e6:.3g}',
            f'{counter.get_total_flops() / 2e9:.3g}',
            'x'.join(map(str, cfg['input_size'][1:])),
            PUBLISHED_TOP1.get(name, '-'),
            weights,
        ))
    print(_format_table(('model', 'params (M)', 'GMACs', 'input', 'published top-1 (%)', 'weights'), rows))
    return 0


def print_environment(args: argparse.Namespace) -> int:
    _report('loading PyTorch and timm')
    from .environment import describe_environment

    for name, value in describe_environment():
        print(f'{name + ":":<18}{value}', flush=True)
    return 0


def run_demo(args: argparse.Namespace) -> int:
    _report('loading PyTorch, the model and the digits')
    import timm
    import torch

    from .digits import load_digits

    start = time.perf_counter()
    model = timm.create_model('test_convmixer.digits', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    created = time.perf_counter()

    images, labels = zip(*load_digits()['validation'])
    batch = torch.stack([transform(image.convert('RGB')) for image in images])
    labels = torch.tensor(labels)
    prepared = time.perf_counter()
    with torch.inference_mode():
        probabilities = model(batch).softmax(dim=1)
    done = time.perf_counter()

    confidence, predictions = probabilities.max(dim=1)
    print('test_convmixer.digits on handwritten digits that its training never saw\n')
    rows = [
        (f'{index}', f'{labels[index]}', f'{predictions[index]}', f'{confidence[index]:.1%}')
        for index in range(0, len(labels), len(labels) // 10)
    ]
    print(_format_table(('image', 'label', 'prediction', 'confidence'), rows))
    correct = (predictions == labels).sum().item()
    print(f'\naccuracy: {correct} of {len(labels)} images, {correct / len(labels):.2%}')
    print(
        f'time: {created - start:.2f} s to create and load the model, {prepared - created:.2f} s to prepare the '
        f'images, {done - prepared:.3f} s to classify them ({len(labels) / (done - prepared):.0f} images/s)'
    )
    return 0


def write_digits(args: argparse.Namespace) -> int:
    from .digits import write_image_folder

    _report(f'writing {args.folder}')
    for split, count in write_image_folder(args.folder).items():
        print(f'{Path(args.folder) / split}: {count} images')
    return 0


def print_recipe(args: argparse.Namespace) -> int:
    print(args.name if args.path else args.name.read_text().rstrip())
    return 0


def _read_labels(path: Path) -> List[str]:
    try:
        lines = path.read_text(encoding='utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'--labels {path} is not UTF-8: {error}') from error
    return [line.strip() for line in lines if line.strip()]


def convert(args: argparse.Namespace) -> int:
    _report('loading PyTorch and timm')
    from .convert import FILES, convert_checkpoint

    conversion = convert_checkpoint(
        args.checkpoint,
        args.folder,
        model=args.model,
        act_layer=args.act_layer,
        bn_eps=args.bn_eps,
        label_names=None if args.labels is None else _read_labels(args.labels),
        data_config=dict(img_size=args.img_size, mean=args.mean, std=args.std, crop_pct=args.crop_pct),
        replace=args.force,
        report=_report,
    )
    weights = f'under {conversion.container!r}' if conversion.container else 'a plain state dict'
    if conversion.container in ('state_dict_ema', 'model_ema'):
        weights += ' (averaged)'
    wrapper = f', behind {conversion.wrapper!r}' if conversion.wrapper else ''
    rows = [
        ('format', f'{conversion.checkpoint_format}{wrapper}'),
        ('weights', f'{weights}; {conversion.num_tensors} tensors, {", ".join(conversion.dtypes)}'),
        ('shapes', ', '.join(f'{key}={value}' for key, value in conversion.architecture.items())),
        ('variant', conversion.variant + (
            f' with {", ".join(f"{key}={value}" for key, value in conversion.model_args.items())}'
            if conversion.model_args else '')),
        ('activation', f'{conversion.activation}: {conversion.activation_source}'),
        ('parameters', f'{conversion.num_parameters:,}'),
        ('written', f'{args.folder}: {", ".join(FILES)}'),
        ('checked', f"create_model('local-dir:{args.folder}', pretrained=True): same weights, same outputs"),
    ]
    for name, text in rows:
        print(f'{name + ":":<12}{text}')
    for warning in conversion.warnings:
        print(f'warning: {warning}', file=sys.stderr)
    return 0


def draw(args: argparse.Namespace) -> int:
    _report('loading the weights')
    from .files import check_parent
    from .filters import draw_filters, load_filters, picture_format, save_filters

    # Fail before downloading anything.
    picture_format(args.output)
    check_parent(args.output)
    weights = load_filters(args.model, args.checkpoint)
    title = args.model or args.checkpoint.name
    picture = draw_filters(weights, title, args.max_filters)
    save_filters(picture, args.output)
    print(f'{args.output}: {picture.width}x{picture.height} pixels')
    return 0


def measure(args: argparse.Namespace) -> int:
    _report('loading PyTorch and timm')
    from .measure import Task, measure_ways

    try:
        task = Task.create(args.model, args.device, args.dtype, args.batch_size, args.image_size)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from None
    start = time.perf_counter()
    title = (
        f'{task.model}, {task.batch_size} image{"s" if task.batch_size > 1 else ""} of '
        f'{task.image_size}x{task.image_size}, {task.dtype}, {task.device}')
    _report(f'{title}, about {args.seconds} s')
    report = measure_ways(task, args.seconds, lambda line: print(
        f'[{time.perf_counter() - start:4.0f} s] {line}', file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(report, indent=1, allow_nan=False))
    elif not report['interrupted'] or any(row['samples'] for row in report['rows']):
        _print_measurement(title, report)
    if report['warning']:
        print(f'warning: {report["warning"]}', file=sys.stderr)
    if report['interrupted']:
        raise KeyboardInterrupt
    if report['fastest'] is None:
        raise RuntimeError('fewer than two ways could be timed: nothing to compare')
    return 0


def _print_measurement(title: str, report: Dict[str, Any]) -> None:
    processor = 'CPU' if report['device'] == 'cpu' else f'GPU {report["device"].partition(":")[2] or 0}'
    print(f'{title}\n{report["environment"].get(processor, processor)}\n')
    rows = []
    for row in report['rows']:
        if row['outcome'] != 'timed':
            rows.append((row['way'], '-', '-', '-', '-', f'{row["outcome"]}: {textwrap.shorten(row["reason"], 100)}'))
            continue
        speed, times = row['images_per_second'], row['speedup']
        rows.append((
            row['way'],
            f'{speed["median"]:.4g}',
            f'{speed["q1"]:.4g} to {speed["q3"]:.4g}',
            f'{times["median"]:.2f}' if times else '-',
            f'{len(row["samples"])}',
            'fastest' if row['way'] == report['fastest'] else '',
        ))
    print(_format_table(('way', 'images/s', 'quartiles', 'times timm', 'rounds', ''), rows))
    fastest = next((row for row in report['rows'] if row['way'] == report['fastest']), None)
    if fastest is None:
        return
    print(f'\nFastest: {fastest["way"]}.', end='')
    print(f' Within the spread: {"; ".join(report["as_fast"])}.' if report['as_fast'] else '')
    if fastest['flags']:
        print(f"For timm's validate.py and benchmark.py, add: {fastest['flags']}")
    print(f'In Python, for images (B, C, H, W) and with your weights:\n\n{fastest["code"]}', end='')


def _recipe(name: str) -> Path:
    folder = Path(__file__).parent / 'recipes'
    known = {path.stem: path for path in sorted(folder.glob('*.yaml'))}
    if name not in known:
        raise argparse.ArgumentTypeError(f'no recipe {name!r}; choose from {", ".join(known)}')
    return known[name]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


_EXIT_STATUS = """exit status:
  0  done
  1  failed: the last line on standard error says why
  2  the command line is wrong
  130  interrupted
"""


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_convmixer',
        description='ConvMixer for timm. Without a command, lists the variants.',
        epilog=f'example:\n  python -m timm_convmixer demo\n\n{_EXIT_STATUS}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=list_variants, parser=parser)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')

    def add_command(name: str, run, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=description,
            description=f'{description[0].upper()}{description[1:]}.',
            epilog=f'example:\n  python -m timm_convmixer {example}\n\n{_EXIT_STATUS}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, parser=command)
        return command

    add_command('list', list_variants, 'list the variants with their size, published accuracy and weights', 'list')
    add_command('demo', run_demo, 'classify real images with the weights in the package', 'demo')
    add_command('env', print_environment, 'print versions, machine and routes for a bug report', 'env')
    command = add_command(
        'measure', measure, 'time the ways to run a model on this machine, and print the code of the fastest',
        'measure convmixer_256_8_ks5_p2 --batch-size 64')
    command.add_argument(
        'model', metavar='MODEL', nargs='?', default='convmixer_256_8_ks5_p2', help='variant (default: %(default)s)')
    command.add_argument('--device', metavar='NAME', help='cpu, cuda or cuda:N (default: a GPU if there is one)')
    command.add_argument(
        '--batch-size', metavar='N', type=_positive, help='number of images (default: 8, on a GPU 64)')
    command.add_argument(
        '--image-size', '--img-size', metavar='N', type=_positive,
        help="side of the images in pixels (default: the model's)")
    command.add_argument(
        '--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='default: %(default)s')
    command.add_argument(
        '--seconds', metavar='N', type=_positive, default=60, help='time to spend (default: %(default)s)')
    command.add_argument('--json', action='store_true', help='print one JSON document instead of the table')
    command = add_command(
        'digits', write_digits, "write scikit-learn's digits as an image folder for train.py", 'digits data/digits')
    command.add_argument('folder', metavar='FOLDER', help='folder to write train/ and validation/ to')
    command = add_command('recipe', print_recipe, 'print a recipe for train.py --config', 'recipe digits > digits.yaml')
    command.add_argument('name', metavar='NAME', type=_recipe, help='cifar10, digits or imagenet')
    command.add_argument('--path', action='store_true', help="print the file's path, not its content")

    command = add_command(
        'convert', convert, 'convert a checkpoint of any known format to a folder for the Hub, and check that it loads',
        'convert output/train/digits/model_best.pth.tar my_convmixer')
    command.add_argument(
        'checkpoint', metavar='CHECKPOINT', type=Path,
        help='checkpoint of train.py, timm, the official repository or OpenMMLab; .weights.h5 or .h5 of Keras')
    command.add_argument(
        'folder', metavar='OUT_DIR', type=Path, help='folder to create, with config.json, model.safetensors, README.md')
    command.add_argument('--model', metavar='NAME', help='variant to build on, instead of the one recognised')
    command.add_argument(
        '--act-layer', metavar='NAME', help='activation (gelu, relu, ...), which the weights cannot tell')
    command.add_argument(
        '--bn-eps', metavar='X', type=float, help="epsilon of the BatchNorms, which the weights cannot tell")
    command.add_argument('--labels', metavar='FILE', type=Path, help='text file with one class name per line')
    command.add_argument('--img-size', metavar='N', type=_positive, help='image size in pixels')
    command.add_argument('--mean', metavar='X', type=float, nargs='+', help='mean of the pixels, per channel')
    command.add_argument('--std', metavar='X', type=float, nargs='+', help='standard deviation, per channel')
    command.add_argument('--crop-pct', metavar='X', type=float, help='size of the centre crop relative to the image')
    command.add_argument('--force', action='store_true', help='replace the folder of an earlier conversion')

    command = add_command(
        'filters', draw, 'draw the patch embeddings and the depthwise kernels of each block',
        'filters test_convmixer.digits -o filters.png')
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        'model', metavar='MODEL', nargs='?',
        help='pretrained model: a timm name, with or without tag, local-dir:FOLDER or hf-hub:OWNER/NAME')
    source.add_argument(
        '--checkpoint', metavar='FILE', type=Path, help='checkpoint of any known format, instead of MODEL')
    command.add_argument(
        '-o', '--output', metavar='FILE', type=Path, required=True, help='picture to write, for example filters.png')
    command.add_argument(
        '--max-filters', metavar='N', type=_positive, default=64, help='most filters per panel (default: %(default)s)')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    parser = _create_parser()
    args = parser.parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except argparse.ArgumentError as error:
        return args.parser.error(str(error))  # exits with status 2
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes standard output again at exit, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
