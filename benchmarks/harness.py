"""What the benchmark scripts share: the machine's description, interleaved rounds, statistics, memory, tables, results.

Knows PyTorch and nothing of timm or of the models, so that a script about kernels can use it as well.
"""
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
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

RESULTS = Path(__file__).parent / 'results'
SCHEMA = 1

# What decides how fast a convolution or a matrix product can be.
ISA_FLAGS = (
    'avx2', 'fma', 'f16c', 'avx_vnni', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_tile', 'amx_bf16',
    'amx_int8', 'amx_fp16', 'asimd', 'asimdhp', 'bf16', 'i8mm', 'sve', 'sve2', 'sme',
)
PACKAGES = ('timm', 'torch', 'triton', 'numpy', 'onnx', 'onnxscript', 'onnxruntime', 'openvino')

# glibc serves a block of this size or more by mmap and gives it back when it is freed. Setting it also stops glibc from
# raising the limit as it goes, after which freed activations would stay resident.
MALLOC_ENV = {'MALLOC_MMAP_THRESHOLD_': '65536', 'MALLOC_TRIM_THRESHOLD_': '65536', 'MALLOC_ARENA_MAX': '1'}


def _read_fields(path: str) -> Dict[str, str]:
    """The first value of each ``key: value`` line of a file under /proc, empty where there is none."""
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
    """Processor, cores, instruction sets, memory, operating system, and the GPU if ``device`` is one."""
    cpu = _read_fields('/proc/cpuinfo')
    flags = (cpu.get('flags') or cpu.get('Features') or '').split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    machine = dict(
        cpu=cpu.get('model name') or platform.processor() or platform.machine(),
        cores=cores,
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
    """One line for a title: the GPU, or the processor with its cores and widest instruction set."""
    if machine['gpu'] is not None:
        return machine['gpu']['name']
    widest = [name for flag, name in (
        ('amx_bf16', 'AMX'), ('avx512f', 'AVX-512'), ('avx2', 'AVX2'), ('sve2', 'SVE2'), ('asimd', 'NEON'),
    ) if flag in machine['isa']]
    extra = f', {widest[0]}' if widest else ''
    threads = machine['threads']
    return f'{machine["cpu"]}, {threads} thread{"s" if threads > 1 else ""}{extra}'


def describe_versions() -> Dict[str, Optional[str]]:
    """Versions of Python, of the packages that matter (None if not installed) and of this repository."""
    versions: Dict[str, Optional[str]] = {'python': platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions['commit'] = _git_commit()
    return versions


def _git_commit() -> Optional[str]:
    """Commit of the repository the scripts lie in, marked if tracked files differ from it."""
    def git(*args: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git('rev-parse', 'HEAD')
        # Results are written into the tree as a run goes on: they do not make it another program.
        changed = git('status', '--porcelain', '--untracked-files=no', '--', ':/', ':(exclude,top)benchmarks/results')
    except (OSError, subprocess.CalledProcessError):
        return None
    return f'{commit}-modified' if changed else commit


def load_average() -> Optional[float]:
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def start_report(benchmark: str, device: str, settings: Mapping[str, Any]) -> Dict[str, Any]:
    """The part that every results file begins with; a script adds its rows and calls :func:`write_results`."""
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
    cores = report['machine']['cores']
    if device == 'cpu' and load is not None and load > 0.5 * cores:
        say(f'WARNING: load average {load} on {cores} cores: the machine is busy, these times say little')
    return report


def write_results(path: Path, report: Mapping[str, Any]) -> None:
    """Write a results file whole or not at all; NaN and infinity are errors."""
    text = json.dumps({**report, 'load_average_after': load_average()}, indent=1, allow_nan=False) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'w') as file:
            file.write(text)
        # mkstemp makes files that their owner alone can read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


_START = time.perf_counter()


def elapsed() -> float:
    """Seconds since the start of the script."""
    return time.perf_counter() - _START


def say(message: str) -> None:
    """A progress line with the seconds since the start, on stderr: stdout is for the tables."""
    print(f'[{elapsed():6.0f} s] {message}', file=sys.stderr, flush=True)


def synchronizer(device: str) -> Callable[[], None]:
    """What to call before a clock is read: it waits for the GPU, if ``device`` is one."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.synchronize
    return lambda: None


class Isolated:
    """A function in an interpreter of its own, which returns a tensor.

    What a model costs on a CPU depends on the memory that what ran before it has left to the C library. So compared
    models, each of which a user would run alone, do not share an interpreter.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *args: Any):
        """
        Args:
            make: Called with ``args`` in the other interpreter, by name; returns the function.
            args: Arguments that can be pickled.

        Raises:
            Exception: What ``make`` raised.
        """
        context = multiprocessing.get_context('spawn')
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, make, args), daemon=True)
        self._process.start()
        other_end.close()
        self.make_seconds = self._receive()

    def _receive(self) -> Any:
        try:
            outcome = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f'The interpreter of a candidate ended with {self._process.exitcode}.') from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def __call__(self) -> Any:
        self._connection.send(None)
        return torch.from_numpy(self._receive())

    def timed(self, repeats: int) -> float:
        """Seconds of one call, as the mean of ``repeats`` in a row, by the clock of the other interpreter."""
        # Idle threads of the candidate before may still spin, waiting for work.
        time.sleep(0.05)
        self._connection.send(repeats)
        return self._receive()

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Any, make: Callable[..., Callable[[], Any]], args: Sequence[Any]) -> None:
    try:
        start = time.perf_counter()
        function = make(*args)
        connection.send(time.perf_counter() - start)
        while True:
            repeats = connection.recv()
            connection.send(function().float().numpy() if repeats is None else timed(function, repeats=repeats))
    except EOFError:
        return
    except Exception as error:
        connection.send(error)


def timed(function: Callable[[], Any], synchronize: Callable[[], None] = lambda: None, repeats: int = 1) -> float:
    """Seconds of one call, as the mean of ``repeats`` in a row."""
    if isinstance(function, Isolated):
        return function.timed(repeats)
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def run_rounds(
        candidates: Mapping[str, Callable[[], Any]],
        rounds: int,
        device: str = 'cpu',
        min_sample_seconds: float = 0.02,
        budget_seconds: float = math.inf,
        min_rounds: int = 3,
        warmup: bool = True,
) -> Dict[str, List[float]]:
    """Time candidates against each other: in every round each of them once, in an order drawn anew.

    Whatever slows the machine down for a while slows all of them down alike, and sample i of one is paired with sample
    i of another.

    Args:
        candidates: What to call, by name.
        rounds: Rounds to run.
        device: Device the candidates run on.
        min_sample_seconds: A faster candidate is called several times for one sample.
        budget_seconds: Start no round that would end after this, once ``min_rounds`` are done.
        min_rounds: Rounds that are run whatever they cost.
        warmup: Call each candidate once before, untimed.

    Returns:
        Seconds of one call, per candidate one sample a round.
    """
    synchronize = synchronizer(device)
    start = time.perf_counter()
    repeats = {}
    for name, function in candidates.items():
        if warmup:
            function()
        repeats[name] = max(1, math.ceil(min_sample_seconds / max(timed(function, synchronize), 1e-9)))

    samples: Dict[str, List[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    slowest = 0.
    for i in range(rounds):
        used = time.perf_counter() - start
        if i >= min_rounds and used + slowest > budget_seconds:
            say(f'  stopped after {i} of {rounds} rounds: {budget_seconds:.0f} s are used up')
            break
        round_start = time.perf_counter()
        shuffle(order)
        for name in order:
            samples[name].append(timed(candidates[name], synchronize, repeats[name]))
        slowest = max(slowest, time.perf_counter() - round_start)
        say(f'  round {i + 1}/{rounds}: {len(order)} candidates, {time.perf_counter() - round_start:.1f} s')
    return samples


def summarize(samples: Sequence[float]) -> Dict[str, float]:
    """Median, minimum and quartiles."""
    low, median, high = _quartiles(samples)
    return dict(median=median, min=min(samples), q1=low, q3=high, count=len(samples))


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> Dict[str, float]:
    """How many times as fast as the baseline: median and quartiles of the ratio of each round's two samples."""
    if len(baseline) != len(samples):
        raise ValueError(f'baseline has {len(baseline)} samples, samples has {len(samples)}; pairs need equal numbers.')
    low, median, high = _quartiles([base / sample for base, sample in zip(baseline, samples)])
    return dict(median=median, q1=low, q3=high)


def _quartiles(values: Sequence[float]) -> Sequence[float]:
    if len(values) == 1:
        return (*values,) * 3
    return statistics.quantiles(values, n=4, method='inclusive')


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table: text to the left, the rest to the right, None as a dash."""
    cells = [['-' if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells)]
    left = [all(isinstance(row[i], str) and not row[i][:1].isdigit() for row in rows) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        return '  '.join(
            cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in zip(row, widths, left)
        ).rstrip()

    print(f'\n{title}\n{line(headers)}\n' + '\n'.join(map(line, cells)), flush=True)


def milliseconds(summary: Mapping[str, float]) -> List[str]:
    """Median, minimum and quartiles of a summary in seconds, as three cells of a table in milliseconds."""
    def cell(seconds: float) -> str:
        return f'{1e3 * seconds:.{1 if seconds >= 0.1 else 2}f}'

    return [cell(summary['median']), cell(summary['min']), f'{cell(summary["q1"])}-{cell(summary["q3"])}']


def times(ratio: Optional[Mapping[str, float]]) -> Optional[str]:
    """A paired ratio as a cell of a table."""
    return None if ratio is None else f'{ratio["median"]:.2f} ({ratio["q1"]:.2f}-{ratio["q3"]:.2f})'


def run_worker(script: str, task: Mapping[str, Any], timeout: float = 1800) -> Dict[str, Any]:
    """Run ``script --worker TASK`` in a fresh interpreter and return the JSON of its last line on stdout.

    For memory: the interpreter has run nothing else before, and its allocator gives freed blocks back at once.

    Raises:
        RuntimeError: If the interpreter fails, with the end of what it wrote.
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
    """What a call needs at its peak beyond what was held before it, in MB (1e6 bytes). Call ``function`` once before.

    Args:
        function: What to measure; it should free what it makes.
        device: Device it runs on.

    Returns:
        ``allocated_mb``, by PyTorch's own accounts: on a CPU the live bytes its allocator handed out, as the profiler
        records them, on a GPU the caching allocator's peak. ``resident_mb``, on Linux and a CPU: the rise of the
        process's resident memory, which includes what libraries allocate for themselves; elsewhere None. Needs an
        interpreter started by :func:`run_worker`.
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
        Path('/proc/self/clear_refs').write_text('5')  # sets the peak, VmHWM, to what is resident now
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
        raise RuntimeError('The profiler recorded no allocation: is this a build of PyTorch without Kineto?')
    live = peak = 0
    for _, size in changes:
        live += size
        peak = max(peak, live)
    return peak / 1e6


def autocast(device: str, dtype: Optional[torch.dtype]) -> Any:
    """``torch.autocast`` to ``dtype``, or nothing if that is None."""
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)
