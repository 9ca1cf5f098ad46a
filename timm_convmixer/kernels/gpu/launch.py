"""How the kernels are launched: what a device allows, and a launch that costs the CPU a few microseconds.

Triton's ``kernel[grid](...)`` looks at every argument of every call to find the machine code for it: which integers are
1 or multiples of 16, which addresses are aligned, which constants and options are given. For the two dozen arguments of
these kernels that takes longer than a small kernel runs. But one problem (device, dtype, shape) gives the same machine
code each time. So an operation makes a :class:`Launch` once a problem and keeps it. It compiles with
``kernel.warmup(...)`` and launches with ``compiled[grid](...)``, as in Triton's own tutorial on the fused softmax.
"""
import functools
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .support import is_interpreted

# Launches that an operation caches: bounded, because dynamic shapes bring ever new ones.
MAX_PROBLEMS = 1024
INTERPRETED = is_interpreted()
# What a kernel is called with: tensors, descriptors of tensors, and numbers that change from call to call.
Argument = Union[torch.Tensor, TensorDescriptor, float, None]


class DeviceLimits(NamedTuple):
    """What a device allows.

    Attributes:
        processors: Multiprocessors.
        shared_memory: Bytes of shared memory that one program may have.
        has_async_products: Whether matrix products read both operands from shared memory (wgmma, tcgen05), and the
            Tensor Memory Accelerator (TMA) fills it: compute capabilities 9.x and 10.x. Elsewhere operands take
            registers, and tiles are smaller.
    """
    processors: int
    shared_memory: int
    has_async_products: bool = False


H100 = DeviceLimits(132, 232448, has_async_products=True)


@functools.cache
def device_limits(device: torch.device) -> DeviceLimits:
    """The limits of ``device``; those of an H100 where kernels are interpreted."""
    if device.type != 'cuda':
        return H100
    properties = torch.cuda.get_device_properties(device)
    return DeviceLimits(
        properties.multi_processor_count,
        getattr(properties, 'shared_memory_per_block_optin', 101376),
        properties.major in (9, 10),
    )


def input_precision(dtype: torch.dtype) -> str:
    """``'tf32'`` or ``'ieee'``: PyTorch's switch for float32 convolutions on CUDA, since the kernels replace those.

    That is ``torch.backends.cudnn.conv.fp32_precision``, and ``torch.backends.cudnn.allow_tf32`` where PyTorch does not
    have it yet. Products of other dtypes are what they are, and always ``'tf32'``.
    """
    if dtype != torch.float32:
        return 'tf32'
    conv = getattr(torch.backends.cudnn, 'conv', None)
    if conv is not None:
        return 'tf32' if conv.fp32_precision == 'tf32' else 'ieee'
    return 'tf32' if torch.backends.cudnn.allow_tf32 else 'ieee'


def round_up(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()


class Launch:
    """A kernel for one problem on one device, called with what its first parameters take, tensors above all.

    Every call must pass tensors on the device, of the same dtypes, with None in the same places.
    """

    def __init__(
            self,
            kernel: Any,
            device: torch.device,
            programs: int,
            integers: Sequence[int],
            constants: Dict[str, Any],
            num_warps: int,
            num_stages: int = 3,
            max_registers: Optional[int] = None,
    ):
        """
        Args:
            kernel: Triton kernel whose parameters are those of a call, then integers, then constants.
            device: Device of the tensors.
            programs: Size of the grid, which has one dimension.
            integers: Values of the integers.
            constants: Values of the constants (``tl.constexpr``) by name.
            num_warps: Warps of a program.
            num_stages: Loads in flight in a pipelined loop; 3 is Triton's own default.
            max_registers: Registers of a thread at most, None for as many as the compiler likes.
        """
        self.kernel = kernel
        self.device = device
        self.grid = (programs, 1, 1)
        self.constants = constants
        self.values = (*integers, *[constants[name] for name in kernel.arg_names[-len(constants):]])
        # Fusing multiplications and additions is Triton's default, but some versions warn where that is not said.
        self.options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)
        if max_registers is not None:
            self.options['maxnreg'] = max_registers
        self._run: Any = None

    def __call__(self, *tensors: Argument) -> None:
        if self.device.type != 'cuda' or torch.cuda.current_device() == self.device.index:
            self._launch(tensors)
        else:
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device(self.device):
                self._launch(tensors)

    def _launch(self, tensors: Tuple[Argument, ...]) -> None:
        addresses = 0
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                addresses |= tensor.data_ptr()
            elif isinstance(tensor, TensorDescriptor):
                addresses |= tensor.base.data_ptr()
        # The machine code that is kept takes all addresses for multiples of 16, as PyTorch's own allocations are. A
        # view may begin elsewhere.
        if addresses % 16 or INTERPRETED:
            self.kernel[self.grid](*tensors, *self.values, **self.options)
            return
        if self._run is None:
            compiled = self.kernel.warmup(*tensors, *self.values, grid=self.grid, **self.options)
            self._run = compiled[self.grid]
        self._run(*tensors, *self.values)
