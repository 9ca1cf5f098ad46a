"""Fair timing, shared by ``python -m timm_convmixer measure`` and the benchmarks.

Candidates run in turn, each in an interpreter of its own. Knows tensors and functions, not models.
"""
import contextlib
import copy
import math
import multiprocessing
import os
import random
import signal
import statistics
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence

import torch

__all__ = [
    'Isolated', 'Rounds', 'load_average', 'load_warning', 'paired_ratio', 'summarize', 'synchronizer', 'timed',
    'usable_cores',
]


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def load_average() -> Optional[float]:
    """Return the one-minute load average, None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None


def load_warning(load: Optional[float]) -> str:
    """Return a warning if a load average from before the benchmark says that the machine is busy, else ``''``."""
    cores = usable_cores()
    if load is None or load <= 0.5 * cores:
        return ''
    return f'load average {load} on {cores} cores: the machine is busy, these times say little'


def synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits for the GPU, if ``device`` is one; call it before reading a clock."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.synchronize
    return lambda: None


class Isolated:
    """A function in an interpreter of its own, which returns a tensor.

    On a CPU, a model's speed depends on the memory that earlier models left to the C library's allocator. So compared
    models do not share an interpreter.
    """

    def __init__(
            self,
            make: Callable[..., Callable[[], Any]],
            *args: Any,
            wait: bool = True,
            quiet: bool = False,
            preload: Sequence[str] = (),
    ):
        """
        Args:
            make: Module-level function, called with ``args`` in the other interpreter; it returns the function.
            args: Arguments that can be pickled.
            wait: Whether to wait until the function is made; else call :meth:`wait` before anything else.
            quiet: Whether to discard what the other interpreter prints.
            preload: Modules to import once for all interpreters: where the system can, they are forked from one that
                has imported these and done nothing else, which saves seconds each. CUDA does not survive a fork.

        Raises:
            Exception: Any exception of ``make``. One that cannot be pickled comes as a RuntimeError.
        """
        forks = bool(preload) and 'forkserver' in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context('forkserver' if forks else 'spawn')
        if forks:
            context.set_forkserver_preload(list(preload))
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, make, args, quiet), daemon=True)
        with _without_interrupts():
            self._process.start()
        other_end.close()
        self._awaited = True
        if wait:
            self.wait()

    def wait(self, timeout: Optional[float] = None) -> None:
        """Wait until the function is made, and set ``make_seconds``.

        Raises:
            TimeoutError: If it takes longer than ``timeout`` seconds.
            Exception: Any exception of ``make``.
        """
        if not self._connection.poll(timeout):
            raise TimeoutError(f'The function is not made after {timeout:.0f} seconds.')
        self.make_seconds = self._receive()

    def _send(self, request: Optional[int]) -> None:
        self._awaited = True
        with contextlib.suppress(ConnectionError):  # it has ended, which the answer will tell
            self._connection.send(request)

    def _receive(self) -> Any:
        try:
            outcome = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f'The interpreter of a candidate ended with {self._process.exitcode}.') from None
        self._awaited = False
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def __call__(self) -> torch.Tensor:
        self._send(None)
        return torch.from_numpy(self._receive())

    def timed(self, repeats: int) -> float:
        """Return the mean seconds of ``repeats`` calls, by the clock of the other interpreter."""
        # Idle threads of the previous candidate may still spin.
        time.sleep(0.05)
        self._send(repeats)
        return self._receive()

    def close(self) -> None:
        """End the other interpreter, and whatever it has started if it is not idle."""
        self._connection.close()
        if not self._awaited:
            self._process.join(timeout=10)  # it ends by itself, and tidies up
        if self._process.is_alive():
            with contextlib.suppress(AttributeError, ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started meanwhile ignore Ctrl-C, which is for this one to handle."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # would itself unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Any, make: Callable[..., Callable[[], Any]], args: Sequence[Any], quiet: bool) -> None:
    if hasattr(os, 'setpgid'):
        os.setpgid(0, 0)  # compilers that it starts end with it
    if quiet:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
    try:
        start = time.perf_counter()
        function = make(*args)
        connection.send(time.perf_counter() - start)
        synchronize = synchronizer('cuda' if torch.cuda.is_initialized() else 'cpu')
        while True:
            repeats = connection.recv()
            if repeats is None:
                connection.send(function().float().cpu().numpy())
            else:
                connection.send(timed(function, synchronize, repeats))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            _send_error(connection, error)


def _send_error(connection: Any, error: Exception) -> None:
    try:
        connection.send(copy.deepcopy(error))  # fails where the receiver could not make it again
    except ConnectionError:
        raise
    except Exception:
        connection.send(RuntimeError(f'{type(error).__name__}: {error}'))


def timed(function: Callable[[], Any], synchronize: Callable[[], None] = lambda: None, repeats: int = 1) -> float:
    """Return the mean seconds of ``repeats`` calls."""
    if isinstance(function, Isolated):
        return function.timed(repeats)
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


class Rounds:
    """Candidates that take turns: in each round every candidate runs once, in random order.

    Temporary slowdowns of the machine thus affect all candidates alike, and samples of the same round are paired.

    Attributes:
        samples: For each candidate, the seconds per call of every round so far.
    """

    def __init__(
            self,
            candidates: Mapping[Any, Callable[[], Any]],
            device: str = 'cpu',
            min_sample_seconds: float = 0.02,
    ):
        """
        Args:
            candidates: Functions to time, by name, each called once before.
            device: Device of the candidates.
            min_sample_seconds: Faster candidates are called several times per sample.
        """
        self.candidates = candidates
        self.samples: Dict[Any, List[float]] = {name: [] for name in candidates}
        self._synchronize = synchronizer(device)
        self._min_sample_seconds = min_sample_seconds
        self._repeats: Dict[Any, int] = {}
        self._random = random.Random(0)  # noqa: S311  # an order, no secret

    def order(self, names: Iterable[Any]) -> List[Any]:
        """Return the order of a round."""
        names = list(names)
        self._random.shuffle(names)
        return names

    def sample(self, name: Any) -> None:
        """Time a candidate once more."""
        function = self.candidates[name]
        repeats = self._repeats.get(name, 1)
        seconds = timed(function, self._synchronize, repeats)
        if name not in self._repeats:
            self._repeats[name] = max(1, math.ceil(self._min_sample_seconds / max(seconds, 1e-9)))
            if self._repeats[name] > 1:
                seconds = timed(function, self._synchronize, self._repeats[name])
        self.samples[name].append(seconds)


def summarize(samples: Sequence[float]) -> Dict[str, float]:
    """Return median, minimum and quartiles."""
    low, median, high = _quartiles(samples)
    return dict(median=median, min=min(samples), q1=low, q3=high, count=len(samples))


def paired_ratio(baseline: Sequence[float], samples: Sequence[float]) -> Dict[str, float]:
    """Return the speedup over the baseline: median and quartiles of the ratios of paired samples."""
    if len(baseline) != len(samples):
        raise ValueError(f'baseline and samples must have equal lengths, got {len(baseline)} and {len(samples)}.')
    low, median, high = _quartiles([base / sample for base, sample in zip(baseline, samples)])
    return dict(median=median, q1=low, q3=high)


def _quartiles(values: Sequence[float]) -> Sequence[float]:
    if len(values) == 1:
        return (*values,) * 3
    return statistics.quantiles(values, n=4, method='inclusive')
