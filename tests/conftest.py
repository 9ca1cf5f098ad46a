"""Options and marks of the suite, and the share of the machine that each of its processes takes.

Read before any test file, so before torch: OMP_NUM_THREADS counts when torch is imported.
"""
import os
from typing import List

import pytest

WORKERS = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '0'))


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


if WORKERS:
    # Every worker would start a thread for each core, and so would every child of a test.
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, cores() // WORKERS)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--all',
        action='store_true',
        help='also run the tests marked slow, and the long form of those that have one: most of an hour on two cores',
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption('--all'):
        os.environ['TIMM_CONVMIXER_ALL'] = '1'  # read by tests/support.py


def named(config: pytest.Config) -> bool:
    """Whether the command line asks for single tests, or for a selection by marks: then nothing else is left out."""
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
    """For ``-n auto``, the default: workers for the whole suite, none for single files.

    A worker takes seconds to import torch, and hides what ``-s`` and ``breakpoint()`` show. More than four would wait
    for the longest tests.
    """
    whole = any(os.path.isdir(argument) for argument in config.args)
    return min(4, cores()) if whole and config.getoption('capture') != 'no' else 0
