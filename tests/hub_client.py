"""The Hub's real client in its own interpreter, and the models that tests upload to the fake Hub."""
import io
import json
import os
from pathlib import Path
from typing import Dict, Optional

import safetensors.torch
import timm
import torch
import torch.nn as nn

import timm_convmixer  # noqa: F401, registers the models
from interpreter import Interpreter
from support import randomize_norms

__all__ = [
    'Client', 'NAME', 'SMALL', 'as_config', 'as_pickle', 'as_safetensors', 'image', 'make_model', 'start_client',
]

NAME = 'convmixer_768_32'
SMALL = dict(dim=16, depth=3)


def image(channels: int = 3) -> torch.Tensor:
    return torch.sin(torch.arange(channels * 42 * 42.)).view(1, channels, 42, 42)


def make_model(name: str = NAME, seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    return randomize_norms(timm.create_model(name, **{**SMALL, **kwargs}), seed).eval()


def as_safetensors(state_dict: Dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(state_dict)


def as_pickle(state_dict: Dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return buffer.getvalue()


def as_config(**config) -> bytes:
    """Return a config.json like those of timm's repositories."""
    pretrained_cfg = dict(num_classes=1000, input_size=[3, 224, 224], first_conv='stem.0', classifier='head')
    return json.dumps(dict(architecture=NAME, num_classes=1000, pretrained_cfg=pretrained_cfg, **config)).encode()


def client_env(endpoint: str, home: Path, offline: bool = False) -> Dict[str, Optional[str]]:
    """Return the environment of a client that knows only this server, and no settings of the machine."""
    env = {name: None for name in os.environ if name.startswith(('HF_', 'HUGGING')) or name.lower().endswith('_proxy')}
    return {
        **env,
        'HF_ENDPOINT': endpoint,
        'HF_HOME': str(home),
        'TORCH_HOME': str(home / 'torch'),
        'HF_HUB_OFFLINE': '1' if offline else None,
        'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
    }


class Client:
    """Creates models in its own interpreter and returns their outputs."""

    def __init__(self, interpreter: Interpreter):
        self.interpreter = interpreter

    def __enter__(self) -> 'Client':
        self.interpreter.__enter__()
        return self

    def __exit__(self, *args) -> None:
        self.interpreter.__exit__(*args)

    def run(self, code: str, **variables):
        assignments = ''.join(f'{name} = {value!r}\n' for name, value in variables.items())
        prelude = (
            'import timm, torch\n'
            'import timm_convmixer\n'
            'def image(channels=3):\n'
            '    return torch.sin(torch.arange(channels * 42 * 42.)).view(1, channels, 42, 42)\n'
        )
        return self.interpreter.run(prelude + assignments + code)

    def logits(self, name: str, in_chans: int = 3, **kwargs) -> torch.Tensor:
        """Return the logits of ``create_model(name, pretrained=True, **kwargs)`` for the image."""
        code = (
            'model = timm.create_model(name, pretrained=True, **kwargs).eval()\n'
            'assert type(model) is timm_convmixer.ConvMixer\n'
            'result = model(image(model.in_chans)).tolist()\n'
        )
        if in_chans != 3:
            kwargs['in_chans'] = in_chans
        return torch.tensor(self.run(code, name=name, kwargs=kwargs))


def start_client(
        endpoint: str,
        folder: Path,
        home: Path,
        offline: bool = False,
        **env: Optional[str],
) -> Client:
    """Start a client with its cache in ``home`` and its log in ``folder``."""
    return Client(Interpreter({**client_env(endpoint, home, offline), **env}, log=folder / 'client.log'))
