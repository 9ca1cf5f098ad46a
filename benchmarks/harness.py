"""Shared code of the benchmark scripts: the machine, rounds, memory, tables, results.

Depends on PyTorch but not on timm or the models, so that benchmarks of kernels can use it too. What the package's own
``python -m timm_convmixer measure`` times with as well is in ``timm_convmixer.timing``.
"""
import ctypes
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import torch

from timm_convmixer.files import write_atomically
from timm_convmixer.timing import Rounds, load_average, load_warning, usable_cores

RESULTS = Path(__file__).parent / 'results'
SCHEMA = 1

# Instruction sets that determine the speed of convolutions and matrix products.
ISA_FLAGS = (
    'avx2', 'fma', 'f16c', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_tile', 'amx_bf16',
    'amx_int8', 'amx_fp16', 'asimd', 'asimdhp', 'bf16', 'i8mm', 'sve', 'sve2', 'sme',
)
PACKAGES = ('timm', 'torch', 'triton', 'numpy', 'onnx', 'onnxscript', 'onnxruntime', 'openvino', 'executorch')

# glibc allocates blocks of at least this size with mmap and returns them to the system on free. Setting the threshold
# also stops glibc from raising it, which would keep freed activations resident.
MALLOC_ENV = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536', 'MALLOC_ARENA_MAX': '1'}


def _read_fields(path: str) -> Dict[str, str]:
    """Return the first value of each key in a file under /proc; empty if there is no such file."""
    fields: Dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return fields
    for line in text.splitlines():
        key, separator, value = line.partition(':')
        if separator:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _kib_to_mb(text: Optional[str]) -> Optional[float]:
    return None if text is None else round(int(text.split()[0]) * 1024 / 1e6, 1)


def describe_machine(device: str = 'cpu') -> Dict[str, Any]:
    """Return processor, cores, instruction sets, memory, operating system, and the GPU if ``device`` is one."""
    cpu = _read_fields('/proc/cpuinfo')
    flags = (cpu.get('flags') or cpu.get('Features') or '').split()
    machine = dict(
        cpu=cpu.get('model name') or platform.processor() or platform.machine(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        isa=[flag for flag in ISA_FLAGS if flag in flags],
        pytorch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        memory_mb=_kib_to_mb(_read_fields('/proc/meminfo').get('MemTotal')),
        os=platform.platform(),
        gpu=None,
    )
    if torch.device(device).type == 'cuda':
        properties = torch.cuda.get_device_properties(device)
        machine['gpu'] = dict(
            name=properties.name,
            capability=f'{properties.major}.{properties.minor}',
            memory_mb=round(properties.total_memory / 1e6),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            float32_matmul_precision=torch.get_float32_matmul_precision(),
            cudnn_allow_tf32=torch.backends.cudnn.allow_tf32,
        )
    return machine


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return a line for titles: the GPU, or the processor with its cores and widest instruction set."""
    if machine['gpu'] is not None:
        return machine['gpu']['name']
    widest = [name for flag, name in (
        ('amx_bf16', 'AMX'), ('avx512f', 'AVX-512'), ('avx2', 'AVX2'), ('sve2', 'SVE2'), ('asimd', 'NEON'),
    ) if flag in machine['isa']]
    extra = f', {widest[0]}' if widest else ''
    threads = machine['threads']
    return f'{machine["cpu"]}, {threads} thread{"s" if threads > 1 else ""}{extra}'


def describe_versions() -> Dict[str, Optional[str]]:
    """Return versions of Python, relevant packages (None if not installed) and this repository."""
    versions: Dict[str, Optional[str]] = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions['commit'] = _git_commit()
    return versions


def _git_commit() -> Optional[str]:
    """Return the commit of this repository, marked if tracked files differ from it."""
    def git(*args: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git('rev-parse', 'HEAD')
        # Changed results do not count: runs write them.
        changed = git('status', '--porcelain', '--untracked-files=no', '--', ':/', ':(exclude,top)benchmarks/results')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-modified' if changed else commit


def start_report(benchmark: str, device: str, settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the common part of results files. A script adds its rows and calls :func:`write_results`."""
    load = load_average()
    report = dict(
        schema=SCHEMA,
        benchmark=benchmark,
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        command=' '.join(['python', *sys.argv]),
        settings={key: str(value) if isinstance(value, Path) else value for key, value in settings.items()},
        device=device,
        machine=describe_machine(device),
        versions=describe_versions(),
        load_average_before=load,
    )
    say(f'{benchmark} on {machine_name(report["machine"])}, torch {torch.__version__}')
    if device == 'cpu' and load_warning(load):
        say(f'WARNING: {load_warning(load)}')
    return report


def write_results(path: Path, report: Mapping[str, Any]) -> None:
    """Write a results file atomically. NaN and infinities are errors."""
    text = json.dumps({**report, 'load_average_after': load_average()}, indent=1, allow_nan=False) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


_START = time.perf_counter()


def elapsed() -> float:
    """Return the seconds since the start of the script."""
    return time.perf_counter() - _START


def say(message: str) -> None:
    """Print progress on standard error, with the seconds since the start; standard output is for tables."""
    print(f'[{elapsed():6.0f} s] {message}', file=sys.stderr, flush=True)


def run_rounds(
        candidates: Mapping[str, Callable[[], Any]],
        rounds: int,
        device: str = 'cpu',
        min_sample_seconds: float = 0.02,
        budget_seconds: float = math.inf,
        min_rounds: int = 3,
        warmup: bool = True,
) -> Dict[str, List[float]]:
    """Time candidates in rounds, see :class:`timm_convmixer.timing.Rounds`.

    Args:
        candidates: Functions to time, by name.
        rounds: Number of rounds.
        device: Device of the candidates.
        min_sample_seconds: Faster candidates are called several times per sample.
        budget_seconds: After ``min_rounds``, start no round that would exceed this time.
        min_rounds: Rounds to run in any case.
        warmup: Whether to call each candidate once before, untimed.

    Returns:
        For each candidate, the seconds per call of every round.
    """
    start = time.perf_counter()
    for function in candidates.values() if warmup else ():
        function()
    turns = Rounds(candidates, device, min_sample_seconds)
    slowest = 0.
    for i in range(rounds):
        used = time.perf_counter() - start
        if i >= min_rounds and used + slowest > budget_seconds:
            say(f'  stopped after {i} of {rounds} rounds: {budget_seconds:.0f} s are used up')
            break
        round_start = time.perf_counter()
        for name in turns.order(candidates):
            turns.sample(name)
        slowest = max(slowest, time.perf_counter() - round_start)
        say(f'  round {i + 1}/{rounds}: {len(candidates)} candidates, {time.perf_counter() - round_start:.1f} s')
    return turns.samples


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with text left-aligned, numbers right-aligned and None as a dash."""
    cells = [['-' if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    left = [all(isinstance(row[i], str) and not row[i][:1].isdigit() for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return '  '.join(
            cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in zip(row, widths, left)
        ).rstrip()

    print(f'\n{title}\n{line(headers)}\n' + '\n'.join(map(line, cells)), flush=True)


def milliseconds(summary: Mapping[str, float]) -> List[str]:
    """Format a summary in seconds as three table cells in milliseconds: median, minimum, quartiles."""
    def cell(seconds: float) -> str:
        return f'{1e3 * seconds:.{1 if seconds >= 0.1 else 2}f}'

    return [cell(summary['median']), cell(summary['min']), f'{cell(summary["q1"])}-{cell(summary["q3"])}']


def times(ratio: Optional[Mapping[str, float]]) -> Optional[str]:
    """Format a paired ratio as a table cell."""
    return None if ratio is None else f'{ratio["median"]:.2f} ({ratio["q1"]:.2f}-{ratio["q3"]:.2f})'


def run_worker(script: str, task: Mapping[str, Any], timeout: float = 1800) -> Dict[str, Any]:
    """Run ``script --worker TASK`` in a fresh interpreter and return the JSON in its last line of output.

    Use it to measure memory: the allocator of this interpreter returns freed blocks at once.

    Raises:
        RuntimeError: If the interpreter fails. The message has the end of its standard error.
    """
    result = subprocess.run(
        [sys.executable, script, '--worker', json.dumps(task)],
        env={**os.environ, **MALLOC_ENV},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if result.returncode != 0:
        raise RuntimeError(f'{Path(script).name} --worker {json.dumps(task)} failed:\n{result.stderr[-2000:]}')
    return json.loads(result.stdout.splitlines()[-1])


def measure_peak_memory(function: Callable[[], Any], device: str) -> Dict[str, Optional[float]]:
    """Measure the additional peak memory of a call in MB (1e6 bytes). Call ``function`` once before.

    Args:
        function: Function to measure, which should free its results.
        device: Device it runs on.

    Returns:
        ``allocated_mb``, the peak of PyTorch's allocator (on a CPU from the profiler). ``resident_mb``, the rise of the
        process's resident memory, which includes allocations of libraries; None except on a CPU under Linux, and only
        valid in an interpreter started by :func:`run_worker`.
    """
    gc.collect()
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return dict(allocated_mb=(torch.cuda.max_memory_allocated() - before) / 1e6, resident_mb=None)
    resident = _measure_resident(function)
    return dict(allocated_mb=_measure_allocated(function), resident_mb=resident)


def _measure_resident(function: Callable[[], Any]) -> Optional[float]:
    if not sys.platform.startswith('linux'):
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'malloc_trim'):
        libc.malloc_trim(0)
    try:
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak, VmHWM, to the current value
    except OSError:
        return None
    before = _kib_to_mb(_read_fields('/proc/self/status')['VmRSS'])
    function()
    return _kib_to_mb(_read_fields('/proc/self/status')['VmHWM']) - before


def _measure_allocated(function: Callable[[], Any]) -> float:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())['traceEvents']
    changes = sorted((event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]')
    if not changes:
        raise RuntimeError('The profiler recorded no allocations; was PyTorch built without Kineto?')
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak / 1e6


def autocast(device: str, dtype: Optional[torch.dtype]) -> Any:
    """Return ``torch.autocast`` to ``dtype``, or a null context if it is None."""
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)
