"""Loads random mutations of valid checkpoints and reports the outcomes, as a child process of test_hostile_files.py.

    python tests/mutations.py FOLDER FIRST STOP

Prints a line of JSON before and after each mutation, so that the parent knows which one crashed. After 20 seconds of
processor time SIGPROF ends the process: a hang. Files that crash, hang or load wrong stay in the folder. Mutation i is
the same in every run, except for memory addresses in PyTorch's legacy format.
"""
import copy
import io
import json
import os
import random
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Dict, List, Tuple

import safetensors.torch
import timm
import torch

import timm_convmixer  # noqa: F401, registers the models

SIZE = dict(dim=8, depth=2, kernel_size=3, patch_size=2, num_classes=3)


def create_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('test_convmixer', **SIZE)


def deflated(content: bytes) -> bytes:
    """Compress the members of a zip archive, which torch.save never does and torch.load accepts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)  # with a fixed date, 1980
            info.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(info, source.read(name))
    return buffer.getvalue()


def valid_checkpoints() -> List[Tuple[str, bytes]]:
    """Return names and contents: safetensors, PyTorch's two formats, a training checkpoint, a compressed archive."""
    def saved(content, **kwargs) -> bytes:
        buffer = io.BytesIO()
        torch.save(content, buffer, **kwargs)
        return buffer.getvalue()

    model = create_model()
    state_dict = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters())
    training = dict(epoch=3, arch='test_convmixer', state_dict=state_dict, optimizer=optimizer.state_dict(), version=2)
    return [
        ('model.safetensors', safetensors.torch.save(state_dict)),
        ('model.safetensors', safetensors.torch.save(state_dict, dict(format='pt'))),
        ('model.pth', saved(state_dict)),
        ('model.pth', saved(state_dict, _use_new_zipfile_serialization=False)),
        ('last.pth.tar', saved(training)),
        ('model.pth', deflated(saved(state_dict))),
    ]


def position(content: bytes, rng: random.Random) -> int:
    """Choose a position anywhere, or near an end, where the formats keep their metadata."""
    near = min(rng.choice((16, 512, 4096, len(content))), len(content))
    offset = rng.randrange(near) if near else 0
    return offset if rng.random() < 0.5 else len(content) - 1 - offset


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    at = position(content, rng)
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    at, length = position(content, rng), rng.choice((1, 2, 4, 8, 64, 1000))
    filling = rng.choice((bytes(length), b'\xff' * length, rng.randbytes(length)))
    return (content[:at] + filling + content[at + length:])[:max(len(content), at + 1)]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[:position(content, rng)]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = position(content, rng)
    return content[:at] + rng.randbytes(rng.choice((1, 2, 7, 8, 64, 5000))) + content[at:]


def delete(content: bytes, rng: random.Random) -> bytes:
    at = position(content, rng)
    return content[:at] + content[at + rng.choice((1, 2, 7, 8, 64, 5000)):]


def repeat(content: bytes, rng: random.Random) -> bytes:
    start, stop = sorted((position(content, rng), position(content, rng)))
    return content[:stop] + content[start:stop] + content[stop:]


def several(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 6)):
        content = rng.choice((flip_bit, overwrite, insert, delete))(content, rng) or b'\0'
    return content


INTEGERS = (-1, 0, 1, 2, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 53, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1)
NUMBERS = (*INTEGERS, 2 ** 64, 1e308, None, '8')


def edit_header(content: bytes, rng: random.Random) -> bytes:
    """Change sizes, types, names, offsets or the length in a safetensors header."""
    length = int.from_bytes(content[:8], 'little')
    header, rest = json.loads(content[8:8 + length]), content[8 + length:]
    if rng.random() < 0.1:
        return rng.choice((*INTEGERS, length - 1, length + 1)).to_bytes(16, 'little', signed=True)[:8] + content[8:]
    name = rng.choice([name for name in header if name != '__metadata__'])
    entry, other = header[name], header[rng.choice(list(header))]
    kind = rng.randrange(8)
    if kind == 0:
        entry['dtype'] = rng.choice(('F64', 'F16', 'BF16', 'I64', 'U8', 'BOOL', 'F8_E4M3', 'F4', 'X', None, 7))
    elif kind == 1:
        entry['shape'] = [rng.choice(NUMBERS) for _ in range(rng.randrange(6))]
    elif kind == 2:
        entry['shape'] = rng.sample(entry['shape'], len(entry['shape'])) + [1] * rng.randrange(3)
    elif kind == 3:
        entry['data_offsets'][rng.randrange(2)] = rng.choice(NUMBERS)
    elif kind == 4:
        entry['data_offsets'] = other.get('data_offsets', [])
    elif kind == 5:
        del header[name]
    elif kind == 6:
        header[rng.choice(('', name + '.x', 'head.weight', '__metadata__', '\0', 'é' * 1000))] = header.pop(name)
    else:
        header[name] = rng.choice(([], {}, None, 'x', {'a': {'b': [[[[]]]]}}))
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, 'little') + encoded + rest


MUTATIONS: Tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bit, overwrite, truncate, insert, delete, repeat, several)


def mutate(number: int, checkpoints: List[Tuple[str, bytes]]) -> Tuple[str, str, bytes]:
    """Return file name, kind and content of mutation ``number``."""
    rng = random.Random(number)
    file_name, content = checkpoints[number % len(checkpoints)]
    mutation = rng.choice(MUTATIONS + ((edit_header,) * 3 if file_name.endswith('.safetensors') else ()))
    return file_name, mutation.__name__, mutation(content, rng)


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path('/proc/self/status').read_text()
    return int(status.split('VmHWM:')[1].split()[0]) * 1024


DTYPES = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, F8_E4M3=torch.float8_e4m3fn,
    I64=torch.int64, U8=torch.uint8, BOOL=torch.bool)


def says_so(content: bytes, loaded: Dict[str, torch.Tensor]) -> bool:
    """Check independently that the file itself holds the changed weights that were loaded from it.

    A safetensors file must hold them at the offsets in its header. A zip archive must fail its checksums, which torch
    ignores, or mark a member as a folder, whose tensor torch leaves uninitialised. PyTorch's legacy format has nothing
    to check.
    """
    if not zipfile.is_zipfile(io.BytesIO(content)):
        if content[8:9] != b'{':
            return True
        length = int.from_bytes(content[:8], 'little')
        header, data = json.loads(content[8:8 + length]), content[8 + length:]
        for key, value in loaded.items():
            if key in header:
                start, stop = header[key]['data_offsets']
                stated = torch.frombuffer(bytearray(data[start:stop]), dtype=DTYPES[header[key]['dtype']])
                stated = stated.view(header[key]['shape']).to(value.dtype)
                if not torch.equal(stated.nan_to_num(7), value.nan_to_num(7)):
                    return False
        return True
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.testzip() is not None or any(info.external_attr & 0x10 for info in archive.infolist())
    except Exception:
        return True


def outcome(model: torch.nn.Module, path: Path, original: Dict[str, torch.Tensor]) -> Tuple[str, str]:
    """Return ``'refused'`` with the error, ``'right'``, ``'other'`` (weights that the file holds) or ``'wrong'``."""
    try:
        timm.models.load_checkpoint(model, str(path))
    except Exception as error:
        return 'refused', f'{type(error).__name__}: {error}'
    loaded = model.state_dict()
    assert {key: (value.shape, value.dtype) for key, value in loaded.items()} == {
        key: (value.shape, value.dtype) for key, value in original.items()}
    if all(torch.equal(loaded[key], original[key]) for key in original):
        return 'right', ''
    return ('other' if says_so(path.read_bytes(), loaded) else 'wrong'), ''


def main(folder: Path, first: int, stop: int) -> None:
    warnings.simplefilter('ignore')
    checkpoints = valid_checkpoints()
    template = create_model()
    original = template.state_dict()
    # Load each format once, so that one-time allocations of torch do not count as a mutation's.
    for number, (file_name, content) in enumerate(checkpoints):
        path = folder / f'{number}-{file_name}'
        path.write_bytes(content)
        assert outcome(copy.deepcopy(template), path, original) == ('right', ''), file_name
    start = peak_memory()
    for number in range(first, stop):
        file_name, kind, content = mutate(number, checkpoints)
        path = folder / f'{number}-{file_name}'
        path.write_bytes(content)
        print(json.dumps(dict(number=number, file=file_name, kind=kind)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 20)
        result, error = outcome(copy.deepcopy(template), path, original)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if result != 'wrong':
            path.unlink()
        print(json.dumps(dict(result=result, error=error[:200], memory=peak_memory() - start)), flush=True)


if __name__ == '__main__':
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    os._exit(0)  # torch takes seconds to exit normally
