"""The inference forms of stem and block: every BatchNorm folded into a scale and a shift.

``reparameterize_model()`` of timm makes them, by the ``fuse()`` of stem and block.
"""
from copy import deepcopy
from typing import Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .kernels.support import opmath_dtype

__all__ = ['FusedConvMixerBlock', 'FusedStem', 'affine', 'fold_norms', 'scaled_residual']


@torch.no_grad()
def fold_norms(
        norms: Sequence[nn.Module],
        dtype: torch.dtype = torch.float64,
) -> Tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """The running statistics and affines of BatchNorms as scales and shifts, ``(C,)`` each, computed in float64."""
    # All norms in one tensor: a ConvMixer has dozens, and each operation costs more than its arithmetic.
    def concatenate(name: str, default: float) -> torch.Tensor:
        values = (getattr(norm, name) for norm in norms)
        return _to_float64(torch.cat([
            torch.full_like(norm.running_var, default) if value is None else value for norm, value in zip(norms, values)
        ]))

    widths = [len(norm.running_var) for norm in norms]
    variance = concatenate('running_var', 1.)
    if len({norm.eps for norm in norms}) == 1:
        variance += norms[0].eps
    else:
        variance += torch.cat([variance.new_full((width,), norm.eps) for width, norm in zip(widths, norms)])
    scale = concatenate('weight', 1.) * variance.rsqrt()
    shift = concatenate('bias', 0.) - concatenate('running_mean', 0.) * scale
    return scale.to(dtype).split(widths), shift.to(dtype).split(widths)


def _to_float64(tensor: torch.Tensor) -> torch.Tensor:
    # MPS has no float64.
    return (tensor.cpu() if tensor.device.type == 'mps' else tensor).double()


def _constant(value: torch.Tensor, weight: torch.Tensor, dtype: Optional[torch.dtype] = None) -> nn.Parameter:
    """A frozen parameter on the device of a weight, by default in the dtype of the arithmetic."""
    value = value.detach().to(weight.device, dtype or opmath_dtype(weight.dtype), copy=True)
    return nn.Parameter(value, requires_grad=False)


@torch.jit.unused
def _is_exporting() -> bool:
    # A trace is what Core ML and OpenVINO take a model by. torch.compiler.is_exporting() came with PyTorch 2.7.
    return (
        torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
        or getattr(torch.compiler, 'is_exporting', lambda: False)())


def _can_use_addcmul(x: torch.Tensor, scale: torch.Tensor) -> bool:
    if torch.jit.is_scripting():
        return x.dtype == scale.dtype
    return x.dtype == scale.dtype and not _is_exporting()


# affine and scaled_residual ask for the dtype, which a symbolic trace does not know: torch.fx records the call instead.
@torch.fx.wrap
def affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        zeros: torch.Tensor,
) -> torch.Tensor:
    """``scale * x + shift`` for ``x`` of ``(B, C, H, W)`` and per-channel ``scale`` and ``shift`` of ``(C,)``.

    The result has the dtype of ``x``. Exported, it is a batch normalisation: ONNX Runtime keeps its blocked layout
    through one, and breaks it up around a multiplication and an addition of constants. ``zeros`` of ``(C,)`` are its
    statistics: stored ones are constants of the exported graph, which runtimes ask for.
    """
    if _can_use_addcmul(x, scale):
        return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))
    # (x - 0) / sqrt(0 + 1): with a variance of 0 and an epsilon of 1 the statistics leave x exactly as it is.
    return F.batch_norm(x, zeros, zeros, scale, shift, eps=1.)


@torch.fx.wrap
def scaled_residual(
        x: torch.Tensor,
        branch: torch.Tensor,
        scale: torch.Tensor,
        zeros: torch.Tensor,
) -> torch.Tensor:
    """``x + scale * branch`` for maps of ``(B, C, H, W)`` and a per-channel ``scale`` of ``(C,)``.

    ``zeros`` as for :func:`affine`.
    """
    if _can_use_addcmul(x, scale):
        return torch.addcmul(x, branch, scale.view(-1, 1, 1))
    return x + affine(branch, scale, zeros, zeros)


class _InferenceForm(nn.Module):
    """Base of the inference forms. They cannot train: their normalisations are folded into constants.

    Each scale has a non-persistent buffer of zeros beside it, which exports use as running statistics.
    """

    def _register_zeros(self, name: str, scale: torch.Tensor) -> None:
        self.register_buffer(name, torch.zeros_like(scale), persistent=False)

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise RuntimeError(
                f'{type(self).__name__} is an inference form and cannot train; train the model it was made from, '
                'before reparameterize_model().')
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # No state dict holds the zeros: after to_empty() they may be anything, after assign=True on another device.
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Set the zeros anew; ``timm.models.reinit_non_persistent_buffers()`` calls it."""
        for name in self._buffers.keys() & {'spatial_zeros', 'zeros'}:
            self._register_zeros(name, getattr(self, name.replace('zeros', 'scale')))


class FusedStem(_InferenceForm):
    """Inference form of :class:`timm_convmixer.layers.ConvMixerStem`: ``scale * act(conv(image)) + shift``.

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
        self.act = deepcopy(act)
        self.scale = _constant(scale, conv.weight)
        self.shift = _constant(shift, conv.weight)
        self._register_zeros('zeros', self.scale)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return affine(self.act(self.conv(x)), self.scale, self.shift, self.zeros)


class FusedConvMixerBlock(_InferenceForm):
    """Inference form of :class:`timm_convmixer.layers.ConvMixerBlock`, shapes ``(B, C, H, W)`` throughout::

        x = x + spatial_scale * act(depthwise(x))
        x = scale * act(pointwise(x)) + shift

    The shift of the first normalisation is folded into the bias of the pointwise convolution: it is the same at every
    position, and nothing else reads that map. The second normalisation must stay: the residual reads its output, and
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
        totals = [step * (side - 1) for step, side in zip(depthwise.dilation, depthwise.weight.shape[2:])]
        if depthwise.padding == 'same' and all(total % 2 == 0 for total in totals):
            self.depthwise.padding = tuple(total // 2 for total in totals)
        self.spatial_act = deepcopy(spatial_act)
        self.spatial_scale = _constant(spatial_scale, depthwise.weight)
        self.pointwise = deepcopy(pointwise).requires_grad_(False)
        self.act = deepcopy(act)
        weight = _to_float64(pointwise.weight.detach()).flatten(1)
        bias = weight @ spatial_shift.to(weight)
        if pointwise.bias is not None:
            bias = bias + _to_float64(pointwise.bias.detach())
        self.pointwise.bias = _constant(bias, pointwise.weight, pointwise.weight.dtype)
        self.scale = _constant(scale, pointwise.weight)
        self.shift = _constant(shift, pointwise.weight)
        self._register_zeros('spatial_zeros', self.spatial_scale)
        self._register_zeros('zeros', self.scale)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.spatial_act(self.depthwise(x))
        x = scaled_residual(x, branch, self.spatial_scale, self.spatial_zeros)
        return affine(self.act(self.pointwise(x)), self.scale, self.shift, self.zeros)
