"""The command line: ``python -m timm_convmixer``."""
import argparse
import sys
import time
from pathlib import Path
from typing import List, Optional, Sequence

# Top-1 of the paper's models on ImageNet-1k (the last two: CIFAR-10), only where a public source states the figure:
# the authors' repositories, timm's results tables, and papers that cite it.
PUBLISHED_TOP1 = {
    'convmixer_1536_20': '81.37',
    'convmixer_1024_20_ks9_p14': '76.94',
    'convmixer_1024_12_ks8_p7': '77.75',
    'convmixer_768_32': '80.16',
    'convmixer_512_16_ks8_p7': '73.76',
    'convmixer_256_8_ks5_p2': 'over 94 (CIFAR-10)',
    'convmixer_256_8_ks9_p1': '96.03 (CIFAR-10)',
}


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ['-' * width for width in widths], *rows]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def list_variants(args: argparse.Namespace) -> int:
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for name in timm.list_models(module='convmixer'):
        # On meta nothing is allocated or computed: shapes alone give both counts.
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


def run_demo(args: argparse.Namespace) -> int:
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

    for split, count in write_image_folder(args.folder).items():
        print(f'{Path(args.folder) / split}: {count} images')
    return 0


def print_recipe(args: argparse.Namespace) -> int:
    print(args.name if args.path else args.name.read_text().rstrip())
    return 0


def _recipe(name: str) -> Path:
    folder = Path(__file__).parent / 'recipes'
    known = {path.stem: path for path in sorted(folder.glob('*.yaml'))}
    if name not in known:
        raise argparse.ArgumentTypeError(f'no recipe {name!r}; there are {", ".join(known)}')
    return known[name]


def _create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m timm_convmixer',
        description='ConvMixer for timm. Without a command, lists the variants.',
    )
    parser.set_defaults(run=list_variants)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND')

    def add_command(name: str, run, description: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=description,
            description=f'{description[0].upper()}{description[1:]}.',
            epilog=f'example: python -m timm_convmixer {example}',
        )
        command.set_defaults(run=run)
        return command

    add_command('list', list_variants, 'list the variants with their size, published accuracy and weights', 'list')
    add_command('demo', run_demo, 'classify real images with the weights that ship in the package', 'demo')
    command = add_command(
        'digits', write_digits, "write scikit-learn's digits as an image folder for train.py", 'digits data/digits')
    command.add_argument('folder', help='folder to write train/ and validation/ to')
    command = add_command('recipe', print_recipe, 'print a recipe for train.py --config', 'recipe digits > digits.yaml')
    command.add_argument('name', type=_recipe, help='name of the recipe')
    command.add_argument('--path', action='store_true', help='print where the file is instead of what it says')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    args = _create_parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
