"""timm's ``register_model`` without its warning for the three ConvMixers that this package replaces."""
import warnings
from typing import Any, Callable

# Registered by timm's own convmixer.py; ours replace them on purpose.
TIMM_NAMES = ('convmixer_1536_20', 'convmixer_768_32', 'convmixer_1024_20_ks9_p14')


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Register a model entry point with timm. Its "Overwriting" warning is silenced only for :data:`TIMM_NAMES`."""
    from timm.models import register_model as register_with_timm

    if fn.__name__ not in TIMM_NAMES:
        return register_with_timm(fn)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message=f'Overwriting {fn.__name__} in registry', category=UserWarning)
        return register_with_timm(fn)
