"""The report of ``python -m timm_convmixer env``, for issues: versions, machine, switches and routes."""
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Iterator, Tuple

import timm
import torch

from . import __version__
from ._autoload import is_switched_off
from .kernels.gpu.support import kernel_refusal
from .kernels.support import has_onednn, onednn_supports
from .timing import usable_cores

__all__ = ['describe_environment']

_PACKAGES = ('triton', 'huggingface_hub', 'safetensors')
_VARIABLES = ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'TRITON_INTERPRET')
_VARIANT = 'convmixer_256_8_ks5_p2'


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def _read_cpuinfo(field: str) -> str:
    """Return the first value of a field in /proc/cpuinfo, ``''`` if there is none."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith(field)), '')


def _describe_cpu() -> str:
    name = _read_cpuinfo('model name') or platform.processor() or platform.machine()
    return f'{name}, {usable_cores()} of {os.cpu_count()} cores, {torch.get_num_threads()} threads'


def _describe_instructions() -> str:
    flags = [flag for flag in _read_cpuinfo('flags').split() if flag.startswith(('amx', 'avx512_bf16', 'avx512_fp16'))]
    bf16 = 'yes' if onednn_supports(torch.bfloat16) else 'no'
    onednn = f'oneDNN on, bfloat16 {bf16}' if has_onednn() else 'oneDNN off'
    return ', '.join([torch.backends.cpu.get_cpu_capability(), *flags, onednn])


def _describe_gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    refusal = kernel_refusal(torch.device('cuda', index), torch.bfloat16, (32, 256, 16, 16), 5)
    return f'{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}; {refusal or "kernels are on"}'


def describe_environment() -> Iterator[Tuple[str, str]]:
    """Yield the lines of the report, each a name and a value."""
    yield 'timm-convmixer', __version__
    yield 'Python', f'{platform.python_version()}, {platform.platform()}'
    yield 'torch', torch.__version__
    yield 'timm', timm.__version__
    for package in _PACKAGES:
        yield package, _version(package)
    yield 'CPU', _describe_cpu()
    yield 'instructions', _describe_instructions()
    gpus = torch.cuda.device_count()
    for index in range(min(gpus, 4)):
        yield f'GPU {index}', _describe_gpu(index)
    if gpus > 4:
        yield 'GPUs', f'{gpus} in all'
    variables = {
        name: value for name, value in sorted(os.environ.items())
        if name.startswith('TIMM_CONVMIXER_') or name in _VARIABLES
    }
    yield 'variables', ', '.join(f'{name}={value}' for name, value in variables.items()) or 'none'
    autoload = importlib.metadata.entry_points(group='torch.backends', name='timm_convmixer')
    state = 'found' if autoload else 'missing'
    if is_switched_off():
        state += ', switched off by TIMM_CONVMIXER_AUTOLOAD'
    if variables.get('TORCH_DEVICE_BACKEND_AUTOLOAD', '1') != '1':
        state += ', switched off by TORCH_DEVICE_BACKEND_AUTOLOAD'
    yield 'registered', f'{len(timm.list_models(module="convmixer"))} models; entry point {state}'

    device = torch.device('cuda' if gpus else 'cpu')
    model = timm.create_model(_VARIANT, device=device)
    images = torch.empty(32, *model.default_cfg['input_size'], device=device)
    yield 'routes', f'{_VARIANT}, {len(images)} images, float32, {device}'
    yield '- training', ': '.join(model.route(images))
    with torch.no_grad():
        yield '- inference', ': '.join(model.eval().route(images))
        yield '- inference form', ': '.join(timm.utils.model.reparameterize_model(model).route(images))
