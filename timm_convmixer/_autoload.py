"""Registration without an import: the models enter timm's registry right after ``timm.models`` has been imported.

PyTorch loads the entry points of the group ``torch.backends`` at the end of ``import torch``, and timm imports torch
before its own models. So by the time a program has imported timm, this module has had its turn. It uses the standard
library alone: it runs within ``import torch`` and must neither slow that down nor make it fail.
"""
import importlib
import os
import sys
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Optional

_PACKAGE = __name__.rpartition('.')[0]
_AFTER = 'timm.models'


def register_models() -> None:
    """Fill timm's registry. A failure is a warning, never an error: timm works without this plugin."""
    try:
        importlib.import_module(f'{_PACKAGE}.convmixer')
    except Exception as error:
        warnings.warn(
            f'{_PACKAGE} could not register its models, timm goes on without them: {type(error).__name__}: {error}',
            RuntimeWarning,
            stacklevel=2,
        )


class _RegisteringLoader(Loader):
    """Loads ``timm.models`` as its own loader would, then registers the models."""

    def __init__(self, loader: Loader, finder: '_AfterTimmModels'):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Tools that read a module's loader (inspect, importlib.resources) must find timm's own.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:  # only now: after a failed import of timm, the next attempt still registers
            sys.meta_path.remove(self.finder)
        register_models()


class _AfterTimmModels:
    """A finder that has ``timm.models`` loaded by a :class:`_RegisteringLoader`, and leaves once that has happened."""

    def find_spec(self, fullname: str, path=None, target=None) -> Optional[ModuleSpec]:
        if fullname != _AFTER:
            return None
        # The finders before this one have been asked already.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1:]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


def _switched_off() -> bool:
    return os.environ.get('TIMM_CONVMIXER_AUTOLOAD') == '0'


def _within_import_of_torch() -> bool:
    # Importlib has no public way to ask whether an import is under way; without this private attribute the package
    # takes itself for imported by the user, and registers.
    torch = sys.modules.get('torch')
    return bool(getattr(getattr(torch, '__spec__', None), '_initializing', False))


def register_after_timm() -> None:
    """Register the models now if ``timm.models`` has been imported, else as soon as it is."""
    if _switched_off() and _within_import_of_torch():
        return
    if _AFTER in sys.modules:
        register_models()
    elif not any(isinstance(finder, _AfterTimmModels) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimmModels())


def autoload() -> None:
    """Entry point of the group ``torch.backends``: loading it has imported the package, which is all it takes.

    Switched off by ``TIMM_CONVMIXER_AUTOLOAD=0``: the package that PyTorch has just imported is forgotten again, so
    that a later ``import timm_convmixer`` is a first import, and registers.
    """
    if _switched_off() and not any(isinstance(finder, _AfterTimmModels) for finder in sys.meta_path):
        for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f'{_PACKAGE}.')]:
            del sys.modules[name]
