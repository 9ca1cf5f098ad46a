"""Draw pictures from results files; nothing is measured. benchmarks/README.md has the commands of the README's.

    python benchmarks/plot.py --results benchmarks/results/cifar --output . --pictures training --batch-size 64

* throughput_DEVICE: images a second against published top-1, timm's ConvMixers, ours, and other models.
* routes_DEVICE: what each way to run a ConvMixer gives.
* image_size_DEVICE: time and memory against the number of pixels.
* training_DEVICE: memory and time of a training step.
* kernels_DEVICE: images a second of every mode on a GPU, beside what the matrix rate that was measured allows.
* digits_training_DEVICE: losses of a short training with the fast paths and without.

Several files of one benchmark are taken together if they come from one machine; where they overlap the newest counts.
What has no results yet is named and left out. Published top-1: timm's results/results-imagenet.csv (see TOP1).
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # the backend comes first

from harness import RESULTS, SCHEMA, machine_name

# Top-1 on ImageNet-1k at 224x224 and the weights it is of, from results/results-imagenet.csv of
# https://github.com/huggingface/pytorch-image-models. Weights trained on ImageNet-1k alone and without a teacher where
# there are any (for mixer_b16_224 there are none); timm's default ones if they are such.
TOP1 = {
    'convmixer_1536_20': (81.382, 'in1k'),
    'convmixer_768_32': (80.158, 'in1k'),
    'convmixer_1024_20_ks9_p14': (76.944, 'in1k'),
    'resnet50': (80.382, 'a1_in1k'),
    'resnet152': (82.818, 'a1h_in1k'),
    'deit_small_patch16_224': (79.856, 'fb_in1k'),
    'convnext_tiny': (82.066, 'fb_in1k'),
    'resmlp_24_224': (79.380, 'fb_in1k'),
    'mixer_b16_224': (76.616, 'goog_in21k_ft_in1k'),
}

# Readable on white and on GitHub's dark background; pictures have none of their own.
TEXT = '#7d8590'
GRID = '#7d859040'
TIMM = '#8b949e'
OURS = '#e8590c'
PEER = '#3b82c4'
HOLLOW = dict(marker='o', markeredgecolor=TIMM, color='none', markeredgewidth=1.5)
SMALL = dict(textcoords='offset points', va='center', fontsize=6)
STYLE = {
    'font.size': 9,
    'axes.edgecolor': TEXT,
    'axes.labelcolor': TEXT,
    'axes.titlecolor': TEXT,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.axisbelow': True,
    'grid.color': GRID,
    'legend.frameon': False,
    'legend.labelcolor': TEXT,
    'text.color': TEXT,
    'xtick.color': TEXT,
    'ytick.color': TEXT,
    'savefig.transparent': True,
    'svg.hashsalt': 'timm-convmixer',
}

PICTURES = ('throughput', 'routes', 'image_size', 'training', 'kernels', 'digits_training')
BACKENDS = {
    'compiled': 'torch.compile', 'graphs': 'CUDA graphs', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO',
    'executorch': 'ExecuTorch',
}
STEPS = {
    'eager': 'as created', 'reparam': 'inference form', 'channels_last': 'channels last',
    'checkpointing': '--grad-checkpointing', **BACKENDS,
}
# By kernels.py, which takes our inference form unless it says otherwise.
CONTENDERS = {
    'timm, eager': 'timm: as created',
    'timm, eager, channels_last': 'timm: channels last',
    'timm, torch.compile, channels_last': 'timm: torch.compile, channels last',
    'ours, eager, as created': 'ours: as created',
    'ours, eager': 'ours: inference form',
    'ours, CUDA graph': 'ours: inference form, CUDA graph',
}


def read_results(folder: Path, quick: bool) -> Dict[Tuple[str, str], List[Dict[str, Any]]]:
    """Reports of the newest machine by (benchmark, device), oldest first."""
    reports: Dict[Tuple[str, str], List[Dict[str, Any]]] = {}
    for path in sorted(folder.glob('*.json')):
        report = json.loads(path.read_text())
        # The folder holds results of other scripts as well.
        if not isinstance(report, dict):
            continue
        if report.get('schema') == SCHEMA and report['settings'].get('quick', False) == quick:
            reports.setdefault((report['benchmark'], report['device']), []).append(dict(report, path=path))
    for key, same in reports.items():
        same.sort(key=lambda report: report['date'])
        newest = machine_name(same[-1]['machine'])
        for report in same:
            if machine_name(report['machine']) != newest:
                print(f'{report["path"].name}: left out, of another machine than {same[-1]["path"].name}')
        reports[key] = [report for report in same if machine_name(report['machine']) == newest]
    return reports


def merge_groups(reports: List[Dict[str, Any]], keys: Tuple[str, ...]) -> Dict[Tuple[Any, ...], Dict[str, Any]]:
    """Groups of several reports by the values of ``keys``; of a row that is there twice the newer counts."""
    merged: Dict[Tuple[Any, ...], Dict[str, Any]] = {}
    for report in reports:
        for group in report['groups']:
            own = merged.setdefault(tuple(group[key] for key in keys), dict(rows={}))
            for row in group['rows']:
                own['rows'][row.get('implementation'), row.get('route', row.get('mode')), row.get('precision')] = row
    return merged


def describe(route: str) -> str:
    return ', '.join(STEPS.get(step, step) for step in route.split('+'))


def subtitle(reports: List[Dict[str, Any]], *facts: str) -> str:
    report = reports[-1]
    versions = report['versions']
    return ' · '.join([machine_name(report['machine']), *facts, f'PyTorch {versions["torch"].split("+")[0]}',
                       f'timm {versions["timm"]}'])


def caption(figure: plt.Figure, title: str, text: str) -> None:
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / height, title, ha='left', va='top', fontsize=11, fontweight='bold')
    figure.text(0.01, 1 - 0.30 / height, text, ha='left', va='top', fontsize=7.5)


def plot_throughput(
        reports: List[Dict[str, Any]],
        batch_size: Optional[int],
        precision: Optional[str],
) -> Optional[plt.Figure]:
    """Images a second against published top-1, as created (left) and by each model's fastest route (right)."""
    groups = {
        key: group for key, group in merge_groups(reports, ('model', 'batch_size', 'image_size')).items()
        if key[0] in TOP1 and key[2] == 224
    }
    if not groups:
        return None
    batch_size = batch_size or pick([key[1] for key in groups])
    precision = precision or pick([row['precision'] for group in groups.values() for row in group['rows'].values()])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    for axis, fastest, title in (
            (axes[0], False, 'as created: timm.create_model(name), eager'),
            (axes[1], True, 'by the fastest route measured for each'),
    ):
        for (model, batch, _), group in groups.items():
            if batch != batch_size:
                continue
            best: Dict[str, Dict[str, Any]] = {}
            for row in group['rows'].values():
                implementation = row['implementation']
                if row['precision'] == precision and (fastest or row['route'] == 'eager'):
                    best[implementation] = max(
                        best.get(implementation, row), row, key=lambda row: row['images_per_second'])
            top1 = TOP1[model][0]
            shown = {name: row['images_per_second'] for name, row in best.items() if name != 'paper'}
            if 'peer' in shown:
                axis.plot(shown['peer'], top1, 'o', color=PEER, markersize=6)
            if 'timm' in shown and 'ours' in shown and not 0.9 < shown['ours'] / shown['timm'] < 1.1:
                axis.annotate(
                    '', (shown['ours'], top1), (shown['timm'], top1),
                    arrowprops=dict(arrowstyle='-|>', color=OURS, lw=1.2, shrinkA=3, shrinkB=4))
            if 'timm' in shown:
                axis.plot(shown['timm'], top1, markersize=7, **HOLLOW)
            if 'ours' in shown:
                axis.plot(shown['ours'], top1, 'o', color=OURS, markersize=7)
            if shown:
                # A name beside its point would cross the points of other models: a ConvMixer's goes above its arrow.
                convmixer = 'ours' in shown or 'timm' in shown
                at, offset = (min(shown.values()), (-3, 9)) if convmixer else (max(shown.values()), (7, 0))
                gain = f'  ×{shown["ours"] / shown["timm"]:.2f}' if 'ours' in shown and 'timm' in shown else ''
                axis.annotate(
                    f'{model}{gain}', (at, top1), offset, textcoords='offset points', va='center', fontsize=7,
                    color=OURS if convmixer else TEXT)
        axis.set_xscale('log')
        axis.set_title(title)
        axis.set_xlabel('images / s')
        axis.grid(True, which='major')
        low, high = axis.get_xlim()
        axis.set_xlim(low, high * 6)  # room for the names
        axis.xaxis.set_major_formatter(lambda value, _: f'{value:g}')
        axis.xaxis.set_minor_formatter(lambda value, _: '')
    axes[0].set_ylabel('published top-1, ImageNet-1k (%)')
    marker = dict(linestyle='none', markersize=6)
    figure.legend(handles=[
        plt.Line2D([], [], label="timm's ConvMixer", **HOLLOW, **marker),
        plt.Line2D([], [], marker='o', color=OURS, label='timm-convmixer', **marker),
        plt.Line2D([], [], marker='o', color=PEER, label='other models of timm', **marker),
    ], loc='lower center', ncols=3, fontsize=8)
    caption(figure, 'Inference', subtitle(reports, f'batch {batch_size}', precision, '224×224'))
    figure.tight_layout(rect=(0, 0.06, 1, 0.90))
    return figure


def pick(values: List[Any]) -> Any:
    """The value that most have; of equals, the largest."""
    return max(set(values), key=lambda value: (values.count(value), value))


def plot_routes(reports: List[Dict[str, Any]], batch_size: Optional[int]) -> Optional[plt.Figure]:
    """Images a second of every route, a panel for each ConvMixer, both precisions."""
    groups = {
        key: group for key, group in merge_groups(reports, ('model', 'batch_size', 'image_size')).items()
        if any(row['implementation'] == 'ours' for row in group['rows'].values())
    }
    if not groups:
        return None
    batch_size = batch_size or pick([key[1] for key in groups])
    groups = {key: group for key, group in groups.items() if key[1] == batch_size}
    # Our plain model's export is the graph of timm's: one of the two is enough.
    order = [key for key in dict.fromkeys(
        (row['implementation'], row['route']) for implementation in ('timm', 'ours') for group in groups.values()
        for row in group['rows'].values() if row['implementation'] == implementation
    ) if key not in (('ours', 'onnxruntime'), ('ours', 'openvino'))]
    figure, axes = plt.subplots(
        1, len(groups), figsize=(2.2 + 2.7 * len(groups), 1.6 + 0.27 * len(order)), sharey=True, squeeze=False)
    precisions = [precision for precision in ('float32', 'bfloat16', 'amp_bfloat16') if any(
        row['precision'] == precision for group in groups.values() for row in group['rows'].values())][:2]
    height = 0.8 / len(precisions)
    for axis, ((model, _, image_size), group) in zip(axes[0], groups.items()):
        for j, precision in enumerate(precisions):
            shift = (j - (len(precisions) - 1) / 2) * height
            for i, (implementation, route) in enumerate(order):
                row = group['rows'].get((implementation, route, precision))
                if row is None:
                    continue
                value = row['images_per_second']
                low, high = (value * row['seconds']['median'] / row['seconds'][quartile] for quartile in ('q3', 'q1'))
                axis.barh(
                    i + shift, value, height * 0.92, color=OURS if implementation == 'ours' else TIMM,
                    alpha=(1., 0.5)[j], xerr=[[value - low], [high - value]], ecolor=TEXT, error_kw=dict(lw=0.8))
                axis.annotate(f'{value:.3g}', (high, i + shift), (3, 0), **SMALL)
        axis.set_title(model + (f', {image_size}×{image_size}' if image_size != 224 else ''))
        axis.set_xlabel('images / s')
        axis.grid(True, axis='x')
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.tick_params(axis='y', length=0)
    axes[0][0].set_yticks(
        range(len(order)), [f'{implementation}: {describe(route)}' for implementation, route in order], fontsize=8)
    for label, (implementation, _) in zip(axes[0][0].get_yticklabels(), order):
        label.set_color(OURS if implementation == 'ours' else TEXT)
    axes[0][0].set_ylim(len(order) - 0.4, -0.6)
    legend_height = 0.
    if len(precisions) > 1:
        legend_height = 0.28
        handles = [plt.Rectangle((0, 0), 1, 1, color=TIMM, alpha=(1., 0.5)[j], label=precision)
                   for j, precision in enumerate(precisions)]
        figure.legend(handles=handles, loc='lower center', ncols=4, fontsize=7.5)
    figure_height = figure.get_figheight()
    caption(figure, 'Inference', subtitle(reports, f'batch {batch_size}', *precisions[:2 - len(precisions)]))
    figure.tight_layout(rect=(0, legend_height / figure_height, 1, 1 - 0.45 / figure_height))
    return figure


def plot_image_size(reports: List[Dict[str, Any]]) -> Optional[plt.Figure]:
    """Time and memory against the number of pixels, and the exponents they grow with."""
    report = reports[-1]
    curves: Dict[Tuple[str, str, str], List[Dict[str, Any]]] = {}
    for row in report['rows']:
        curves.setdefault((row['model'], row['implementation'], row['route']), []).append(row)
    if not curves:
        return None
    growth = {(row['model'], row['implementation'], row['route']): row for row in report['growth']}
    several = len({key[0] for key in curves}) > 1
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    markers = dict(zip(dict.fromkeys(key[2] for key in curves), 'osD^v'))
    dashes = dict(zip(dict.fromkeys(key[0] for key in curves), ('-', '--', ':', '-.')))
    for (model, implementation, route), rows in curves.items():
        color = dict(ours=OURS, timm=TIMM).get(implementation, PEER)
        label = f'{implementation}: {describe(route)}' + (f' ({model})' if several else '')
        exponents = growth.get((model, implementation, route))
        if exponents:
            label += f'\ntime ~ pixels^{exponents["time"]:.2f}, memory ~ pixels^{exponents["memory"]:.2f}'
        pixels = [row['image_size'] ** 2 / 1e6 for row in rows]
        style = dict(color=color, marker=markers[route], linestyle=dashes[model], markersize=4.5,
                     lw=1.3 if implementation == 'ours' else 3, label=label,
                     markerfacecolor=color if route == 'eager' else 'none')
        axes[0].plot(pixels, [row['seconds']['median'] / row['batch_size'] for row in rows], **style)
        axes[1].plot(pixels, [row['memory']['allocated_mb'] / row['batch_size'] for row in rows], **style)
    sizes = sorted({row['image_size'] for row in report['rows']})
    for axis, title in zip(axes, ('seconds per image', 'peak memory per image beyond the weights (MB)')):
        axis.set_title(title, loc='left')
        axis.set_xticks([size ** 2 / 1e6 for size in sizes], [f'{size}²' for size in sizes], fontsize=7)
        axis.set_xlabel('pixels (image side squared), linear scale')
        axis.grid(True)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='lower center', ncols=3, fontsize=7.5)
    first = report['rows'][0]
    models = ', '.join(dict.fromkeys(key[0] for key in curves))
    rows_of_legend = -(-len(handles) // 3)
    caption(figure, 'Cost against image size', subtitle(
        reports, models, f'batch {first["batch_size"]}', first['precision']))
    figure.tight_layout(rect=(0, 0.11 * rows_of_legend, 1, 0.88))
    return figure


def plot_training(reports: List[Dict[str, Any]], batch_size: Optional[int]) -> Optional[plt.Figure]:
    """Peak memory and time of a training step, a row of panels for each model."""
    groups = merge_groups(reports, ('model', 'batch_size', 'image_size', 'precision'))
    if not groups:
        return None
    batch_size = batch_size or pick([key[1] for key in groups])
    groups = {key: group for key, group in groups.items() if key[1] == batch_size and group['rows']}
    if not groups:
        return None
    count = max(len(group['rows']) for group in groups.values())
    figure, axes = plt.subplots(
        len(groups), 2, figsize=(9, 0.9 + len(groups) * (0.55 + 0.23 * count)), squeeze=False)
    for (left, right), ((model, *_), group) in zip(axes, groups.items()):
        rows = list(group['rows'].values())
        parts = [row['mode'].partition('+') for row in rows]
        for axis, values, quartiles, unit in (
                (left, [row['memory']['allocated_mb'] for row in rows], None, '{:,.0f} MB'),
                (right, [row['seconds']['median'] for row in rows],
                 [(row['seconds']['q1'], row['seconds']['q3']) for row in rows], '{:#.3g} s'),
        ):
            colors = [OURS if implementation == 'ours' else TIMM for implementation, _, _ in parts]
            errors = quartiles and [[value - low for value, (low, _) in zip(values, quartiles)],
                                    [high - value for value, (_, high) in zip(values, quartiles)]]
            axis.barh(range(len(rows)), values, 0.7, color=colors, xerr=errors, ecolor=TEXT, error_kw=dict(lw=0.8))
            for i, value in enumerate(values):
                end = quartiles[i][1] if quartiles else value
                share = f'  ×{value / values[0]:.2f}' if i else ''
                axis.annotate(unit.format(value) + share, (end, i), (3, 0), textcoords='offset points', va='center',
                              fontsize=6.5)
            axis.grid(True, axis='x')
            axis.margins(x=0.25)
            axis.set_xlim(left=0)
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.tick_params(axis='y', length=0)
        left.set_yticks(range(len(rows)), [
            f'{implementation}: {describe(steps) if steps else "as created"}' for implementation, _, steps in parts],
            fontsize=7.5)
        for label, (implementation, _, _) in zip(left.get_yticklabels(), parts):
            label.set_color(OURS if implementation == 'ours' else TEXT)
        right.set_yticks(range(len(rows)), [''] * len(rows))
        left.set_title(f'{model}: peak memory', loc='left')
        right.set_title('time of a step', loc='left')
    sizes = ', '.join(f'{size}×{size}' for size in sorted({key[2] for key in groups}))
    precisions = ', '.join(sorted({key[3] for key in groups}))
    caption(figure, 'A training step', subtitle(
        reports, f'batch {batch_size}', precisions, sizes, 'memory beyond weights and optimizer state'))
    figure.tight_layout(rect=(0.015, 0, 1, 1 - 0.45 / figure.get_figheight()))
    return figure


def plot_kernels(reports: List[Dict[str, Any]]) -> Optional[plt.Figure]:
    """Images a second on a GPU: every mode of timm's ConvMixers and of ours, a panel each, and the fastest peers."""
    models: Dict[str, Dict[str, Dict[str, Any]]] = {}
    peers: Dict[str, float] = {}
    for report in reversed(reports):
        for row in report['rows']:
            if 'images_per_second' not in row:  # of a ceiling, or failed
                continue
            if row['stage'] in ('models', 'max-autotune'):
                models.setdefault(row['subject'], {}).setdefault(row['contender'], row)
            elif row['stage'] == 'peers':
                name, _, _ = row['contender'].partition(',')
                peers[name] = max(peers.get(name, 0.), row['images_per_second'])
    if not models:
        return None
    found = {contender for rows in models.values() for contender in rows}
    order = [contender for contender in CONTENDERS if contender in found]
    order += sorted(found - set(order), key=lambda contender: (contender.startswith('ours'), contender))
    labels = [CONTENDERS.get(contender, contender.replace(',', ':', 1)) for contender in order]
    labels += ['limit: its matrix products alone', *(f'{name}, fastest mode' for name in peers)]
    figure, axes = plt.subplots(
        1, len(models), figsize=(2.2 + 2.7 * len(models), 1.4 + 0.25 * len(labels)), sharey=True, squeeze=False)
    for axis, (model, rows) in zip(axes[0], models.items()):
        for i, contender in enumerate(order):
            if contender not in rows:
                continue
            row = rows[contender]
            value = row['images_per_second']
            low, high = (value * row['ms'] / quartile for quartile in reversed(row['ms_quartiles']))
            axis.barh(
                i, value, 0.7, color=OURS if contender.startswith('ours') else TIMM,
                xerr=[[value - low], [high - value]], ecolor=TEXT, error_kw=dict(lw=0.8))
            axis.annotate(f'{value:,.0f}', (high, i), (3, 0), **SMALL)
            if row.get('fraction_of_floor'):
                floor = value / row['fraction_of_floor']
        if any(row.get('fraction_of_floor') for row in rows.values()):
            axis.barh(len(order), floor, 0.7, color='none', edgecolor=TEXT, lw=0.8)
            axis.annotate(f'{floor:,.0f}', (floor, len(order)), (3, 0), **SMALL)
        for i, value in enumerate(peers.values(), len(order) + 1):
            axis.barh(i, value, 0.7, color=PEER)
            axis.annotate(f'{value:,.0f}', (value, i), (3, 0), **SMALL)
        axis.set_title(model)
        axis.set_xlabel('images / s')
        axis.grid(True, axis='x')
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.tick_params(axis='y', length=0)
        axis.tick_params(axis='x', labelsize=7)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=7.5)
    for label, contender in zip(axes[0][0].get_yticklabels(), order):
        label.set_color(OURS if contender.startswith('ours') else TEXT)
    axes[0][0].set_ylim(len(labels) - 0.4, -0.6)
    row = next(iter(next(iter(models.values())).values()))
    caption(figure, 'Inference on a GPU', subtitle(
        reports, f'batch {row["batch"]}', 'bfloat16', '224×224'))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    return figure


def plot_digits_training(reports: List[Dict[str, Any]]) -> Optional[plt.Figure]:
    """Loss by epoch, every seed of every mode of the newest run, and the accuracies."""
    report = reports[-1]
    styles = {
        'plain': ('layers', TIMM, '-', 2.5),
        'fused+checkpointing': ('fast paths, --grad-checkpointing', PEER, '-', 1.2),
        'fused': ('fast paths', OURS, '--', 1.2),
    }
    figure, axes = plt.subplots(figsize=(6, 3.2))
    for mode, (name, color, line, width) in styles.items():
        runs = [run for run in report['runs'] if run['mode'] == mode]
        correct = sum(run['correct'] for run in runs) / sum(run['images'] for run in runs)
        for i, run in enumerate(runs):
            axes.plot(range(1, len(run['losses']) + 1), run['losses'], color=color, linestyle=line, linewidth=width,
                      label=None if i else f'{name}: {correct:.1%}')
    axes.set(yscale='log', xlabel='epoch', ylabel='training loss')
    axes.grid(axis='y')
    axes.legend(title='held-out accuracy')
    axes.get_legend().get_title().set_color(TEXT)
    caption(figure, 'Training with the fast paths and without', subtitle(
        [report], report['settings']['model'], f'digits, {len({run["seed"] for run in report["runs"]})} seeds'))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / figure.get_figheight()))
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--results', type=Path, default=RESULTS, help='folder with the results (default: %(default)s)')
    add('--output', type=Path, required=True, help='folder to draw into')
    add('--pictures', nargs='+', choices=PICTURES, default=PICTURES, help='default: %(default)s')
    add('--format', choices=('svg', 'png'), default='svg', help='default: %(default)s')
    add('--batch-size', type=int, help='batch size to show (default: the one most models have, then the largest)')
    add('--precision', help='precision of the accuracy picture (default: the one most rows have)')
    add('--quick', action='store_true', help='draw from what the scripts wrote with --quick')
    args = parser.parse_args()

    reports = read_results(args.results, args.quick)
    pictures = {
        'throughput': ('throughput', lambda same: plot_throughput(same, args.batch_size, args.precision)),
        'routes': ('throughput', lambda same: plot_routes(same, args.batch_size)),
        'image_size': ('image_size', lambda same: plot_image_size(same)),
        'training': ('training', lambda same: plot_training(same, args.batch_size)),
        'kernels': ('kernels', lambda same: plot_kernels(same)),
        'digits_training': ('digits_training', lambda same: plot_digits_training(same)),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    with plt.rc_context(STYLE):
        for name in args.pictures:
            benchmark, plot = pictures[name]
            devices = [device for other, device in reports if other == benchmark]
            if not devices:
                print(f'{name}: no results of {benchmark}.py in {args.results}')
            for device in devices:
                figure = plot(reports[benchmark, device])
                if figure is None:
                    print(f'{name}_{device}: the results of {benchmark}.py have nothing to draw')
                    continue
                path = args.output / f'{name}_{device}.{args.format}'
                # Without the date, equal results give equal files.
                figure.savefig(path, dpi=150, metadata={'Date': None} if args.format == 'svg' else None)
                plt.close(figure)
                print(f'drew {path}')
                drawn += 1
    return 0 if drawn else 1


if __name__ == '__main__':
    sys.exit(main())
