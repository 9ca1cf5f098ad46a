"""``ruff check`` and ``mypy``, as configured in pyproject.toml."""
import importlib.util
import subprocess
import sys

import pytest

from support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / 'pyproject.toml').exists(), reason='needs a checkout')


def check(module: str, *args: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f'no {module} here')
    result = subprocess.run(
        [sys.executable, '-m', module, *args], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr


def test_lint():
    check('ruff', 'check', '--no-cache', '--output-format', 'concise', '.')


def test_types():
    check('mypy', '--cache-dir', '/dev/null' if sys.platform != 'win32' else 'nul')
