"""Draws the patch embeddings and depthwise kernels of a ConvMixer, like the paper's figures."""
import io
import math
from pathlib import Path
from typing import List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .files import write_atomically

__all__ = ['draw_filters', 'load_filters', 'picture_format', 'save_filters']

_BACKGROUND = (255, 255, 255)
_LINES = (168, 168, 168)
_TEXT = (32, 32, 32)
_MUTED = (112, 112, 112)
# Blue, white and red for negative, zero and positive weights; positive and negative look equally strong.
_NEGATIVE, _ZERO, _POSITIVE = (np.array(rgb, float) for rgb in ((33, 102, 172), (247, 247, 247), (178, 24, 43)))

_TITLE, _LABEL = 22, 14
_MARGIN = 24
# Approximate width of a filter in pixels; narrow in models of more than _MANY_BLOCKS blocks.
_WIDE, _NARROW = 48, 28
_MANY_BLOCKS = 12


def load_filters(
        model: Optional[str] = None,
        checkpoint_path: Optional[Union[str, Path]] = None,
) -> Mapping[str, torch.Tensor]:
    """Load the weights to draw, with timm's keys.

    Args:
        model: Pretrained model: a timm name, with or without tag, ``local-dir:folder`` or ``hf-hub:owner/name``.
        checkpoint_path: Checkpoint of any known format, instead of a model.

    Raises:
        ValueError: If neither or both are given, or the weights are damaged or not a ConvMixer's.
    """
    if checkpoint_path is not None and model is None:
        from .checkpoints import convert_state_dict
        from .convert import infer_architecture, read_checkpoint

        checkpoint = read_checkpoint(checkpoint_path)
        try:
            weights = convert_state_dict(checkpoint)
            infer_architecture(weights)  # raises an error for what is no tensor, or has no shape of a ConvMixer's
        except ValueError as error:
            raise ValueError(f'{checkpoint_path}: {error}') from error
        return weights
    if model is None or checkpoint_path is not None:
        raise ValueError('Give either a model or a checkpoint.')
    import timm
    from timm.models import get_pretrained_cfg

    from .convmixer import ConvMixer

    if ':' not in model:
        known = timm.list_models(module='convmixer')
        if model.partition('.')[0] not in known:
            raise ValueError(
                f'{model!r} is no ConvMixer of timm; choose from {", ".join(known)}, or use --checkpoint FILE.')
        if not get_pretrained_cfg(model, allow_unregistered=False).has_weights:
            raise ValueError(f'{model} has no pretrained weights; use --checkpoint FILE for your own.')
    try:
        loaded = timm.create_model(model, pretrained=True)
    except OSError:
        raise
    except Exception as error:
        # A damaged file fails in its own way: SafetensorError, KeyError, EOFError, ...
        raise ValueError(f'{model} cannot be loaded: {type(error).__name__}: {error}') from error
    if not isinstance(loaded, ConvMixer):
        raise ValueError(f'{model} is a {type(loaded).__name__}, not a ConvMixer.')
    return loaded.state_dict()


def _font(size: int) -> Union[ImageFont.ImageFont, ImageFont.FreeTypeFont]:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):  # Pillow before 10.1, or without FreeType
        return ImageFont.load_default()


def _colors(values: np.ndarray) -> np.ndarray:
    """Map weights from -1 to 1 to 8-bit RGB, along a new last axis."""
    values = np.nan_to_num(values).clip(-1, 1)[..., None]
    colors = np.where(values < 0, _ZERO + (_NEGATIVE - _ZERO) * -values, _ZERO + (_POSITIVE - _ZERO) * values)
    return colors.round().astype(np.uint8)


def _pick(count: int, max_filters: int) -> List[int]:
    """Choose evenly spaced channels, the same in every layer so that a channel can be followed."""
    if count <= max_filters:
        return list(range(count))
    return [round(index * (count - 1) / (max_filters - 1)) for index in range(max_filters)] if max_filters > 1 else [0]


def _grid(tiles: np.ndarray, columns: int, side: int, lines: Tuple[int, int, int] = _LINES) -> Image.Image:
    """Arrange tiles ``(N, h, w, 3)`` in a grid, each enlarged to about ``side`` pixels."""
    zoom, gap = max(1, round(side / tiles.shape[2])), side // 9
    height, width = zoom * tiles.shape[1], zoom * tiles.shape[2]
    rows = math.ceil(len(tiles) / columns)
    image = Image.new('RGB', (columns * (width + gap) - gap, rows * (height + gap) - gap), lines)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        enlarged = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
        image.paste(enlarged, (column * (width + gap), row * (height + gap)))
    return image


def _scaled(weight: torch.Tensor) -> torch.Tensor:
    """Divide each filter ``(N, ...)`` by its largest weight; by the layer's if filters have a single weight."""
    largest = weight.flatten(1).abs().amax(dim=1)
    if weight[0].numel() == 1:
        largest = largest.max().expand_as(largest)
    return weight / largest.clamp_min(1e-12).view(-1, *[1] * (weight.ndim - 1))


def _embedding_tiles(weight: torch.Tensor) -> Tuple[np.ndarray, str]:
    """Convert patch embeddings ``(N, in_chans, p, p)`` to tiles, in colour if there are three channels."""
    if weight.shape[1] == 3:
        tiles = (127.5 + 127.5 * _scaled(weight)).round().permute(0, 2, 3, 1)
        return tiles.nan_to_num().clamp(0, 255).numpy().astype(np.uint8), 'RGB, grey is 0'
    channels = '1 channel' if weight.shape[1] == 1 else f'mean of {weight.shape[1]} channels'
    return _colors(_scaled(weight.mean(dim=1)).numpy()), channels


def _legend(draw: ImageDraw.ImageDraw, image: Image.Image, x: int, y: int, width: int) -> None:
    bar = _colors(np.linspace(-1, 1, width)[None].repeat(12, axis=0))
    image.paste(Image.fromarray(bar), (x, y))
    font = _font(_LABEL)
    for text, at, anchor in (('-max', x, 'la'), ('0', x + width // 2, 'ma'), ('+max', x + width, 'ra')):
        draw.text((at, y + 16), text, fill=_MUTED, font=font, anchor=anchor)


def draw_filters(state_dict: Mapping[str, torch.Tensor], title: str, max_filters: int = 64) -> Image.Image:
    """Draw patch embeddings and depthwise kernels, one panel per layer.

    Each filter has its own scale, symmetric about zero, because magnitudes within a layer differ widely.

    Args:
        state_dict: Weights with timm's keys.
        title: Title of the picture.
        max_filters: Most filters to draw per layer; they are evenly spaced.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If ``max_filters`` is less than 1.
    """
    if max_filters < 1:
        raise ValueError(f'max_filters={max_filters} must be at least 1.')
    embedding = state_dict['stem.0.weight'].detach().float().cpu()
    kernels: List[torch.Tensor] = []
    while (key := f'blocks.{len(kernels)}.0.fn.0.weight') in state_dict:
        kernels.append(state_dict[key].detach().float().cpu())
    dim, in_chans, patch_size, _ = embedding.shape
    kernel_size = kernels[0].shape[-1]
    channels = _pick(dim, max_filters)
    columns = math.ceil(math.sqrt(len(channels)))

    side = _NARROW if len(kernels) > _MANY_BLOCKS else _WIDE
    tiles, meaning = _embedding_tiles(embedding[channels])
    # Between RGB tiles, grey lines would look like weights of zero.
    drawn = _grid(tiles, columns, side, _BACKGROUND if in_chans == 3 else _LINES)
    panels = [('patch embedding', f'{patch_size}x{patch_size}, {meaning}', drawn)]
    for index, weight in enumerate(kernels):
        drawn = _grid(_colors(_scaled(weight[channels, 0]).numpy()), columns, side)
        panels.append((f'block {index}', f'largest weight {weight.abs().max().item():.2g}', drawn))
    shown = f'{len(channels)} of {dim} channels' if len(channels) < dim else f'All {dim} channels'
    return _arrange(panels, title, [
        f'ConvMixer-{dim}/{len(kernels)}, depthwise kernels of {kernel_size}x{kernel_size}',
        f'{shown}, the same in each panel; each filter has its own scale',
    ])


def _arrange(panels: List[Tuple[str, str, Image.Image]], title: str, notes: List[str]) -> Image.Image:
    title_font, font = _font(_TITLE), _font(_LABEL)
    heading = 2 * _LABEL + 12
    cell_width = max(max(panel.width for *_, panel in panels), 150) + _MARGIN
    cell_height = max(panel.height for *_, panel in panels) + heading + _MARGIN
    # An aspect ratio of about 1.6, and rows of nearly equal length.
    per_row = max(1, min(len(panels), round(math.sqrt(len(panels) * 1.6 * cell_height / cell_width))))
    rows = math.ceil(len(panels) / per_row)
    per_row = math.ceil(len(panels) / rows)
    measure = ImageDraw.Draw(Image.new('RGB', (1, 1)))
    text_width = max(measure.textlength(title, title_font), *(measure.textlength(note, font) for note in notes))
    width = math.ceil(max(per_row * cell_width, text_width + _MARGIN)) + _MARGIN
    line = _LABEL + 5
    top = _MARGIN + _TITLE + 10 + len(notes) * line + _MARGIN
    bottom = 2 * _MARGIN + _LABEL
    image = Image.new('RGB', (width, top + rows * cell_height + bottom), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), title, fill=_TEXT, font=title_font)
    for index, note in enumerate(notes):
        draw.text((_MARGIN, _MARGIN + _TITLE + 10 + index * line), note, fill=_MUTED, font=font)
    for index, (name, note, panel) in enumerate(panels):
        row, column = divmod(index, per_row)
        x, y = _MARGIN + column * cell_width, top + row * cell_height
        draw.text((x, y), name, fill=_TEXT, font=font)
        draw.text((x, y + _LABEL + 4), note, fill=_MUTED, font=font)
        image.paste(panel, (x, y + heading))
    _legend(draw, image, _MARGIN, image.height - bottom, min(240, width - 2 * _MARGIN))
    return image


def picture_format(path: Union[str, Path]) -> str:
    """Return Pillow's name of the format for a file's suffix.

    Raises:
        ValueError: If Pillow cannot write such a file.
    """
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in Image.SAVE:
        raise ValueError(f'{path} must have the suffix of a picture format, such as .png.')
    return name


def save_filters(image: Image.Image, path: Union[str, Path]) -> None:
    """Write a picture atomically, in the format of the file's suffix."""
    data = io.BytesIO()
    image.save(data, format=picture_format(path))
    write_atomically(path, data.getvalue())
