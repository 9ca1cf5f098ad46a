"""ConvMixer for timm: every variant of "Patches Are All You Need?" (https://arxiv.org/abs/2201.09792) by name.

Importing this package imports neither torch nor timm. It registers the models with timm when ``timm.models`` is
imported, or at once if it already is. The public names below load on first use.
"""
import importlib
from typing import TYPE_CHECKING, Any

from ._autoload import register_after_timm

__version__ = '0.1.0'

_PUBLIC_NAMES = {
    'ConvMixer': 'convmixer',
    'ConvMixerBlock': 'layers',
    'checkpoint_filter_fn': 'checkpoints',
}

__all__ = ['__version__', *_PUBLIC_NAMES]

if TYPE_CHECKING:
    from .checkpoints import checkpoint_filter_fn as checkpoint_filter_fn
    from .convmixer import ConvMixer as ConvMixer
    from .layers import ConvMixerBlock as ConvMixerBlock


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_NAMES:
        return getattr(importlib.import_module(f'{__name__}.{_PUBLIC_NAMES[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC_NAMES})


register_after_timm()
