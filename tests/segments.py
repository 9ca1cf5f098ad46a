"""Arguments of a training segment, and comparisons for its CPU and GPU tests."""
import torch

from timm_convmixer.kernels.normalization import BatchNormalization

__all__ = ['CHANNELS', 'assert_all_close', 'buffers', 'converted', 'leaves', 'operands', 'run']

CHANNELS = 6


def operands(kernel_size=5, act='gelu', batch_statistics=True, affine=True, size=(3, CHANNELS, 9, 7), seed=0, **kwargs):
    """Return arguments of a segment."""
    generator = torch.Generator().manual_seed(seed)
    channels = size[1]

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def norm():
        weight, bias = (random(channels), random(channels)) if affine else (None, None)
        running = random(channels).detach(), random(channels).detach().exp()
        return BatchNormalization(act, weight, bias, *running, batch_statistics, momentum=0.1, eps=1e-3)

    args = dict(
        z=random(*size),
        norm=norm(),
        depthwise_weight=random(channels, 1, kernel_size, kernel_size),
        depthwise_bias=random(channels),
        spatial_norm=norm(),
        drop_path_scale=None,
        pointwise_weight=random(channels, channels, 1, 1),
        pointwise_bias=random(channels),
    )
    return {**args, **kwargs}


def leaves(args):
    tensors = [value for value in args.values() if isinstance(value, torch.Tensor)]
    tensors += [tensor for value in args.values() if isinstance(value, BatchNormalization) for tensor in value[1:3]]
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def buffers(args):
    return [tensor for norm in (args['norm'], args['spatial_norm']) if norm is not None for tensor in norm[3:5]]


def converted(args, dtype=None, memory_format=torch.preserve_format):
    """Copy the arguments, with maps and weights in ``dtype`` and normalisations in float32 or wider."""
    def convert(value, dtype):
        if isinstance(value, BatchNormalization):
            wide = torch.promote_types(dtype, torch.float32)
            return BatchNormalization(*[convert(item, wide) for item in value])
        if not isinstance(value, torch.Tensor):
            return value
        memory = memory_format if value.dim() == 4 else torch.preserve_format
        return value.detach().to(dtype, copy=True, memory_format=memory).requires_grad_(value.requires_grad)

    return {key: convert(value, dtype or torch.float64) for key, value in args.items()}


def run(function, args, **kwargs):
    """Return output, gradients and running statistics."""
    out = function(**args, **kwargs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves(args), grad), *buffers(args)]


def assert_all_close(actual, expected, tolerance):
    """Compare gradients on a common scale: that of a bias before a BatchNorm is only rounding error."""
    scale = max(tensor.abs().max() for tensor in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= tolerance * scale
