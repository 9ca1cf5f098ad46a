"""Writes files and folders atomically."""
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Collection, Iterator, Union

__all__ = ['check_parent', 'new_folder', 'write_atomically']


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_parent(path: Path) -> None:
    """Raise FileNotFoundError if the folder of a file to write does not exist."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {path.parent} to write {path.name} to.')


def write_atomically(path: Union[str, Path], data: bytes) -> None:
    """Write a file by renaming a temporary file beside it."""
    path = Path(path)
    check_parent(path)
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_replaceable(path: Path, replace: bool, names: Collection[str]) -> None:
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f'{path} is not a folder; choose another name.')
    held = sorted(os.listdir(path)) if path.exists() else []
    if held and not replace:
        raise FileExistsError(
            f'{path} exists and is not empty; choose another folder, or replace it (replace=True, --force).')
    foreign = [name for name in held if name not in names]
    if foreign:
        raise FileExistsError(f'{path} holds {foreign[0]!r}, which would be lost; choose another folder.')


@contextmanager
def new_folder(path: Union[str, Path], names: Collection[str], replace: bool = False) -> Iterator[Path]:
    """Create a folder atomically: the context fills a temporary folder, which is renamed if no error occurs.

    Args:
        path: Folder to create, with its parents.
        names: Names of the files that will be written.
        replace: Whether to replace an existing folder that holds only files of these names.

    Raises:
        FileExistsError: If ``path`` is a file, or a folder that is not empty and may not be replaced.
        ValueError: If ``path`` has no name of its own, such as ``.``.
    """
    path = Path(path)
    if path.name in ('', '..'):
        raise ValueError(f'{path} cannot be created anew; name a folder in it.')
    _check_replaceable(path, replace, names)
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        folder, replaced = workplace / 'new', workplace / 'old'
        folder.mkdir()
        yield folder
        _check_replaceable(path, replace, names)
        if path.exists():
            path.rename(replaced)
        try:
            folder.rename(path)
        except BaseException:
            if replaced.exists():
                replaced.rename(path)
            raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()  # unless the new folder is in it
