"""Options and marks of the suite, and the number of workers and threads.

pytest reads this file before any test imports torch, which reads OMP_NUM_THREADS on import.
"""
import os
from typing import Iterator, List

import pytest

WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '0'))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


if WORKERS:
    # Otherwise every worker, and every child process of a test, starts one thread per core.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores() // WORKERS)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--all',
        action='store_true',
        help='also run slow tests and the long form of others (most of an hour on two cores)',
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption('--all'):
        os.environ['TIMM_CONVMIXER_ALL'] = '1'  # read by tests/support.py


def named(config: pytest.Config) -> bool:
    """Whether the command line names single tests or selects slow ones by mark; then none are deselected."""
    return 'slow' in (config.option.markexpr or '') or any('::' in argument for argument in config.args)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    if config.getoption('--all') or named(config):
        return
    slow = [item for item in items if item.get_closest_marker('slow')]
    if slow:
        items[:] = [item for item in items if not item.get_closest_marker('slow')]
        config.hook.pytest_deselected(items=slow)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers for ``-n auto``, the default: none for single files.

    A worker takes seconds to import torch, and breaks ``-s`` and ``breakpoint()``. More than four would wait for the
    longest tests.
    """
    whole = any(os.path.isdir(argument) for argument in config.args)
    return min(4, cores()) if whole and config.getoption('capture') != 'no' else 0


@pytest.fixture(scope='module')
def small_maps() -> Iterator[None]:
    """Let feature maps of any size take the fast paths."""
    from support import lower_thresholds

    with pytest.MonkeyPatch.context() as patch:
        lower_thresholds(patch)
        yield
