"""Files and folders that appear whole or not at all."""
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Collection, Iterator, Union

__all__ = ['new_folder', 'write_atomically']


def _umask() -> int:
    # There is no way to ask for it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomically(path: Union[str, Path], data: bytes) -> None:
    """Write a file, which until then is what it was: the data go to a temporary file beside it first."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {path.parent} to write {path.name} to.')
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
        raise FileExistsError(f'{path} exists and is not empty; choose another folder, or --force to replace it.')
    foreign = [name for name in held if name not in names]
    if foreign:
        raise FileExistsError(f'{path} holds {foreign[0]!r}, which would be lost; choose another folder.')


@contextmanager
def new_folder(path: Union[str, Path], names: Collection[str], replace: bool = False) -> Iterator[Path]:
    """Fill a folder: the context gets a temporary one beside it, which takes its name in the end, if all went well.

    Args:
        path: Folder to make, its parents if need be.
        names: Names of the files that are written to it.
        replace: Whether it may replace a folder that holds files, which must be of these names.

    Raises:
        FileExistsError: If there is a file of that name, or a folder that is not empty and may not be replaced.
    """
    path = Path(path)
    _check_replaceable(path, replace, names)
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
