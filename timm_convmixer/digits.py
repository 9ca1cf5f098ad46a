"""The 1,797 handwritten digits of scikit-learn: real images without a download, for training and the demo.

Every fifth image of each class, 355 in all, is held out as ``validation``; the rest is ``train``.
Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(CC BY 4.0).
"""
import io
from collections import defaultdict
from pathlib import Path
from typing import Dict, List, Tuple, Union

from PIL import Image

from .files import write_atomically

__all__ = ['load_digits', 'write_image_folder']


def load_digits() -> Dict[str, List[Tuple[Image.Image, int]]]:
    """Load the digits by split.

    Returns:
        For ``'train'`` and ``'validation'``, a list of images (8 x 8 pixels, 8-bit grey) with labels.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The digits come with scikit-learn: pip install 'timm-convmixer[demo]'.") from error
    digits = datasets.load_digits()
    seen: Dict[int, int] = defaultdict(int)
    splits: Dict[str, List[Tuple[Image.Image, int]]] = {'train': [], 'validation': []}
    for pixels, label in zip(digits.images, digits.target.tolist()):
        image = Image.fromarray((pixels * (255 / 16)).round().astype('uint8'))
        seen[label] += 1
        splits['validation' if seen[label] % 5 == 0 else 'train'].append((image, label))
    return splits


def write_image_folder(root: Union[str, Path]) -> Dict[str, int]:
    """Write the digits as an image folder for timm's scripts: ``root/train/3/0041.png``, ``root/validation/...``.

    Args:
        root: Folder to write to, created if missing. Existing digits are overwritten.

    Returns:
        Number of images written, by split.

    Raises:
        FileExistsError: If a split holds classes of another data set.
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    splits = load_digits()
    for split in splits:
        folder = Path(root) / split
        foreign = sorted(child.name for child in folder.iterdir() if child.name not in '0123456789') if (
            folder.is_dir()) else []
        if foreign:
            raise FileExistsError(f'{folder} holds {foreign[0]!r}, which is no digit; choose another folder.')
    for split, images in splits.items():
        for index, (image, label) in enumerate(images):
            path = Path(root) / split / str(label) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            image.save(png, format='PNG')
            write_atomically(path, png.getvalue())
    return {split: len(images) for split, images in splits.items()}
