"""Helpers that several test files share."""
import importlib.util
import itertools
import os
import random
import signal
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, Optional, Sequence

import pytest
import torch
import torch.nn as nn

__all__ = [
    'ALL', 'ROOT', 'assert_close', 'child_env', 'fast_paths', 'identify', 'kept_maps', 'let_onednn_support',
    'load_script', 'lower_thresholds', 'pairwise', 'randomize_norms', 'restore_signals',
]

ROOT = Path(__file__).parents[1]
# `pytest --all`: tests run in their long form.
ALL = os.environ.get('TIMM_CONVMIXER_ALL') == '1'


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize the statistics and affine of every BatchNorm; the initial values hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.2, 2.0),
                    (module.weight, -1.5, 1.5),
                    (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, floor: float = 0.) -> None:
    """Assert that the largest difference is within ``tolerance`` times the largest expected value. NaN fails.

    ``floor`` stands for the largest expected value where that is smaller.
    """
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(floor)


def lower_thresholds(monkeypatch) -> None:
    """Let feature maps of any size take the fast paths."""
    from timm_convmixer import routes

    monkeypatch.setattr(routes, 'SMALLEST_MAP', 0)


@contextmanager
def fast_paths(enable: bool) -> Iterator[None]:
    """Switch the fast paths on or off for a while."""
    from timm_convmixer.kernels import set_fused, use_fused

    before = use_fused()
    set_fused(enable)
    try:
        yield
    finally:
        set_fused(before)


def let_onednn_support(monkeypatch, *dtypes: torch.dtype) -> None:
    """Let the fast paths take oneDNN to support these dtypes of half precision alone, whatever the CPU is."""
    from timm_convmixer.kernels import support

    monkeypatch.setattr(support, 'onednn_supports', lambda dtype: dtype in (torch.float32, *dtypes))


def kept_maps(model: nn.Module, x: torch.Tensor) -> int:
    """Count the block-sized feature maps that autograd saves in a forward pass."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == len(x):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(tensor.shape[1] == model.num_features for tensor in kept.values())


def child_env(**env: Optional[str]) -> Dict[str, str]:
    """Return the environment of a child process: this checkout on the path, one thread. None unsets a variable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    changed = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', **env}
    return {name: value for name, value in changed.items() if value is not None}


def load_script(path: Path) -> ModuleType:
    """Import a file by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f'script_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restore_signals() -> None:
    """Restore signals that nohup, a shell's ``&`` or a service made this process ignore (a ``preexec_fn``)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGPROF))


def identify(value: Any) -> str:
    """Return a test id that is the same in every process: no addresses, no default ``repr``."""
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype)):
        return str(value).replace('torch.', '')
    if isinstance(value, (tuple, list)):
        return 'x'.join(map(identify, value))
    return getattr(value, '__name__', type(value).__name__)


def pairwise(*axes: Sequence[Any], seed: int = 0) -> List[Any]:
    """Return all combinations of the axes' values for ``parametrize``, and mark all but a pairwise cover as slow.

    Every pair of values of two axes occurs in a combination that always runs. ``pytest --all`` runs the rest.

        @pytest.mark.parametrize('size,dtype,act', pairwise(SIZES, DTYPES, ACTS))

    Args:
        axes: The values of each parameter.
        seed: Chooses among equally good covers.
    """
    combinations = list(itertools.product(*(range(len(axis)) for axis in axes)))
    random.Random(seed).shuffle(combinations)

    def pairs(combination: Sequence[int]) -> set:
        return set(itertools.combinations(enumerate(combination), 2)) or {combination}

    left, kept = set().union(*map(pairs, combinations)), set()
    while left:
        best = max(combinations, key=lambda combination: len(left & pairs(combination)))
        kept.add(best)
        left -= pairs(best)
    return [
        pytest.param(
            *(axis[index] for axis, index in zip(axes, combination)),
            marks=[] if combination in kept else pytest.mark.slow,
            id='-'.join(identify(axis[index]) for axis, index in zip(axes, combination)),
        )
        for combination in itertools.product(*(range(len(axis)) for axis in axes))
    ]
