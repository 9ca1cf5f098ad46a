"""What a bug report needs: versions, the machine, the switches, and which way a batch takes on it."""
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Iterator, Tuple

import torch

__all__ = ['describe_environment']

_PACKAGES = ('timm-convmixer', 'timm', 'torch', 'triton', 'huggingface_hub', 'safetensors')


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'not installed'


def _cpu_info(field: str) -> str:
    """The first value of a field of /proc/cpuinfo, '' where there is none."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith(field)), '')


def _describe_cpu() -> str:
    flags = _cpu_info('flags').split()
    units = [name for name in ('amx_bf16', 'avx512_bf16', 'avx512_fp16') if name in flags]
    parts = [
        _cpu_info('model name') or platform.processor() or platform.machine(),
        f'{os.cpu_count()} cores',
        f'{torch.get_num_threads()} threads',
        torch.backends.cpu.get_cpu_capability(),
        *units,
        f'oneDNN {"on" if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled else "off"}',
    ]
    return ', '.join(parts)


def _describe_gpu(index: int) -> str:
    from .kernels.gpu.support import inference_refusal

    major, minor = torch.cuda.get_device_capability(index)
    refusal = inference_refusal(torch.device('cuda', index), torch.bfloat16, (64, 256, 16, 16), 5)
    return f'{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}; {refusal or "kernels are on"}'


def describe_environment() -> Iterator[Tuple[str, str]]:
    """Rows of a report, a name and a value each."""
    import timm

    from .kernels import use_fused, use_gpu_kernels

    yield 'python', f'{platform.python_version()}, {platform.platform()}'
    for package in _PACKAGES:
        yield package, _version(package)
    yield 'CPU', _describe_cpu()
    for index in range(torch.cuda.device_count()):
        yield f'GPU {index}', _describe_gpu(index)
    yield 'models', f'{len(timm.list_models(module="convmixer"))} registered'
    yield 'fast paths', 'on' if use_fused() else 'off'
    yield 'GPU kernels', 'on everywhere' if use_gpu_kernels() else 'on where measured'
    variables = [f'{name}={value}' for name, value in sorted(os.environ.items()) if name.startswith('TIMM_CONVMIXER_')]
    yield 'variables', ', '.join(variables) or 'none'

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = timm.create_model('convmixer_256_8_ks5_p2').to(device)
    images = torch.zeros(32, 3, 32, 32, device=device)
    yield 'in training', ': '.join(model.route(images))
    with torch.no_grad():
        yield 'in inference', ': '.join(model.eval().route(images))
        yield 'inference form', ': '.join(timm.utils.model.reparameterize_model(model).route(images))
