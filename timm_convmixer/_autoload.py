"""Registers the models as soon as ``timm.models`` has been imported, without an import in the user's program.

PyTorch loads the entry points of the group ``torch.backends`` at the end of ``import torch``, and timm imports torch
before its own models. So this module has run by the time timm imports them. It uses only the standard library, because
it runs inside ``import torch``, which it must neither slow down nor break.
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
    """Register the models with timm. A failure is a warning, never an error: timm works without this plugin."""
    try:
        importlib.import_module(f'{_PACKAGE}.convmixer')
    except Exception as error:
        warnings.warn(
            f'{_PACKAGE} could not register its models; timm works without them: {type(error).__name__}: {error}',
            RuntimeWarning,
            stacklevel=2,
        )


class _RegisteringLoader(Loader):
    """Loads ``timm.models`` with its own loader, then registers the models."""

    def __init__(self, loader: Loader, finder: '_AfterTimmModels'):
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> Optional[ModuleType]:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # inspect and importlib.resources read a module's loader: give them timm's own.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:  # only after a successful import, so that a second attempt still registers
            sys.meta_path.remove(self.finder)
        register_models()


class _AfterTimmModels:
    """A one-shot finder that loads ``timm.models`` with :class:`_RegisteringLoader`."""

    def find_spec(self, fullname: str, path=None, target=None) -> Optional[ModuleSpec]:
        if fullname != _AFTER:
            return None
        # Python has already asked the finders before this one.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1:]:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self)
                return spec
        return None


def is_switched_off() -> bool:
    return os.environ.get('TIMM_CONVMIXER_AUTOLOAD', '').strip() == '0'


def _within_import_of_torch() -> bool:
    # importlib has no public API for this. Without the private attribute, this import counts as the user's own.
    torch = sys.modules.get('torch')
    return bool(getattr(getattr(torch, '__spec__', None), '_initializing', False))


def register_after_timm() -> None:
    """Register the models now if ``timm.models`` has been imported, else as soon as it is."""
    if is_switched_off() and _within_import_of_torch():
        return
    if _AFTER in sys.modules:
        register_models()
    elif not any(isinstance(finder, _AfterTimmModels) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimmModels())


def autoload() -> None:
    """The entry point of the group ``torch.backends``. Loading it imports the package, which is all that is needed.

    With ``TIMM_CONVMIXER_AUTOLOAD=0`` it removes the package from ``sys.modules`` again, so that a later
    ``import timm_convmixer`` runs as a first import and registers the models.
    """
    if is_switched_off() and not any(isinstance(finder, _AfterTimmModels) for finder in sys.meta_path):
        for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f'{_PACKAGE}.')]:
            del sys.modules[name]
