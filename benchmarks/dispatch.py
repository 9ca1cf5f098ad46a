"""What a call of a GPU kernel costs the CPU, without a GPU: everything but the driver's own launch.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --output dispatch.json

Small batches are bound by this: a GPU that is done before the next kernel has been asked for waits. Three columns, in
microseconds a call: ``ours`` with the launch stubbed out, so what this package adds; ``with Triton's`` with everything
down to the call of the driver; ``kernel[grid]`` the same, had Triton looked for the machine code by every argument of
every call (see timm_convmixer/kernels/gpu/launch.py). The targets are for ``ours``.

The tensors are on the CPU and Triton runs on a driver that launches nothing (:class:`StubDriver`). What is missing is
``torch.cuda.current_device()``, the caching allocator instead of the CPU's, and the driver's launch. Kernels are
compiled for compute capability 9.0, which takes half a minute the first time. Times are of this thread on a processor,
so that a busy machine disturbs little.
"""
import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Tuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from harness import machine_name, print_table, say, start_report, write_results
from timm_convmixer import kernels
from timm_convmixer.kernels.gpu import launch, support
from timm_convmixer.kernels.normalization import BatchNormalization
from timm_convmixer.timing import summarize

# Microseconds a call may take, and launches of it.
INFERENCE, TRAINING = 30., 60.
BATCH, CHANNELS, SIZE, KERNEL = 8, 64, 8, 7


class StubDriver:
    """A driver for ``triton.runtime.driver.set_active``: compiles for a GPU and launches nothing.

    Attributes:
        launched: What the last launch was asked for: grid, stream, function, metadata, hooks, and the arguments.
        source: What the kernel of the last launch was compiled from.
    """
    utils = SimpleNamespace(
        # Triton loads a module that is None anew at every launch.
        load_binary=lambda *args: (1, 1, 32, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {'max_shared_mem': launch.H100.shared_memory},
    )

    def __init__(self) -> None:
        self.launched: Tuple[Any, ...] = ()
        self.source: Any = None

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            self.launched, self.source = args, source
        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def make_calls() -> Dict[str, Tuple[float, Callable[[], Any]]]:
    """Each operation by name, with its target and a call of it; no view begins at an odd address."""
    generator = torch.Generator().manual_seed(0)

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, grad, residual = (new(BATCH, CHANNELS, SIZE, SIZE) for _ in range(3))
    depthwise, pointwise = new(CHANNELS, 1, KERNEL, KERNEL), new(CHANNELS, CHANNELS, 1, 1)
    bias, vector = new(CHANNELS), new(CHANNELS, dtype=torch.float32)
    large = new(132, CHANNELS, 16, 16)  # enough tiles for the persistent kernel
    norm = BatchNormalization('relu', vector, vector, vector.clone(), vector.clone(), True, 0.1, 1e-5)
    problem = x.device, x.dtype, x.shape, KERNEL
    return {
        'kernel_refusal': (INFERENCE, lambda: kernels.kernel_refusal(*problem)),
        'depthwise_mixing': (INFERENCE, lambda: kernels.depthwise_mixing(x, depthwise, bias, vector, vector, 'relu')),
        'pointwise_mixing': (INFERENCE, lambda: kernels.pointwise_mixing(x, pointwise, bias, vector, vector, 'relu')),
        'pointwise_mixing, persistent': (
            INFERENCE, lambda: kernels.pointwise_mixing(large, pointwise, bias, vector, vector, 'relu')),
        'activation_batch_norm': (TRAINING, lambda: kernels.activation_batch_norm(x, norm)),
        'activation_affine': (TRAINING, lambda: kernels.activation_affine(x, vector, vector, 'relu', residual)),
        'activation_norm_backward': (
            TRAINING, lambda: kernels.activation_norm_backward(grad, x, 'relu', vector, vector, vector, True)),
        'depthwise_convolution': (TRAINING, lambda: kernels.depthwise_convolution(x, depthwise, bias)),
        'depthwise_input_gradient': (TRAINING, lambda: kernels.depthwise_input_gradient(grad, depthwise, residual)),
        'depthwise_weight_gradient': (TRAINING, lambda: kernels.depthwise_weight_gradient(x, grad, KERNEL)),
        'pointwise_convolution': (TRAINING, lambda: kernels.pointwise_convolution(x, pointwise, bias)),
        'pointwise_input_gradient': (TRAINING, lambda: kernels.pointwise_input_gradient(grad, pointwise)),
        'pointwise_weight_gradient': (TRAINING, lambda: kernels.pointwise_weight_gradient(x, grad)),
    }


def processor_seconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """Seconds of one call that this thread spends on a processor, as the mean of ``repeats`` in a row."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--output', type=Path, help='results file (default: none)')
    args = parser.parse_args()
    if launch.INTERPRETED:
        parser.error('TRITON_INTERPRET is set: nothing would be launched as on a GPU')
    torch.set_num_threads(1)
    report = start_report('dispatch', 'cpu', vars(args))

    # A tensor on the CPU passes for one on an H100.
    support.is_interpreted = lambda: True
    kernels.set_gpu_kernels()
    triton.runtime.driver.set_active(StubDriver())
    calls = make_calls()
    count: List[str] = []

    def stub(self: launch.Launch, tensors: Any) -> None:
        count.append(self.kernel.__name__)

    def by_arguments(self: launch.Launch, tensors: Any) -> None:
        self.kernel[self.grid](*tensors, *self.values, **self.options)

    launches: Dict[str, int] = {}
    columns: Dict[str, Dict[str, List[float]]] = {}
    whole = launch.Launch._launch
    with torch.no_grad():
        for column, method in (('ours', stub), ("with Triton's", whole), ('kernel[grid]', by_arguments)):
            launch.Launch._launch = method
            if method is stub:
                for name, (_, call) in calls.items():
                    count.clear()
                    call()
                    launches[name] = len(count)
                launch.Launch._launch = lambda self, tensors: None
            columns[column] = {name: [] for name in calls}
            for i in range(args.rounds + 1):
                for name, (_, call) in calls.items():
                    seconds = processor_seconds(call)
                    if i:  # the first round compiles
                        columns[column][name].append(seconds)
            say(f'{column}: {args.rounds} rounds')
    launch.Launch._launch = whole

    rows, failed = [], 0
    for name, (target, _) in calls.items():
        seconds = {column: summarize(samples[name]) for column, samples in columns.items()}
        failed += 1e6 * seconds['ours']['median'] > target
        rows.append(dict(operation=name, launches=launches[name], target=target * 1e-6, seconds=seconds))
    print_table(
        f'Microseconds a call, median (quartiles), on one thread of {machine_name(report["machine"])}, '
        f'torch {torch.__version__}, Triton {triton.__version__}',
        ['operation', 'launches', 'target', *columns],
        [
            [row['operation'], row['launches'], f'{1e6 * row["target"]:.0f}', *(
                f'{1e6 * s["median"]:.1f} ({1e6 * s["q1"]:.1f}-{1e6 * s["q3"]:.1f})' for s in row['seconds'].values())]
            for row in rows
        ],
    )
    if args.output:
        write_results(args.output, dict(report, rows=rows))
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
