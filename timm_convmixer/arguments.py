"""Checks of ConvMixer's constructor arguments. Errors name the argument, its value and what is allowed."""
import difflib
import math
import operator
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Callable, Collection, Iterable, Optional, Type

import torch
import torch.nn as nn

# timm is imported only inside functions: importing it registers the models, which imports this module.
if TYPE_CHECKING:
    from timm.layers import LayerType, SelectAdaptivePool2d

__all__ = [
    'check_int', 'check_names', 'check_number', 'create_pool', 'resolve_act_layer', 'resolve_norm_layer',
]


# Arguments of other models, with what to say of them.
_FOREIGN = {
    'img_size': 'it takes images of any size',
    'input_size': 'it takes images of any size',
    'drop_block_rate': 'it has no DropBlock',
    'embed_dim': "did you mean 'dim'?",
    'width': "did you mean 'dim'?",
}


def check_names(function: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for an unknown argument, in Python's words (timm's callers match them) plus a suggestion."""
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = _FOREIGN.get(name) or (f'did you mean {close[0]!r}?' if close else '')
            raise TypeError(
                f'{function}() got an unexpected keyword argument {name!r}' + (f'; {hint}' if hint else ''))


def check_int(name: str, value: Any, minimum: int) -> int:
    """Return an argument as an integer; TypeError if it is not one, ValueError if it is less than ``minimum``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f'{name}={value!r} must be an integer of at least {minimum}.') from None
    if value < minimum:
        raise ValueError(f'{name}={value!r} must be an integer of at least {minimum}.')
    return value


def check_number(name: str, value: Any, below: float = math.inf) -> None:
    """Raise TypeError or ValueError for an argument that is no finite number from 0 to less than ``below``."""
    allowed = 'a finite number of at least 0' + (f' and less than {below:g}' if below < math.inf else '')
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name}={value!r} must be {allowed}.')
    if not 0. <= float(value) < below:
        raise ValueError(f'{name}={value!r} must be {allowed}.')


def create_pool(global_pool: str) -> 'SelectAdaptivePool2d':
    """Create the pooling of a name, ``''`` for none; ValueError for a name that timm does not know."""
    from timm.layers import SelectAdaptivePool2d

    known = ('', 'avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax', 'fastavgmax', 'fastcatavgmax')
    pool_type = global_pool.lower() if isinstance(global_pool, str) else global_pool or ''
    if pool_type not in known:
        raise ValueError(f'Unknown global_pool={global_pool!r}, known: {", ".join(map(repr, known))}.')
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))  # timm flattens only what is pooled


def _no_layer(name: str, layer: Any) -> TypeError:
    return TypeError(f'{name}={layer!r} must be a name, or a class or function that makes a layer.')


def _resolve_layer(
        name: str,
        layer: 'LayerType',
        resolve: Callable[['LayerType'], Optional[Type[nn.Module]]],
        examples: str,
) -> Type[nn.Module]:
    if layer is not None and not isinstance(layer, str) and (isinstance(layer, nn.Module) or not callable(layer)):
        raise _no_layer(name, layer)
    try:
        resolved = resolve(layer)
    except KeyError:
        resolved = None
    except AssertionError:  # timm takes no bound method and no other callable object
        raise _no_layer(name, layer) from None
    if resolved is None:
        raise ValueError(f'Unknown {name}={layer!r}; give a name that timm knows, such as {examples}, or a class.')
    return resolved


def resolve_act_layer(act_layer: 'LayerType') -> Type[nn.Module]:
    """Return the class of an activation.

    Raises:
        TypeError: If it is neither a name nor a class or function that makes a layer without arguments.
        ValueError: If timm does not know the name.
    """
    from timm.layers import get_act_layer

    resolved = _resolve_layer('act_layer', act_layer, get_act_layer, "'gelu', 'relu' or 'silu'")
    try:
        is_layer = isinstance(resolved(), nn.Module)
    except Exception as error:
        raise TypeError(f'act_layer={act_layer!r} makes no layer without arguments: {error}') from error
    if not is_layer:
        raise _no_layer('act_layer', act_layer)
    return resolved


def resolve_norm_layer(
        norm_layer: 'LayerType',
        dim: int,
        bn_momentum: Optional[float],
        bn_eps: Optional[float],
) -> Callable[..., nn.Module]:
    """Return the class of a normalisation, with the arguments of a BatchNorm if they are not None.

    Raises:
        TypeError: If it is neither a name nor a class or function, or an argument of a BatchNorm is no number.
        ValueError: If timm does not know the name, the layer does not take ``dim`` channels in NCHW, or an argument is
            out of range or given without a BatchNorm.
    """
    from timm import layers

    given_layer = norm_layer
    norm_layer = _resolve_layer(
        'norm_layer', norm_layer, layers.get_norm_layer, "'batchnorm2d', 'groupnorm', 'groupnorm1' or 'layernorm2d'")
    norm_class = norm_layer.func if isinstance(norm_layer, partial) else norm_layer
    for name in ('LayerNorm', 'LayerNormFp32', 'RmsNorm', 'RmsNormFp32', 'RMSNorm', 'SimpleNorm', 'SimpleNormFp32'):
        if norm_class in (getattr(layers, name, object), getattr(nn, name, object)):
            name_2d = name.lower().replace('norm', 'norm2d')
            raise ValueError(
                f'norm_layer={given_layer!r} expects channels last, but blocks are NCHW; use {name_2d!r}.')
    bn_args = {k: v for k, v in dict(momentum=bn_momentum, eps=bn_eps).items() if v is not None}
    for name, value in bn_args.items():
        check_number(f'bn_{name}', value)
    try:
        norm = norm_layer(dim, device='meta')
        # Of BatchNorm1d, InstanceNorm3d and the like.
        getattr(norm, '_check_input_dim', lambda x: None)(torch.empty(2, dim, 2, 2, device='meta'))
    except Exception as error:
        raise ValueError(f'norm_layer={given_layer!r} makes no layer for dim={dim} channels: {error}') from error
    if not bn_args:
        return norm_layer
    if not (isinstance(norm_class, type) and issubclass(norm_class, nn.modules.batchnorm._BatchNorm)):
        given = ' and '.join(f'bn_{k}={v!r}' for k, v in bn_args.items())
        raise ValueError(f'{given} requires a BatchNorm norm_layer, got norm_layer={norm_class!r}.')
    return partial(norm_layer, **bn_args)
