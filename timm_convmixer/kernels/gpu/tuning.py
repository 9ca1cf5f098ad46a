"""Which configuration a kernel launches with.

Every operator lists a few candidates for a problem, the one that should serve best first, by rule and without looking
at a clock. That one is taken, unless `TIMM_CONVMIXER_AUTOTUNE=1` (or `set_autotune()`) asks for measurements: then the
candidates are timed once per device, dtype, shape and power of two of the batch size, in the process' first eager call
with real tensors outside of CUDA graph capture, and the fastest is kept. Off is the default because then nothing ever
pauses for it, and because results do not depend, in their last bits, on which candidate won that day.
"""
import logging
from functools import partial
from typing import Any, Callable, Dict, Hashable, Sequence, TypeVar

import torch

from ..support import read_switch
from .support import INTERPRETED, is_traced

__all__ = ['clear_autotune_cache', 'set_autotune', 'use_autotune']

_logger = logging.getLogger(__name__)
_AUTOTUNE = read_switch('TIMM_CONVMIXER_AUTOTUNE', default=False)
_CHOICES: Dict[Hashable, Any] = {}

Config = TypeVar('Config')


def use_autotune() -> bool:
    """Whether kernel configurations are timed on first use (`TIMM_CONVMIXER_AUTOTUNE` or `set_autotune()`)."""
    return _AUTOTUNE


def set_autotune(enable: bool = True) -> None:
    """Switch timing of kernel configurations on or off for this process, over `TIMM_CONVMIXER_AUTOTUNE`."""
    global _AUTOTUNE
    _AUTOTUNE = bool(enable)


def clear_autotune_cache() -> None:
    """Forget every measured choice."""
    _CHOICES.clear()


def batch_bucket(batch: int) -> int:
    """The smallest power of two that is at least `batch`: configurations are chosen per bucket."""
    # By comparison, so that a symbolic batch of torch.compile stays one: it is guarded to the bucket, not to the
    # number.
    bucket = 1
    while bucket < batch:
        bucket *= 2
    return bucket


def _milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench
    return do_bench(run, warmup=5, rep=20, return_mode='median')


def choose(
        key: Hashable,
        candidates: Sequence[Config],
        run: Callable[[Config], None],
        x: torch.Tensor,
        measure: Callable[[Callable[[], None]], float] = _milliseconds,
) -> Config:
    """The configuration for a problem.

    Args:
        key: What the choice depends on.
        candidates: Configurations, the default first.
        run: Launches the kernel on the real data with one of them.
        x: The input; nothing is timed if it is a stand-in for data.
        measure: Milliseconds that a call takes.

    Returns:
        The measured choice if there is one or one can be made now, else the default.
    """
    if not use_autotune() or len(candidates) == 1:
        return candidates[0]
    if key in _CHOICES:
        return _CHOICES[key]
    if is_traced(x) or INTERPRETED or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times: Dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = measure(partial(run, config))
        except Exception as error:  # Triton's own error types differ between its versions
            _logger.info('%s: %s does not run: %s', key, config, error)
    # With no survivor the default is launched once more, so that the caller sees its error.
    _CHOICES[key] = min(times, key=times.__getitem__) if times else candidates[0]
    _logger.info('%s: %s of %s', key, _CHOICES[key], times)
    return _CHOICES[key]
