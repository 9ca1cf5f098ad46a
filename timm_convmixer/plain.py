"""Whether a layer still is what its constructor made, so that a fast path may stand for it.

A fast path computes from a layer's tensors what the layer's own ``forward`` would. That is right only while nothing
else has a say: no subclass, no hook, no patched method, no attribute that changes the equation. This is proven for each
layer and each forward pass; a layer that is not plain is called.
"""
import sys
from operator import itemgetter
from types import BuiltinFunctionType
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['TENSORS', 'Form', 'Plain', 'find_patched']

# What a layer's tensors may be. A subclass of them may override any operation, even ``.shape``.
TENSORS = (nn.Parameter, torch.Tensor)

# Whatever a call of a module goes through, and the functions that the layers of a ConvMixer call.
_METHODS = (
    '__call__', '__getattr__', '_call_impl', '_wrapped_call_impl', '_compiled_call_impl', '_conv_forward',
    '_check_input_dim', '_check_non_zero_input_channels', 'forward',
)
_FUNCTIONS = ('batch_norm', 'conv2d', 'gelu', 'relu')
_ORIGINALS: Dict[Tuple[Any, str], Any] = {}
_FOREIGN = object()  # stands for what had been replaced before this module was imported, and equals nothing


def _note_originals(owner: Any, names: Tuple[str, ...]) -> None:
    """Record the attributes that a class or a module came with, to compare with from now on."""
    for name in names:
        definer = next((base for base in getattr(owner, '__mro__', (owner,)) if name in vars(base)), owner)
        value = getattr(owner, name, None)
        # __globals__ tells which module defines a function, even where functools.wraps disguises it.
        home = vars(sys.modules[getattr(definer, '__module__', definer.__name__)])
        is_own = value is None or isinstance(value, BuiltinFunctionType) or getattr(value, '__globals__', None) is home
        _ORIGINALS.setdefault((owner, name), value if is_own else _FOREIGN)


# Now, not at the first forward pass, before which somebody may replace one of them.
_note_originals(F, _FUNCTIONS)
_note_originals(torch, ('batch_norm', 'relu'))  # which F's call
for _cls in (nn.BatchNorm2d, nn.Conv2d, nn.GELU, nn.Identity, nn.ReLU, nn.Sequential, nn.SyncBatchNorm):
    _note_originals(_cls, _METHODS)


class Plain:
    """A kind of layer as its constructor makes it."""

    def __init__(
            self,
            *examples: nn.Module,
            children: Optional[Tuple[str, ...]] = (),
            last: Optional[nn.Module] = None,
            optional: bool = False,
            **attributes: Any,
    ):
        """
        Args:
            examples: A fresh layer of each class that serves.
            children: Names of the children of a container, in order; None for any.
            last: A fresh layer of the class that may follow these in an ``nn.Sequential``.
            optional: Whether the layer may be missing.
            attributes: Attributes, where the layer has them, and the only value that serves.
        """
        self.children = children
        self.last = None if last is None else type(last)
        self.optional = optional
        self._classes = {type(example): _Class(example, attributes) for example in examples}
        for cls in self._classes:
            _note_originals(cls, _METHODS)

    def difference(self, module: Optional[nn.Module]) -> str:
        """How a module differs from a plain one, in words that follow its name; ``''`` if it does not."""
        if module is None and self.optional:
            return ''
        cls = self._classes.get(type(module))
        if cls is None:
            return f'is a {type(module).__name__}'
        state = vars(module)
        if state.keys() != cls.names:
            reason = _shadowing(module, cls.names)
            if reason:
                return reason
        if (state['_forward_hooks'] or state['_forward_pre_hooks'] or state['_backward_hooks']
                or state['_backward_pre_hooks']):
            return 'has a hook'
        children = state['_modules']
        if self.children is not None and tuple(children) != self.children and not self._has_last(children):
            return f'has the children {list(children)} instead of {list(self.children)}'
        if state['_parameters'].keys() != cls.parameters or state['_buffers'].keys() != cls.buffers:
            return 'has other parameters or buffers than its class gives it'
        if cls.has_tensors:
            for tensor in (*state['_parameters'].values(), *state['_buffers'].values()):
                if tensor is not None and type(tensor) not in TENSORS:
                    return f'holds a {type(tensor).__name__}'
        if cls.get_attributes is not None and cls.get_attributes(state) != cls.values:
            name, value = next((name, value) for name, value in cls.attributes.items() if state[name] != value)
            return f'has {name}={state[name]!r} instead of {value!r}'
        return ''

    def _has_last(self, children: Mapping[str, Optional[nn.Module]]) -> bool:
        """Whether the children are the usual ones and one more, which may follow these."""
        if self.last is None or self.children is None:
            return False
        name = str(len(self.children))
        return tuple(children) == (*self.children, name) and type(children[name]) is self.last


class _Class:
    """What a class of layers gives a fresh instance, and the attributes that serve."""

    def __init__(self, example: nn.Module, attributes: Dict[str, Any]):
        self.names = frozenset(vars(example))
        self.parameters = frozenset(example._parameters)
        self.buffers = frozenset(example._buffers)
        self.has_tensors = bool(self.parameters or self.buffers)
        self.attributes = {name: value for name, value in attributes.items() if name in self.names}
        # One call for all of them; it returns a tuple, or the value itself if there is but one.
        self.get_attributes = itemgetter(*self.attributes) if self.attributes else None
        values = tuple(self.attributes.values())
        self.values = values[0] if len(values) == 1 else values


def _shadowing(module: nn.Module, fresh: FrozenSet[str]) -> str:
    """Which attribute of an instance, if any, hides what its class or its registered tensors provide."""
    state = vars(module)
    registered = {**state['_parameters'], **state['_buffers'], **state['_modules']}
    for name in sorted(state.keys() ^ fresh):
        if name in fresh:
            return f'lacks the attribute {name}'
        if name == '_compiled_call_impl':
            return 'is compiled'
        # Marks that other libraries leave on a layer change nothing.
        if hasattr(type(module), name) or name in registered:
            return f'has a {name} of its own'
    return ''


class Form:
    """The layers of a block or a stem, and what is plain for each."""

    def __init__(self, layers: Dict[str, Plain]):
        """
        Args:
            layers: By dotted path from the module itself, which comes first as ``''``; parents before children.
        """
        paths = list(layers)
        self._rows = [
            (path, paths.index(path.rpartition('.')[0]) if path else 0, path.rpartition('.')[2], plain)
            for path, plain in layers.items()
        ]

    def find(self, module: nn.Module, name: str = '') -> Tuple[List[nn.Module], str]:
        """Walk a module.

        Args:
            module: A block or a stem.
            name: Its name in the model, for the reason.

        Returns:
            Its layers in the order of the form, and ``''``; or an empty list, and the first layer that is not plain
            with what differs.
        """
        layers: List[nn.Module] = []
        for path, parent, child, plain in self._rows:
            layer = layers[parent]._modules.get(child) if path else module
            difference = plain.difference(layer)
            if difference:
                return [], f'{name}.{path}'.strip('.') + f' {difference}'
            layers.append(layer)
        return layers, ''


def find_patched() -> str:
    """The first method or function that plain layers call and that somebody has replaced, ``''`` if there is none."""
    for (owner, name), original in _ORIGINALS.items():
        if getattr(owner, name, None) is not original:
            return f'{owner.__name__}.{name} has been replaced'
    return ''
