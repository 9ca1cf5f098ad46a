"""The benchmarked models and the ways (routes) to run them.

Implementations of a ConvMixer are ``ours`` (``timm.create_model`` with the plugin installed), ``timm`` (timm's own) and
``paper`` (the paper's code, rewritten). Other models of timm are ``peer``.

A route is a ``+``-separated list of ``reparam`` (timm's ``reparameterize_model``), ``channels_last``, and at most one
of ``compiled`` (``torch.compile``), ``graphs`` (compiled with CUDA graphs), ``onnxruntime`` and ``openvino`` (both from
timm's ONNX export), and ``executorch`` (XNNPACK, which decides on its threads itself). ``eager`` is the empty list.
"""
import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional

import timm
import timm.models.convmixer
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from timm.utils.onnx import onnx_export

from harness import autocast
from timm_convmixer import ConvMixer
from timm_convmixer.comparison import architecture, bn_eps, create_timms, random_images, set_bn_eps

PEERS = ('resnet50', 'resnet152', 'deit_small_patch16_224', 'convnext_tiny', 'resmlp_24_224', 'mixer_b16_224')

# Precision: (dtype of weights and images, dtype of autocast)
PRECISIONS = {
    'float32': (torch.float32, None),
    'bfloat16': (torch.bfloat16, None),
    'float16': (torch.float16, None),
    'amp_bfloat16': (torch.float32, torch.bfloat16),
    'amp_float16': (torch.float32, torch.float16),
}
STEPS = ('reparam', 'channels_last', 'compiled', 'graphs', 'onnxruntime', 'openvino', 'executorch')


class Unsupported(Exception):
    """A combination that cannot run here, with the reason for the report."""


@dataclass(frozen=True)
class Route:
    reparam: bool = False
    channels_last: bool = False
    backend: Optional[str] = None

    @classmethod
    def parse(cls, text: str) -> 'Route':
        steps = [] if text == 'eager' else text.split('+')
        unknown = [step for step in steps if step not in STEPS]
        backends = [step for step in steps if step in STEPS[2:]]
        if unknown or len(backends) > 1 or len(set(steps)) < len(steps):
            raise ValueError(
                f'route={text!r}: give eager, or steps of {", ".join(STEPS)} joined by +, one backend at most.')
        return cls('reparam' in steps, 'channels_last' in steps, backends[0] if backends else None)

    def __str__(self) -> str:
        steps = [name for name in STEPS[:2] if getattr(self, name)] + ([self.backend] if self.backend else [])
        return '+'.join(steps) or 'eager'


def is_convmixer(name: str) -> bool:
    return isinstance(timm.create_model(name, device='meta'), ConvMixer)


def paper_convmixer(
        dim: int,
        depth: int,
        kernel_size: int,
        patch_size: int,
        in_chans: int,
        num_classes: int,
        act_layer: Callable[[], nn.Module],
) -> nn.Module:
    """Build ConvMixer in a few lines of ``Sequential``, as in the paper's appendix."""
    def after(conv: nn.Module) -> List[nn.Module]:
        return [conv, act_layer(), nn.BatchNorm2d(dim)]

    class AddInput(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x

    layers = after(nn.Conv2d(in_chans, dim, patch_size, stride=patch_size))
    for _ in range(depth):
        layers.append(AddInput(*after(nn.Conv2d(dim, dim, kernel_size, groups=dim, padding='same'))))
        layers.extend(after(nn.Conv2d(dim, dim, 1)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, num_classes))


def create(implementation: str, name: str) -> nn.Module:
    """Create a model with initial weights, in training mode, on the CPU.

    Raises:
        ValueError: If the implementation is unknown.
    """
    if implementation in ('ours', 'peer'):
        return timm.create_model(name)
    if implementation == 'timm':
        return create_timms(name)
    if implementation == 'paper':
        return set_bn_eps(paper_convmixer(**architecture(name)), bn_eps(name))
    raise ValueError(f'Unknown implementation={implementation!r}, known: ours, timm, paper, peer.')


def load_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Load the weights of another implementation by key, or by order into ``paper``, whose keys are numbers."""
    own = model.state_dict()
    if own.keys() != state_dict.keys():
        if [value.shape for value in own.values()] != [value.shape for value in state_dict.values()]:
            raise ValueError(f'The shapes of state_dict do not match {type(model).__name__}.')
        state_dict = dict(zip(own, state_dict.values()))
    model.load_state_dict(state_dict)


def prepare(
        model: nn.Module,
        route: Route,
        precision: str,
        images: torch.Tensor,
        device: str,
        exporter: str = 'torchscript',
) -> Callable[[], torch.Tensor]:
    """Prepare a copy of a model to run by a route.

    Args:
        model: Model in eval mode, float32, on the CPU. It is not changed.
        route: Way to run it.
        precision: A key of ``PRECISIONS``.
        images: Images ``(B, 3, H, W)``, float32, on the CPU.
        device: Device to run on.
        exporter: ONNX exporter of timm's ``onnx_export.py``, ``'torchscript'`` or ``'dynamo'``.

    Returns:
        A function that runs the model on the images and returns the logits ``(B, num_classes)``.

    Raises:
        Unsupported: If the model, precision or device has no such route, or a package is missing.
    """
    dtype, amp_dtype = PRECISIONS[precision]
    if route.backend == 'graphs' and device == 'cpu':
        raise Unsupported('CUDA graphs need a GPU')
    if route.reparam:
        fused = reparameterize_model(model)
        if [type(module) for module in fused.modules()] == [type(module) for module in model.modules()]:
            raise Unsupported('reparameterize_model() changes nothing')
        model = fused
    else:
        model = copy.deepcopy(model)

    if route.backend == 'executorch':
        return _prepare_executorch(model, route, precision, images, device)
    if route.backend in ('onnxruntime', 'openvino'):
        return _prepare_runtime(model, route, precision, images, device, exporter)

    layout = torch.channels_last if route.channels_last else torch.preserve_format
    model = model.to(device=device, dtype=dtype, memory_format=layout)
    images = images.to(device=device, dtype=dtype, memory_format=layout)
    if route.backend:
        # A separate cache: otherwise the second of two models with equal graphs would reuse the first one's kernels.
        os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp(dir=_scratch_dir())
        mode = 'reduce-overhead' if route.backend == 'graphs' else 'default'
        model = torch.compile(model, dynamic=False, mode=mode)

    def run() -> torch.Tensor:
        with torch.inference_mode(), autocast(device, amp_dtype):
            return model(images)

    return run


def prepare_saved(
        implementation: str,
        name: str,
        weights: str,
        route: str,
        precision: str,
        batch_size: int,
        image_size: int,
        device: str,
        exporter: str,
) -> Callable[[], torch.Tensor]:
    """Run :func:`prepare` in another interpreter, from names and a file of weights."""
    model = create(implementation, name)
    load_weights(model, torch.load(weights, weights_only=True))
    images = random_images(batch_size, image_size)
    return prepare(model.eval(), Route.parse(route), precision, images, device, exporter)


def _prepare_runtime(
        model: nn.Module,
        route: Route,
        precision: str,
        images: torch.Tensor,
        device: str,
        exporter: str,
) -> Callable[[], torch.Tensor]:
    if device != 'cpu' or route.channels_last:
        raise Unsupported('only measured on a CPU with contiguous images')
    hints = {'float32': 'f32', 'bfloat16': 'bf16'} if route.backend == 'openvino' else {'float32': None}
    if precision not in hints:
        raise Unsupported(f'{route.backend} is only measured in {" and ".join(hints)}')
    try:
        import onnx  # noqa: F401, required by timm's export
        runtime = __import__(route.backend)
    except ImportError as error:
        raise Unsupported(f'{error.name} is not installed') from None

    with tempfile.TemporaryDirectory(dir=_scratch_dir()) as folder:
        file = str(Path(folder) / 'model.onnx')
        onnx_export(model, file, example_input=images, use_dynamo=exporter == 'dynamo', check=False)
        threads = torch.get_num_threads()
        array = images.numpy()
        if route.backend == 'onnxruntime':
            options = runtime.SessionOptions()
            options.intra_op_num_threads = threads
            session = runtime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
            feed = {session.get_inputs()[0].name: array}
            return lambda: torch.from_numpy(session.run(None, feed)[0])
        core = runtime.Core()
        network = core.read_model(file)
        network.reshape(list(images.shape))
        compiled = core.compile_model(network, 'CPU', {
            'INFERENCE_PRECISION_HINT': hints[precision],
            'INFERENCE_NUM_THREADS': threads,
            'PERFORMANCE_HINT': 'LATENCY',
        })
        request = compiled.create_infer_request()
        return lambda: torch.from_numpy(request.infer({0: array})[0].copy())


def _prepare_executorch(
        model: nn.Module,
        route: Route,
        precision: str,
        images: torch.Tensor,
        device: str,
) -> Callable[[], torch.Tensor]:
    if device != 'cpu' or route.channels_last or precision != 'float32':
        raise Unsupported('only measured on a CPU with contiguous images in float32')
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime
    except ImportError as error:
        raise Unsupported(f'{error.name} is not installed') from None

    with torch.no_grad():
        edge = to_edge_transform_and_lower(
            torch.export.export(model, (images,)), partitioner=[XnnpackPartitioner()])
    with tempfile.TemporaryDirectory(dir=_scratch_dir()) as folder:
        file = Path(folder) / 'model.pte'
        edge.to_executorch().save(str(file))
        method = Runtime.get().load_program(file).load_method('forward')
    # The output is the method's own memory, which the next call overwrites.
    return lambda: method.execute([images])[0].clone()


_SCRATCH: List[tempfile.TemporaryDirectory] = []


def _scratch_dir() -> str:
    """Return a directory that is deleted when the program ends."""
    if not _SCRATCH:
        _SCRATCH.append(tempfile.TemporaryDirectory(prefix='timm-convmixer-benchmark-', ignore_cleanup_errors=True))
    return _SCRATCH[0].name
