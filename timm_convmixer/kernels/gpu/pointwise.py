"""The pointwise convolution: by itself for training, and as the second half of a block in inference.

Patches Are All You Need? (https://arxiv.org/abs/2201.09792), section 2: ``BN(act(pointwise(y)))``, with the BatchNorm
folded to a scale and a shift.

In NCHW a 1x1 convolution is a matrix product as it stands, ``weight (C_out, C_in) @ x[n] (C_in, H * W)``, whose result
is already in the layout of the next layer. The positions of all images form the second dimension of one product.

There are two kernels. ``pointwise_kernel`` takes any shape, a program for each tile. From compute capability 9.0 on,
large products in half precision go to ``persistent_pointwise_kernel``: its programs take tile after tile, so that the
Tensor Memory Accelerator (TMA) fetches the next tile's operands while this one's epilogue runs.

None of these functions is differentiable.
"""
import functools
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..activation import activate as activate_ref
from ..convolution import convolution_gradients_ref
from .common import activate, matmul
from .launch import MAX_PROBLEMS, DeviceLimits, Launch, device_limits, input_precision, round_up

__all__ = [
    'pointwise_convolution',
    'pointwise_convolution_ref',
    'pointwise_input_gradient',
    'pointwise_mixing',
    'pointwise_mixing_ref',
]


@triton.jit
def _epilogue(acc, channel, out_channels, bias_ptr, scale_ptr, shift_ptr, ACT: tl.constexpr, HALF: tl.constexpr):
    """Bias, activation, scale and shift, as far as they are there."""
    inside = channel < out_channels
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
    out = activate(acc, ACT, HALF)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
        shift = tl.load(shift_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
        out = out * scale + shift
    return out


@triton.jit
def pointwise_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        out_ptr,
        batch,
        out_channels,
        x_batch_stride,
        out_batch_stride,
        IN_CHANNELS: tl.constexpr,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
):
    """One program: ``BLOCK_M`` output channels at ``BLOCK_N`` positions.

    x is (batch, IN_CHANNELS, POSITIONS) and out (batch, out_channels, POSITIONS), contiguous but for the stride between
    images. The bias may be None, and so may scale and shift. ``PRECISION`` is 'ieee' or 'tf32'.
    """
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32

    program = tl.program_id(0)
    # Programs that share a tile of x run side by side: x comes from memory once, the (small) weight stays in the L2
    # cache.
    blocks_m = tl.cdiv(out_channels, BLOCK_M)
    channel = (program % blocks_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (program // blocks_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel_inside = channel < out_channels
    column_inside = column < batch * POSITIONS
    image = (column // POSITIONS).to(tl.int64)
    position = column % POSITIONS
    k = tl.arange(0, BLOCK_K)

    weight_ptrs = weight_ptr + channel.to(tl.int64)[:, None] * IN_CHANNELS + k[None, :]
    x_ptrs = x_ptr + (image * x_batch_stride + position)[None, :] + k.to(tl.int64)[:, None] * POSITIONS
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(IN_CHANNELS, BLOCK_K)):
        weight_mask = channel_inside[:, None]
        x_mask = column_inside[None, :]
        if IN_CHANNELS % BLOCK_K != 0:
            # Both, because 0 * inf is NaN.
            weight_mask = weight_mask & (k[None, :] < IN_CHANNELS - step * BLOCK_K)
            x_mask = x_mask & (k[:, None] < IN_CHANNELS - step * BLOCK_K)
        weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        x = tl.load(x_ptrs, mask=x_mask, other=0.0)
        acc = matmul(weight, x, acc, PRECISION)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * POSITIONS

    out = _epilogue(acc, channel, out_channels, bias_ptr, scale_ptr, shift_ptr, ACT, HALF)
    out_ptrs = out_ptr + (image * out_batch_stride + position)[None, :] + channel.to(tl.int64)[:, None] * POSITIONS
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=channel_inside[:, None] & column_inside[None, :])


@triton.jit
def persistent_pointwise_kernel(
        x_desc,
        weight_desc,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        out_desc,
        batch,
        out_channels,
        IN_CHANNELS: tl.constexpr,
        POSITIONS: tl.constexpr,
        ACT: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PROGRAMS: tl.constexpr,
):
    """One of ``PROGRAMS`` programs: every ``PROGRAMS``-th tile of ``BLOCK_M`` output channels at ``BLOCK_N`` positions.

    x, weight and out as in ``pointwise_kernel``, as descriptors of blocks (1, BLOCK_K, BLOCK_N), (BLOCK_M, BLOCK_K) and
    (1, BLOCK_M, BLOCK_N / 2). Beyond their edges loads give zeros and nothing is stored. ``POSITIONS`` is a multiple of
    8, and so is ``IN_CHANNELS``.
    """
    BLOCKS_N: tl.constexpr = (POSITIONS + BLOCK_N - 1) // BLOCK_N
    # In the order of pointwise_kernel.
    blocks_m = tl.cdiv(out_channels, BLOCK_M)
    tiles = blocks_m * batch * BLOCKS_N
    # Flattened, the loops over tiles and input channels are pipelined as one.
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        first = (tile % blocks_m) * BLOCK_M
        column = tile // blocks_m
        image = column // BLOCKS_N
        position = (column % BLOCKS_N) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, IN_CHANNELS, BLOCK_K):
            weight = weight_desc.load([first, k])
            x = tl.reshape(x_desc.load([image, k, position]), (BLOCK_K, BLOCK_N))
            acc = matmul(weight, x, acc, 'tf32')
        channel = first + tl.arange(0, BLOCK_M)
        # In halves: a whole tile on its way to memory would take shared memory that another stage needs.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        left = _epilogue(left, channel, out_channels, bias_ptr, scale_ptr, shift_ptr, ACT, True)
        left = tl.reshape(left.to(out_desc.dtype), (1, BLOCK_M, BLOCK_N // 2))
        out_desc.store([image, first, position], left)
        right = _epilogue(right, channel, out_channels, bias_ptr, scale_ptr, shift_ptr, ACT, True)
        right = tl.reshape(right.to(out_desc.dtype), (1, BLOCK_M, BLOCK_N // 2))
        out_desc.store([image, first, position + BLOCK_N // 2], right)


class PointwiseConfig(NamedTuple):
    """How the kernel is launched.

    Attributes:
        block_m: Output channels of a tile.
        block_n: Positions of a tile.
        block_k: Input channels of a step.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        persistent: Whether a program takes one tile after the other, fetched by TMA.
    """
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False

    def elements(self) -> int:
        """Elements in shared memory: the operands of all stages, and half a tile on its way to memory."""
        operands = self.num_stages * self.block_k * (self.block_m + self.block_n)
        return operands + (self.block_m * self.block_n // 2 if self.persistent else 0)


# From large tiles, which read each operand least often, to small ones, of which there are enough for a single image.
PERSISTENT = PointwiseConfig(128, 256, 64, 8, 4, persistent=True)
CONFIGS_16_BIT = (
    PointwiseConfig(128, 256, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(128, 128, 64, 4, 3),
    PointwiseConfig(64, 128, 64, 4, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
# Where rows of x are not aligned to 16 bytes (7 x 7 or 14 x 14 maps), addresses take registers that large tiles have
# not left.
CONFIGS_UNALIGNED = (
    PointwiseConfig(128, 128, 64, 8, 3),
    PointwiseConfig(64, 64, 64, 4, 4),
    PointwiseConfig(64, 32, 64, 4, 4),
)
CONFIGS_32_BIT = (
    PointwiseConfig(128, 128, 32, 8, 3),
    PointwiseConfig(64, 128, 32, 4, 3),
    PointwiseConfig(64, 64, 32, 4, 3),
    PointwiseConfig(64, 32, 32, 4, 3),
)
# No tensor cores: the products are ordinary multiply-adds.
CONFIGS_IEEE = (
    PointwiseConfig(64, 128, 16, 8, 3),
    PointwiseConfig(64, 64, 16, 4, 3),
    PointwiseConfig(32, 32, 16, 4, 3),
)


def candidates(
        shape: Tuple[int, ...],
        out_channels: int,
        dtype: torch.dtype,
        precision: str,
        limits: DeviceLimits,
        is_aligned: bool = True,
) -> List[PointwiseConfig]:
    """The configurations worth trying for maps of (B, C, H, W), first the one that is launched.

    That is the largest tile of which there is one for every processor. A batch counts as the next power of two, so that
    not every size of it is compiled for.
    """
    batch, positions = round_up(shape[0]), shape[2] * shape[3]
    configs: Sequence[PointwiseConfig]
    persistent = []
    # Tiles of the persistent kernel end with the image, so that some of their positions may be empty.
    covered = -(-positions // PERSISTENT.block_n) * PERSISTENT.block_n
    if (
        limits.has_async_products and is_aligned and dtype != torch.float32 and positions % 8 == 0 and shape[1] % 8 == 0
        and covered <= 1.1 * positions and PERSISTENT.elements() * dtype.itemsize <= limits.shared_memory
        and -(-out_channels // PERSISTENT.block_m) * batch * covered // PERSISTENT.block_n >= limits.processors
    ):
        persistent = [PERSISTENT]
    if dtype != torch.float32:
        configs = CONFIGS_16_BIT if positions % 8 == 0 else CONFIGS_UNALIGNED
    else:
        configs = CONFIGS_IEEE if precision == 'ieee' else CONFIGS_32_BIT
    fitting = [config for config in configs if config.elements() * dtype.itemsize <= limits.shared_memory]
    tiles = [-(-out_channels // config.block_m) * -(-batch * positions // config.block_n) for config in fitting]
    first = next((i for i, count in enumerate(tiles) if count >= limits.processors), len(tiles) - 1)
    return persistent + fitting[first:first + 3] + fitting[max(0, first - 1):first]


class PersistentLaunch:
    """The launch of the persistent kernel, which makes the descriptors of its tensors at every call."""

    def __init__(self, launch: Launch, config: PointwiseConfig, x_batch_stride: int, out_batch_stride: int):
        self.launch = launch
        self.x_batch_stride = x_batch_stride
        self.out_batch_stride = out_batch_stride
        # Of the descriptors by parameter.
        self.blocks = {
            'x_desc': [1, config.block_k, config.block_n],
            'weight_desc': [config.block_m, config.block_k],
            'out_desc': [1, config.block_m, config.block_n // 2],
        }

    def __call__(
            self,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: Optional[torch.Tensor],
            scale: Optional[torch.Tensor],
            shift: Optional[torch.Tensor],
            out: torch.Tensor,
    ) -> None:
        batch, in_channels, height, width = x.shape
        out_channels, positions = weight.shape[0], height * width
        self.launch(
            TensorDescriptor(
                x, [batch, in_channels, positions], [self.x_batch_stride, positions, 1], self.blocks['x_desc']),
            TensorDescriptor(weight, [out_channels, in_channels], [in_channels, 1], self.blocks['weight_desc']),
            bias,
            scale,
            shift,
            TensorDescriptor(
                out, [batch, out_channels, positions], [self.out_batch_stride, positions, 1], self.blocks['out_desc']),
        )


def make_launch(
        device: torch.device,
        shape: Tuple[int, ...],
        out_channels: int,
        config: PointwiseConfig,
        act: str,
        precision: str,
        x_batch_stride: Optional[int] = None,
        out_batch_stride: Optional[int] = None,
) -> Union[Launch, PersistentLaunch]:
    """The launch for maps of ``shape`` in one configuration.

    It takes x, weight, bias, scale, shift and out. The strides are those of contiguous maps by default.
    """
    batch, in_channels, height, width = shape
    positions = height * width
    strides = x_batch_stride or in_channels * positions, out_batch_stride or out_channels * positions
    constants = dict(
        IN_CHANNELS=in_channels,
        POSITIONS=positions,
        ACT=act,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    blocks_m = -(-out_channels // config.block_m)
    if config.persistent:
        tiles = blocks_m * batch * -(-positions // config.block_n)
        programs = min(device_limits(device).processors, tiles)
        constants.update(PROGRAMS=programs)
        launch = Launch(
            persistent_pointwise_kernel, device, programs, (batch, out_channels), constants, config.num_warps,
            config.num_stages)
        return PersistentLaunch(launch, config, *strides)
    constants.update(PRECISION=precision)
    tiles = blocks_m * -(-batch * positions // config.block_n)
    return Launch(
        pointwise_kernel, device, tiles, (batch, out_channels, *strides), constants, config.num_warps,
        config.num_stages)


@functools.lru_cache(maxsize=MAX_PROBLEMS)
def _launch(
        device: torch.device,
        shape: Tuple[int, ...],
        out_channels: int,
        dtype: torch.dtype,
        precision: str,
        act: str,
        is_aligned: bool,
        arguments: Tuple[Optional[torch.dtype], ...],
) -> Union[Launch, PersistentLaunch]:
    """The launch for a problem; ``arguments`` are the dtypes of the other tensors, None where one is absent."""
    config = candidates(shape, out_channels, dtype, precision, device_limits(device), is_aligned)[0]
    return make_launch(device, shape, out_channels, config, act, precision)


def _run(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: Optional[torch.Tensor],
        shift: Optional[torch.Tensor],
        act: str,
) -> torch.Tensor:
    shape, dtype, out_channels = x.shape, x.dtype, weight.shape[0]
    out = x.new_empty((shape[0], out_channels, shape[2], shape[3]))
    # Descriptors need addresses that PyTorch's allocations have; a view may begin elsewhere.
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == 0
    launch = _launch(
        x.device, shape, out_channels, dtype, input_precision(dtype), act, is_aligned,
        tuple(None if t is None else t.dtype for t in (bias, scale, shift)))
    launch(x, weight, bias, scale, shift, out)
    return out


def pointwise_convolution_ref(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """:func:`pointwise_convolution` in plain PyTorch."""
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype))


def epilogue_ref(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, act: str) -> torch.Tensor:
    """Activation, scale and shift of a convolution's output, in plain PyTorch."""
    y = activate_ref(y, act)
    return torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1)).to(y.dtype)


def pointwise_mixing_ref(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """:func:`pointwise_mixing` in plain PyTorch."""
    return epilogue_ref(pointwise_convolution_ref(x, weight, bias), scale, shift, act)


def pointwise_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        scale: torch.Tensor,
        shift: torch.Tensor,
        act: str = 'gelu',
) -> torch.Tensor:
    """``scale * act(conv1x1(x, weight) + bias) + shift``: the second half of a block in inference.

    Not differentiable. Nothing is checked: ask :func:`~.support.kernel_refusal` first. Products are accumulated, and
    the result is finished, in float32; products of float32 are TF32 or IEEE as ``torch.backends.cudnn`` says for
    convolutions.

    Args:
        x: Input, (B, C_in, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        weight: (C_out, C_in, 1, 1), contiguous, of the dtype of ``x``.
        bias: (C_out,) or None, contiguous, of the dtype of ``x`` or float32, as are ``scale`` and ``shift``.
        scale: (C_out,), ``weight / sqrt(running_var + eps)`` of the BatchNorm that follows the activation.
        shift: (C_out,), ``bias - running_mean * scale`` of that BatchNorm.
        act: ``'gelu'`` (with the error function), ``'relu'`` or ``'none'``.

    Returns:
        (B, C_out, H, W), contiguous, of the dtype of ``x``.
    """
    return _run(x, weight, bias, scale, shift, act)


def pointwise_convolution(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """``F.conv2d(x, weight, bias)``, for training.

    Not differentiable by itself. Nothing is checked: ask :func:`~.support.kernel_refusal` first. Arithmetic as in
    :func:`pointwise_mixing`. In float32 it is PyTorch's operator, which was not measured slower.

    Args:
        x: Input, (B, C_in, H, W), contiguous, on a CUDA device; float32, float16 or bfloat16.
        weight: (C_out, C_in, 1, 1), contiguous, of the dtype of ``x``.
        bias: (C_out,) or None, contiguous, of the dtype of ``x`` or float32.

    Returns:
        (B, C_out, H, W), contiguous, of the dtype of ``x``.
    """
    if x.dtype == torch.float32:
        # PyTorch may answer in channels last: a 1x1 weight in that format counts as contiguous as well.
        return pointwise_convolution_ref(x, weight, bias).contiguous()
    return _run(x, weight, bias, None, None, 'none')


def pointwise_input_gradient(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of :func:`pointwise_convolution` with respect to its input, by PyTorch's operators.

    Measured: as one product a batch, cuBLAS reaches its full rate on the maps as they stand.

    Args:
        grad: Gradient of the output, (B, C_out, H, W), contiguous.
        weight: (C_out, C_in, 1, 1), of the dtype of ``grad``.

    Returns:
        (B, C_in, H, W), contiguous, of the dtype of ``grad``.
    """
    batch, _, height, width = grad.shape
    if grad.dtype == torch.float32:
        # Products would be as precise as another switch of PyTorch's says than that for convolutions.
        x = grad.new_empty((batch, weight.shape[1], height, width))
        out, _, _ = convolution_gradients_ref(grad, x, weight, (True, False, False))
        return out.contiguous()
    matrix = weight.flatten(1).t().expand(batch, -1, -1)
    return torch.bmm(matrix, grad.flatten(2)).view(batch, -1, height, width)
