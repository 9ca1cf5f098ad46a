"""What several test files need."""
import torch
import torch.nn as nn

__all__ = ['assert_close', 'kept_maps', 'lower_thresholds', 'randomize_norms']


def randomize_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every BatchNorm statistics and an affine that a trained model could have; initial ones hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.2, 2.0),
                    (module.weight, -1.5, 1.5),
                    (module.bias, -0.5, 0.5),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest expected value; NaN never passes."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def lower_thresholds(monkeypatch) -> None:
    """Have the smallest feature maps take the fast paths, for which only larger ones pay."""
    from timm_convmixer import routes

    monkeypatch.setattr(routes, 'SMALLEST_MAP', 0)
    monkeypatch.setattr(routes, 'SMALLEST_MAP_FUSED', 0)


def kept_maps(model: nn.Module, x: torch.Tensor) -> int:
    """Feature maps of the size of a block's that autograd keeps from a forward pass."""
    kept = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == len(x):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.requires_grad
    return sum(tensor.shape[1] == model.num_features for tensor in kept.values())
