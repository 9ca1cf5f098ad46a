"""The recipes without train.py: their keys against timm's library, their schedules against the authors'."""
import inspect
import json
from types import SimpleNamespace
from typing import Any, Dict

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from references import official_schedule
from support import ROOT, load_script
from timm_convmixer import ConvMixer

PLOT_SCHEDULES = ROOT / 'benchmarks' / 'plot_schedules.py'
RECIPES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / 'timm_convmixer' / 'recipes').glob('*.yaml')}

# Arguments of train.py with another name in the library, and arguments that train.py itself uses.
RENAMED = {
    'data_dir': 'root', 'dataset': 'name', 'workers': 'num_workers', 'aa': 'auto_augment', 'reprob': 're_prob',
    'remode': 're_mode', 'mixup': 'mixup_alpha', 'cutmix': 'cutmix_alpha', 'smoothing': 'label_smoothing',
    'train_interpolation': 'interpolation', 'drop_path': 'drop_path_rate',
}
OWN = {'model', 'amp', 'clip_grad', 'opt_kwargs'}


class Recorder:
    """Replaces the parsed arguments and records which of them timm reads."""

    def __init__(self, **given):
        self.given, self.asked = given, set()

    def __getattr__(self, name):
        self.asked.add(name)
        if name not in self.given:
            raise AttributeError(name)
        return self.given[name]


def known_keys():
    recorder = Recorder(opt='adamw', lr=0.1, weight_decay=0., momentum=0.9, sched='cosine')
    optimizer_kwargs(recorder)
    scheduler_kwargs(recorder)
    functions = (create_dataset, create_loader, create_transform, Mixup, timm.create_model, ConvMixer)
    parameters = {name for function in functions for name in inspect.signature(function).parameters}
    return parameters | recorder.asked | OWN, parameters


@pytest.mark.parametrize('name', RECIPES)
def test_keys_are_known(name):
    known, parameters = known_keys()
    assert set(RENAMED.values()) <= parameters
    unknown = {key for key in RECIPES[name] if RENAMED.get(key, key) not in known}
    assert not unknown


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_builds_a_training(name):
    """timm's library accepts the recipe's values for model, optimizer, schedule and augmentation."""
    recipe = RECIPES[name]
    args = SimpleNamespace(momentum=0.9, **recipe)
    with torch.device('meta'):
        model = timm.create_model(
            recipe['model'], num_classes=recipe['num_classes'], drop_path_rate=recipe.get('drop_path'))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **recipe.get('opt_kwargs', {}))
    decayed = sum(len(group['params']) for group in optimizer.param_groups if group['weight_decay'])
    if name == 'cifar10':
        assert decayed == len(list(model.parameters()))
    else:
        assert decayed == sum(parameter.ndim > 1 for parameter in model.parameters())
    assert {group['eps'] for group in optimizer.param_groups} == {recipe['opt_eps']}
    _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == {'imagenet': 150, 'cifar10': 100, 'digits': 100}[name]
    config = resolve_data_config(recipe, model=model)
    transform = create_transform(
        config['input_size'],
        is_training=True,
        auto_augment=recipe.get('aa'),
        re_prob=recipe.get('reprob', 0.),
        re_mode=recipe.get('remode', 'const'),
        scale=recipe.get('scale'),
        ratio=recipe.get('ratio'),
        interpolation=recipe.get('train_interpolation', 'random'),
        mean=config['mean'],
        std=config['std'],
    )
    assert transform(Image.new('RGB', (48, 40))).shape == tuple(recipe['input_size'])


def test_imagenet_recipe_is_the_papers():
    recipe = RECIPES['imagenet']
    published = dict(
        model='convmixer_1536_20', batch_size=64, workers=10, opt='adamw', amp=True, input_size=[3, 224, 224], lr=0.01,
        aa='rand-m9-mstd0.5-inc1', cutmix=0.5, mixup=0.5, reprob=0.25, remode='pixel', num_classes=1000, opt_eps=1e-3,
        clip_grad=1.0)
    assert {key: recipe[key] for key in published} == published


def recipe_schedule(recipe: Dict[str, Any], updates_per_epoch: int) -> torch.Tensor:
    """Return the learning rate of every update, as train.py sets it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe['lr'])
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(SimpleNamespace(**recipe)), updates_per_epoch=updates_per_epoch)
    learning_rates = []
    for epoch in range(epochs):
        for update in range(updates_per_epoch):
            learning_rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step_update(num_updates=epoch * updates_per_epoch + update + 1)
        scheduler.step(epoch + 1)
    return torch.tensor(learning_rates, dtype=torch.float64)


@pytest.mark.parametrize('name', ['imagenet', 'cifar10'])
def test_schedule_is_close_to_the_authors(name):
    recipe = RECIPES[name]
    ours = recipe_schedule(recipe, updates_per_epoch=20)
    # The authors use the schedule's value at the end of each update.
    official = official_schedule(torch.arange(1, len(ours) + 1, dtype=torch.float64) / len(ours), recipe['lr'])
    # np.interp over [0, 2/5, 4/5, 1] in the official repositories.
    corners = official_schedule(torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.]), recipe['lr'])
    torch.testing.assert_close(corners, recipe['lr'] * torch.tensor([0, 0.5, 1, 0.525, 0.05, 0.025, 0]))
    assert ours.max() == pytest.approx(recipe['lr']) == official.max()
    assert ours.argmax() == pytest.approx(official.argmax(), abs=1)
    assert ours[0] == 0 and ours[-1] < 1e-4 * recipe['lr']
    # The bounds in the recipes' comments.
    difference = (ours - official).abs() / recipe['lr']
    assert difference.mean() < 0.0105 and difference.max() < 0.0565


@pytest.mark.skipif(not PLOT_SCHEDULES.exists(), reason='no benchmark of that name')
def test_plot_of_the_schedules(tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    plot_schedules = load_script(PLOT_SCHEDULES)
    monkeypatch.setattr(plot_schedules, 'UPDATES_PER_EPOCH', {'imagenet': 5, 'cifar10': 5})
    monkeypatch.setattr('sys.argv', ['plot_schedules.py', '--results', str(tmp_path)])
    plot_schedules.main()
    assert (tmp_path / 'schedules.png').read_bytes().startswith(b'\x89PNG')
    numbers = json.loads((tmp_path / 'schedules.json').read_text())
    assert [entry['epochs'] for entry in numbers] == [150, 100]
    assert 'imagenet' in capsys.readouterr().out
