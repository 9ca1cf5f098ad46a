"""How the kernels that go over a map in training cut it into tiles, and how they are launched.

These kernels go over a map once and are bound by memory. A map is (batch, channels, POSITIONS), contiguous. A tile is
``PLANES`` rows of ``WIDTH`` positions: of one channel in several images where a kernel sums over a channel, of
neighbouring planes (an image's channel each) where it does not.
"""
from typing import Any, NamedTuple, Tuple

import torch
import triton
import triton.language as tl

from .launch import Launch, round_up

__all__ = ['Tiling', 'channel_launch', 'locate_planes', 'make_tiling', 'map_launch', 'merge_launch']

# Elements of a tile: 16 for each thread of 4 warps, enough loads in flight and registers for all of them.
_TILE = 2048
_MAX_WIDTH = 1024
# Parts that a sum over a channel is computed in, at most.
_MAX_CHUNKS = 64
# Channels whose parts one program merges.
_MERGED_CHANNELS = 32


@triton.jit
def locate_planes(
        planes,
        channels,
        POSITIONS: tl.constexpr,
        PLANES: tl.constexpr,
        WIDTH: tl.constexpr,
):
    """Offset, existence and channel of a tile of neighbouring planes, which each fill POSITIONS of the memory."""
    BLOCKS: tl.constexpr = (POSITIONS + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    plane = (program // BLOCKS) * PLANES + tl.arange(0, PLANES)[:, None]
    position = (program % BLOCKS) * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (plane < planes) & (position < POSITIONS)
    return plane.to(tl.int64) * POSITIONS + position, inside, plane % channels


class Tiling(NamedTuple):
    """How a map is cut for these kernels.

    Attributes:
        planes: Planes of a tile.
        width: Positions of a tile.
        images: Images that one program sums over: so few that there are programs for the chip, a whole number of tiles.
        chunks: Programs a channel, of those that sum over one.
        tiles: Tiles of the whole map, for those that do not.
    """
    planes: int
    width: int
    images: int
    chunks: int
    tiles: int


def make_tiling(shape: Tuple[int, ...], processors: int) -> Tiling:
    """The tiling of maps (B, C, H, W) on a device of ``processors`` multiprocessors."""
    batch, channels, positions = shape[0], shape[1], shape[2] * shape[3]
    width = max(16, min(_MAX_WIDTH, round_up(positions)))
    planes = _TILE // width
    chunks = min(_MAX_CHUNKS, -(-64 * processors // channels), -(-batch // planes))
    images = -(-batch // (chunks * planes)) * planes
    return Tiling(
        planes, width, images, -(-batch // images), -(-batch * channels // planes) * -(-positions // width))


def channel_launch(kernel: Any, device: torch.device, shape: Tuple[int, ...], act: str, tiling: Tiling) -> Launch:
    """The launch of a kernel that sums over each channel."""
    constants = dict(
        POSITIONS=shape[2] * shape[3], ACT=act, IMAGES=tiling.images, PLANES=tiling.planes, WIDTH=tiling.width)
    return Launch(kernel, device, shape[1] * tiling.chunks, shape[:2], constants, num_warps=4)


def merge_launch(
        kernel: Any,
        device: torch.device,
        shape: Tuple[int, ...],
        count: int,
        tiling: Tiling,
        **constants: Any,
) -> Launch:
    """The launch of a kernel that merges the parts of each channel."""
    constants.update(CHUNKS=round_up(tiling.chunks), BLOCK=_MERGED_CHANNELS)
    return Launch(
        kernel, device, -(-shape[1] // _MERGED_CHANNELS), (count, shape[1]), constants, num_warps=1)


def map_launch(
        kernel: Any,
        device: torch.device,
        shape: Tuple[int, ...],
        act: str,
        tiling: Tiling,
        **constants: Any,
) -> Launch:
    """The launch of a kernel that goes over a map element by element."""
    constants.update(POSITIONS=shape[2] * shape[3], ACT=act, PLANES=tiling.planes, WIDTH=tiling.width)
    return Launch(kernel, device, tiling.tiles, (shape[0] * shape[1], shape[1]), constants, num_warps=4)
