"""The building blocks of ConvMixer: one class for each of the two equations of a block.

Papers:
* `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792, section 2
"""
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Iterator, Optional, Sequence, Tuple, Type, Union, cast

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .kernels.block_segment import BatchNormalization, block_segment, block_segment_support
from .kernels.cpu.depthwise import depthwise_convolution_cpu, depthwise_convolution_cpu_support
from .kernels.cpu.workspace import Workspace
from .kernels.gpu.support import inference_refusal
from .kernels.support import use_fused

__all__ = [
    'ConvMixerBlock',
    'SpatialMixing',
    'checkpoint_exact',
    'forward_segment',
    'is_unmodified',
]


class SpatialMixing(nn.Module):
    """Mixes locations within each channel: ``x + drop_path(norm(act(depthwise(x))))``.

    The normalisation comes after the activation, as everywhere in ConvMixer. The depthwise convolution, the activation
    and the normalisation are ``fn[0]``, ``fn[1]`` and ``fn[2]``: the state-dict keys of timm's ConvMixer.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel; an even one pads one more on the right and the bottom.
            drop_path: Stochastic depth rate of this branch.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        # Importing timm registers the models, which imports this module: that must find it complete.
        from timm.layers import DropPath

        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.fn = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size, groups=dim, padding='same', **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @torch.jit.unused
    def _depthwise(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """The depthwise convolution with a faster backward pass, None where PyTorch's serves."""
        conv = self.fn[0]
        if not torch.is_grad_enabled() or not isinstance(x, torch.Tensor) or not is_plain_conv(conv):
            return None
        if depthwise_convolution_cpu_support(x, conv.weight, conv.bias):
            return None
        return depthwise_convolution_cpu(x, conv.weight, conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            branch = self._depthwise(x)
            if branch is not None:
                return x + self.drop_path(self.fn[2](self.fn[1](branch)))
        return x + self.drop_path(self.fn(x))


class _NamedSequential(nn.Sequential):
    """A ``Sequential`` with a constructor of its own, whose slices are therefore plain ones."""

    def __getitem__(self, index: Union[int, slice]) -> nn.Module:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self.named_children())[index]))
        return super().__getitem__(index)


class ConvMixerStem(_NamedSequential):
    """Patch embedding ``norm(act(conv(image)))``: ``(B, in_chans, H, W)`` to ``(B, C, H // patch, W // patch)``."""

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int = 7,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Number of input image channels.
            dim: Number of output channels.
            patch_size: Side and stride of the convolution, in pixels.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def fuse(self) -> nn.Module:
        """The inference form of the stem, or the stem itself if it cannot be fused: see :class:`FusedStem`."""
        conv, act, norm = self
        if not (is_plain_conv(conv) and _is_batch_norm(norm)):
            return self
        (scale,), (shift,) = norms_to_affine([norm])
        return FusedStem(conv, act, scale, shift)


class ConvMixerBlock(_NamedSequential):
    """One block: ``x = spatial_mixing(x)``, then ``norm(act(pointwise(x)))``, shapes ``(B, C, H, W)`` throughout.

    The second equation mixes the channels of each location and has no residual. A ``Sequential``, so that its children
    keep the state-dict keys of timm's ConvMixer: ``0`` is the :class:`SpatialMixing`, ``1`` the pointwise convolution,
    ``2`` the activation, ``3`` the normalisation.
    """

    def __init__(
            self,
            dim: int,
            kernel_size: int = 9,
            drop_path: float = 0.,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        """
        Args:
            dim: Number of channels.
            kernel_size: Side of the depthwise kernel.
            drop_path: Stochastic depth rate of the spatial mixing.
            act_layer: Activation layer class.
            norm_layer: Normalisation layer class for ``(B, C, H, W)``.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(
            SpatialMixing(dim, kernel_size, drop_path, act_layer, norm_layer, **dd),
            nn.Conv2d(dim, dim, kernel_size=1, **dd),
            act_layer(),
            norm_layer(dim, **dd),
        )

    def fuse(self) -> nn.Module:
        """The inference form of the block, or the block itself if it cannot be fused.

        See :class:`FusedConvMixerBlock`.
        """
        (depthwise, spatial_act, spatial_norm), (_, pointwise, act, norm) = self[0].fn, self
        if not (all(map(is_plain_conv, (depthwise, pointwise))) and all(map(_is_batch_norm, (spatial_norm, norm)))):
            return self
        (spatial_scale,), (spatial_shift,) = norms_to_affine([spatial_norm])
        (scale,), (shift,) = norms_to_affine([norm])
        return FusedConvMixerBlock(
            depthwise,
            spatial_act,
            spatial_scale,
            spatial_shift,
            pointwise,
            act,
            scale,
            shift,
        )


def is_unmodified(module: nn.Module, *types: Type[nn.Module]) -> bool:
    """Whether a module is of one of these very types, and calling it does what its class says and nothing else.

    A subclass or a parametrised module computes what its weights do not tell; a hook, or a ``forward`` of the
    instance's own, must be called.
    """
    return type(module) in types and 'forward' not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_plain_conv(module: nn.Module) -> bool:
    return is_unmodified(module, nn.Conv2d)


def _is_batch_norm(module: nn.Module) -> bool:
    from torchvision.ops import FrozenBatchNorm2d

    return isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)) and module.running_var is not None


@torch.no_grad()
def norms_to_affine(norms: Sequence[nn.Module]) -> Tuple[torch.Tensor, torch.Tensor]:
    """The running statistics and affines of BatchNorms as scales and shifts, ``(len(norms), C)`` each, in float64."""
    def stack(name: str, default: float = 0.) -> torch.Tensor:
        values = (getattr(norm, name) for norm in norms)
        return torch.stack([
            torch.full_like(norm.running_var, default) if value is None else value for norm, value in zip(norms, values)
        ]).double()

    variance = stack('running_var')
    eps = torch.tensor([[norm.eps] for norm in norms], dtype=torch.float64, device=variance.device)
    scale = stack('weight', default=1.) * (variance + eps).rsqrt()
    return scale, stack('bias') - stack('running_mean') * scale


def _constant(value: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.detach().to(dtype, copy=True), requires_grad=False)


def affine_dtype(weight: torch.Tensor) -> torch.dtype:
    # A scale rounded to half precision is off by the same factor everywhere in its channel, which pooling does not
    # average out; BatchNorm itself computes it in float32.
    return torch.promote_types(weight.dtype, torch.float32)


@torch.jit.unused
def _is_exporting() -> bool:
    # torch.compiler.is_exporting() came with PyTorch 2.7.
    return torch.onnx.is_in_onnx_export() or getattr(torch.compiler, 'is_exporting', lambda: False)()


def _in_one_pass(x: torch.Tensor, scale: torch.Tensor) -> bool:
    if torch.jit.is_scripting():
        return x.dtype == scale.dtype
    return x.dtype == scale.dtype and not _is_exporting()


# Both decide by the dtype, which a symbolic trace does not know: torch.fx records the call instead.
@torch.fx.wrap
def affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """``scale * x + shift`` for ``x`` of ``(B, C, H, W)`` and per-channel ``scale`` and ``shift`` of ``(C,)``.

    ``inplace`` may overwrite ``x``. The result has the dtype of ``x``. Exported, it is a batch normalisation: ONNX
    Runtime keeps its blocked layout through one, and breaks it up around a multiplication and an addition of constants.
    """
    if _in_one_pass(x, scale):
        if inplace:
            return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1), out=x)
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))
    return F.batch_norm(x, torch.zeros_like(shift), torch.ones_like(scale), scale, shift, eps=0.)


@torch.fx.wrap
def scaled_residual(
        x: torch.Tensor,
        branch: torch.Tensor,
        scale: torch.Tensor,
        inplace: bool = False,
) -> torch.Tensor:
    """``x + scale * branch`` for maps of ``(B, C, H, W)`` and a per-channel ``scale`` of ``(C,)``.

    ``inplace`` may overwrite ``branch``.
    """
    if _in_one_pass(x, scale):
        if inplace:
            return torch.addcmul(x, branch, scale.view(-1, 1, 1), out=branch)
        return torch.addcmul(x, branch, scale.view(-1, 1, 1))
    return x + affine(branch, scale, torch.zeros_like(scale))


class _InferenceForm(nn.Module):
    """What has no training form: the statistics of its normalisations are folded into constants."""

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                f'{type(self).__name__} is an inference form and cannot train; train the model it was made from, '
                'before reparameterize_model().')
        return super().train(mode)


class FusedStem(_InferenceForm):
    """Inference form of :class:`ConvMixerStem`: ``scale * act(conv(image)) + shift``.

    State-dict keys: ``conv.weight``, ``conv.bias``, ``scale`` and ``shift``, the last two ``(C,)``.
    """

    def __init__(
            self,
            conv: nn.Conv2d,
            act: nn.Module,
            scale: torch.Tensor,
            shift: torch.Tensor,
    ):
        """
        Args:
            conv: Patch embedding.
            act: Activation.
            scale: Scale of the folded normalisation, ``(C,)``.
            shift: Shift of the folded normalisation, ``(C,)``.
        """
        super().__init__()
        self.conv = deepcopy(conv).requires_grad_(False)
        self.act = act
        self.scale = _constant(scale, affine_dtype(conv.weight))
        self.shift = _constant(shift, affine_dtype(conv.weight))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(self.act(self.conv(x)), self.scale, self.shift)


def kernel_act(act: nn.Module) -> Optional[str]:
    """The name by which the kernels know an activation, None if they do not."""
    from timm.layers import GELU

    if type(act) is nn.ReLU:
        return 'relu'
    if type(act) is GELU or (type(act) is nn.GELU and act.approximate == 'none'):
        return 'gelu'
    return None


class FusedConvMixerBlock(_InferenceForm):
    """Inference form of :class:`ConvMixerBlock`, shapes ``(B, C, H, W)`` throughout::

        x = x + spatial_scale * act(depthwise(x))
        x = scale * act(pointwise(x)) + shift

    The shift of the first normalisation is folded into the bias of the pointwise convolution: it is the same at every
    location, and nothing else reads that map. The second normalisation must stay: the residual reads its output, and
    the zeros that the next depthwise convolution pads with have not been shifted.

    State-dict keys: ``depthwise.weight``, ``depthwise.bias``, ``spatial_scale``, ``pointwise.weight``,
    ``pointwise.bias``, ``scale`` and ``shift``, the scales and the shift ``(C,)``.
    """

    def __init__(
            self,
            depthwise: nn.Conv2d,
            spatial_act: nn.Module,
            spatial_scale: torch.Tensor,
            spatial_shift: torch.Tensor,
            pointwise: nn.Conv2d,
            act: nn.Module,
            scale: torch.Tensor,
            shift: torch.Tensor,
    ):
        """
        Args:
            depthwise: Depthwise convolution.
            spatial_act: Activation after it.
            spatial_scale: Scale of the folded normalisation after the depthwise convolution, ``(C,)``.
            spatial_shift: Shift of the same.
            pointwise: Pointwise convolution.
            act: Activation after it.
            scale: Scale of the folded normalisation after the pointwise convolution, ``(C,)``.
            shift: Shift of the same.
        """
        super().__init__()
        self.depthwise = deepcopy(depthwise).requires_grad_(False)
        # An odd kernel's padding in numbers, because quantizers know no padding='same'. What an even kernel pads on one
        # side alone would take an operator of its own, around which ONNX Runtime breaks up its blocked layout.
        totals = [step * (side - 1) for step, side in zip(depthwise.dilation, depthwise.kernel_size)]
        if depthwise.padding == 'same' and all(total % 2 == 0 for total in totals):
            self.depthwise.padding = tuple(total // 2 for total in totals)
        self.spatial_act = spatial_act
        self.spatial_scale = _constant(spatial_scale, affine_dtype(depthwise.weight))
        self.pointwise = deepcopy(pointwise).requires_grad_(False)
        self.act = act
        weight = pointwise.weight.detach().double().flatten(1)
        bias = weight @ spatial_shift.to(weight)
        if pointwise.bias is not None:
            bias = bias + pointwise.bias.detach().double()
        self.pointwise.bias = _constant(bias, pointwise.weight.dtype)
        self.scale = _constant(scale, affine_dtype(pointwise.weight))
        self.shift = _constant(shift, affine_dtype(pointwise.weight))
        self.register_buffer('spatial_shift', torch.zeros_like(self.spatial_scale), persistent=False)
        self.kernel_acts = kernel_act(spatial_act), kernel_act(act)
        self.eval()

    @torch.jit.unused
    def _forward_kernels(self, x: torch.Tensor) -> torch.Tensor:
        from .kernels import depthwise_mixing, pointwise_mixing

        spatial_act, act = self.kernel_acts
        x = depthwise_mixing(
            x,
            self.depthwise.weight,
            self.depthwise.bias,
            self.spatial_scale,
            self.spatial_shift,
            spatial_act,
        )
        return pointwise_mixing(
            x,
            self.pointwise.weight,
            self.pointwise.bias,
            self.scale,
            self.shift,
            act,
        )

    @torch.jit.unused
    def _takes_kernels(self, x: torch.Tensor) -> bool:
        # What is exported must run where this package is not installed; a symbolic trace has no tensor to ask.
        return (
            isinstance(x, torch.Tensor) and x.is_cuda and None not in self.kernel_acts
            and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and use_fused() and x.is_contiguous()
            and not inference_refusal(x.device, x.dtype, x.shape, self.depthwise.kernel_size[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._takes_kernels(x):
                return self._forward_kernels(x)
        x = scaled_residual(x, self.spatial_act(self.depthwise(x)), self.spatial_scale)
        return affine(self.act(self.pointwise(x)), self.scale, self.shift)


@contextmanager
def _keep_buffers(*modules: nn.Module) -> Iterator[None]:
    """Undo what the forward pass within the context does to the modules' buffers, such as running statistics."""
    buffers = [buffer for module in modules for buffer in module.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def checkpoint_exact(x: torch.Tensor, *modules: Optional[nn.Module]) -> torch.Tensor:
    """Run modules one after the other, keeping ``x`` alone for the backward pass, which runs them again.

    Unlike plain checkpointing it trains exactly as without: running the modules again leaves their buffers as they are,
    so that BatchNorm updates its running statistics once a step. What the last module computes is not computed again,
    only its inputs: let that be the most expensive one.

    Args:
        x: Input of the first module.
        modules: Modules to run, None for none.
    """
    present = tuple(module for module in modules if module is not None)

    def run(y: torch.Tensor) -> torch.Tensor:
        for module in present:
            y = module(y)
        return y

    if torch.compiler.is_compiling():
        # The compiled step updates buffers once, after what it recomputes: nothing to undo, and no context to trace.
        return checkpoint(run, x, use_reentrant=False)
    return checkpoint(run, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _keep_buffers(*present)))


if torch.__version__ < '2.9':
    # There a compiled step updates the buffers of what it recomputes twice. The checkpointed layers stay uncompiled.
    checkpoint_exact = torch.compiler.disable(checkpoint_exact)


def _batch_normalization(act: nn.Module, norm: nn.Module) -> BatchNormalization:
    """An activation and the BatchNorm after it, about to be called: counts the batch, as calling the module would."""
    momentum = norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1. / norm.num_batches_tracked.item()
    return BatchNormalization(
        act=cast(str, kernel_act(act)),
        weight=norm.weight,
        bias=norm.bias,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        batch_statistics=norm.training or norm.running_mean is None,
        momentum=momentum or 0.,
        eps=norm.eps,
    )


def is_plain_act(act: nn.Module) -> bool:
    """Whether the kernels know an activation, and calling it does nothing else."""
    return kernel_act(act) is not None and is_unmodified(act, type(act))


def is_activation_and_batch_norm(act: nn.Module, norm: nn.Module) -> bool:
    return is_plain_act(act) and is_unmodified(norm, nn.BatchNorm2d)


def is_plain_block(block: nn.Module) -> bool:
    """Whether the layers of a block do what their classes say, but for its activations and normalisations."""
    from timm.layers import DropPath

    spatial = block[0]
    return (
        is_unmodified(spatial, SpatialMixing)
        and is_unmodified(spatial.fn, nn.Sequential)
        and is_unmodified(spatial.drop_path, DropPath, nn.Identity)
        and is_plain_conv(spatial.fn[0])
        and is_plain_conv(block[1])
    )


def _keeps_two_maps(x: torch.Tensor, pending: Optional[nn.Sequential], block: nn.Module) -> bool:
    return (
        not block_segment_support(x)
        and (pending is None or is_activation_and_batch_norm(*pending))
        and is_plain_block(block)
        and is_activation_and_batch_norm(*block[0].fn[1:])
    )


def forward_segment(
        x: torch.Tensor,
        pending: Optional[nn.Sequential],
        block: ConvMixerBlock,
        checkpointing: bool,
        workspace: Workspace,
) -> torch.Tensor:
    """From one pointwise convolution to the next: what is pending, then the block up to its own pointwise convolution.

    Keeps the outputs of the two convolutions for the backward pass; with ``checkpointing`` that of the pointwise
    convolution alone, and computes the depthwise one again. Where a block is not what its class says, or a map cannot
    be taken, autograd keeps what it needs, or :func:`checkpoint_exact` has it all computed again.

    Args:
        x: Output of the pointwise convolution before, or of the stem's, ``(B, C, H, W)``.
        pending: Activation and normalisation that ``x`` still needs, None if it has had them.
        block: Block whose activation and normalisation after the pointwise convolution are left pending.
        checkpointing: Whether to save memory at the cost of computing the depthwise convolution twice.
        workspace: Shared by the segments of one forward pass.
    """
    if not _keeps_two_maps(x, pending, block):
        if checkpointing:
            return checkpoint_exact(x, pending, block[0], block[1])
        return block[1](block[0](x if pending is None else pending(x)))
    spatial, pointwise = block[0], block[1]
    depthwise, act, norm = spatial.fn
    # Drawn by the layer itself: the same numbers as without segments.
    drop_path = spatial.drop_path
    dropping = drop_path.training and getattr(drop_path, 'drop_prob', 0.) > 0.
    return block_segment(
        x,
        None if pending is None else _batch_normalization(*pending),
        depthwise.weight,
        depthwise.bias,
        _batch_normalization(act, norm),
        drop_path(x.new_ones((x.shape[0], 1, 1, 1))) if dropping else None,
        pointwise.weight,
        pointwise.bias,
        keep_depthwise=not checkpointing,
        workspace=workspace,
    )
