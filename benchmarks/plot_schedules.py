"""The authors' learning rate schedules beside those of our recipes, which have to do with the schedulers that timm has.

    python benchmarks/plot_schedules.py

Prints how far apart they are, and writes benchmarks/results/schedules.json and schedules.png. Needs matplotlib:
pip install 'timm-convmixer[benchmark]'.
"""
import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

RECIPES = Path(__file__).parent.parent / 'timm_convmixer' / 'recipes'
RESULTS = Path(__file__).parent / 'results'
# Updates an epoch, of as many images as the authors used: 1,281,167 by 640, and 50,000 by 512.
UPDATES_PER_EPOCH = {'imagenet': 2001, 'cifar10': 97}


def official_schedule(progress: torch.Tensor, lr: float) -> torch.Tensor:
    """The schedule of both official repositories: up, down to a twentieth, down to 0.

    Args:
        progress: Share of the training that is done, from 0 to 1, of any shape.
        lr: Learning rate at the peak.
    """
    rise = progress / 0.4
    fall = 1 - 0.95 * (progress - 0.4) / 0.4
    tail = 0.05 * (1 - progress) / 0.2
    return lr * torch.where(progress < 0.4, rise, torch.where(progress < 0.8, fall, tail))


def recipe_schedule(recipe: Dict[str, Any], updates_per_epoch: int) -> List[float]:
    """Learning rate of every update of a recipe's training, set as train.py sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(SimpleNamespace(**recipe)),
        updates_per_epoch=updates_per_epoch,
    )
    learning_rates = []
    for epoch in range(epochs):
        for update in range(updates_per_epoch):
            learning_rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step_update(num_updates=epoch * updates_per_epoch + update + 1)
        scheduler.step(epoch + 1)
    return learning_rates


def compare(name: str, updates_per_epoch: int) -> Dict[str, Any]:
    """Both schedules of a recipe, and how far apart they are as a share of the peak."""
    recipe = yaml.safe_load((RECIPES / f'{name}.yaml').read_text())
    ours = torch.tensor(recipe_schedule(recipe, updates_per_epoch), dtype=torch.float64)
    # The authors set the learning rate of an update to that of its end.
    progress = torch.arange(1, len(ours) + 1, dtype=torch.float64) / len(ours)
    official = official_schedule(progress, recipe['lr'])
    difference = (ours - official).abs() / recipe['lr']
    return dict(
        name=name,
        epochs=len(ours) // updates_per_epoch,
        peak=recipe['lr'],
        mean_difference=difference.mean().item(),
        largest_difference=difference.max().item(),
        official=official,
        ours=ours,
    )


def plot(comparisons: List[Dict[str, Any]], path: Path) -> None:
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(comparisons), figsize=(9, 3.2), layout='constrained')
    for axis, comparison in zip(axes, comparisons):
        updates = len(comparison['ours'])
        every = max(1, updates // 1000)
        epochs = torch.arange(1, updates + 1)[::every] * comparison['epochs'] / updates
        axis.plot(epochs, comparison['official'][::every], color='0.35', linestyle='--', label='authors')
        axis.plot(epochs, comparison['ours'][::every], color='tab:blue', label=f'{comparison["name"]}.yaml, timm')
        axis.set_title(
            f'{comparison["name"]}: {comparison["mean_difference"]:.1%} of the peak apart, '
            f'{comparison["largest_difference"]:.1%} at most',
            fontsize=10,
        )
        axis.set_xlabel('epoch')
        axis.set_xlim(0, comparison['epochs'])
        axis.set_ylim(0, None)
        axis.spines[['top', 'right']].set_visible(False)
        axis.legend(frameon=False, loc='lower center')
    axes[0].set_ylabel('learning rate')
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder to write to')
    args = parser.parse_args()
    comparisons = [compare(name, updates) for name, updates in UPDATES_PER_EPOCH.items()]
    print('recipe    epochs  peak   mean difference  largest difference (of the peak)')
    for comparison in comparisons:
        print(
            f'{comparison["name"]:<8}  {comparison["epochs"]:>6}  {comparison["peak"]:<5}  '
            f'{comparison["mean_difference"]:>15.2%}  {comparison["largest_difference"]:>18.2%}')
    args.results.mkdir(parents=True, exist_ok=True)
    numbers = [{k: v for k, v in comparison.items() if k not in ('official', 'ours')} for comparison in comparisons]
    (args.results / 'schedules.json').write_text(json.dumps(numbers, indent=2) + '\n')
    plot(comparisons, args.results / 'schedules.png')


if __name__ == '__main__':
    main()
