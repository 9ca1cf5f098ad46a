"""The contents of the distributions that ``python -m build`` makes, and the wheel outside the source tree."""
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from build import ProjectBuilder

import timm_convmixer
from support import ROOT

PACKAGE = ROOT / 'timm_convmixer'

pytestmark = pytest.mark.slow  # downloads the build backend


def package_files() -> dict:
    """Return the files of the package in the source tree, by their name in the wheel."""
    files = (path for path in PACKAGE.rglob('*') if path.is_file() and '__pycache__' not in path.parts)
    return {path.relative_to(ROOT).as_posix(): path for path in files}


@pytest.fixture(scope='module')
def distributions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('dist')
    # Skip if the build backend cannot be downloaded; any later failure is ours.
    backend = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--quiet', '--dest', folder / 'backend',
         *ProjectBuilder(ROOT).build_system_requires],
        capture_output=True,
        text=True,
    )
    if backend.returncode:
        pytest.skip(f'The build backend cannot be installed: {backend.stderr.strip()[-500:]}')
    build = subprocess.run(
        [sys.executable, '-m', 'build', '--outdir', folder, ROOT], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope='module')
def wheel(distributions) -> Path:
    (path,) = distributions.glob('*.whl')
    return path


def test_wheel_holds_the_package(wheel):
    assert wheel.name == f'timm_convmixer-{timm_convmixer.__version__}-py3-none-any.whl'
    source = package_files()
    assert 'timm_convmixer/py.typed' in source
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if '.dist-info/' not in name}
        assert held == set(source)
        for name, path in source.items():
            assert archive.read(name) == path.read_bytes(), name


def test_wheel_metadata(wheel):
    info = f'timm_convmixer-{timm_convmixer.__version__}.dist-info'
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f'{info}/METADATA').decode())
        entry_points = archive.read(f'{info}/entry_points.txt').decode().split()
        assert archive.read(f'{info}/licenses/LICENSE') == (ROOT / 'LICENSE').read_bytes()
    assert metadata['Name'] == 'timm-convmixer'
    assert metadata['Version'] == timm_convmixer.__version__
    assert metadata['License-Expression'] == 'MIT'
    assert metadata['Requires-Python'] == '>=3.10'
    required = {line.split('>=')[0] for line in metadata.get_all('Requires-Dist') if 'extra ==' not in line}
    assert required == {'timm', 'torch', 'huggingface-hub', 'safetensors'}
    assert entry_points == ['[torch.backends]', 'timm_convmixer', '=', 'timm_convmixer._autoload:autoload']


def test_sdist_holds_the_tests(distributions):
    (sdist,) = distributions.glob('*.tar.gz')
    with tarfile.open(sdist) as archive:
        held = {name.partition('/')[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'tests').rglob('*.py')}
    assert held >= {'pyproject.toml', 'README.md', 'LICENSE'} | tests | set(package_files())


def test_wheel_works_outside_the_source_tree(wheel, tmp_path):
    target = tmp_path / 'site'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--target', target, wheel],
        check=True,
    )
    code = """
import json
import timm
model = timm.create_model('test_convmixer', pretrained=True)  # its weights come out of the wheel
import timm_convmixer, importlib.metadata
distribution = importlib.metadata.distribution('timm-convmixer')
print(json.dumps([timm_convmixer.__file__, str(distribution.locate_file('')), type(model).__module__]))
"""
    env = {name: value for name, value in os.environ.items() if not name.endswith('_AUTOLOAD')}
    result = subprocess.run(
        [sys.executable, '-c', code],
        env={**env, 'PYTHONPATH': str(target), 'HF_HUB_OFFLINE': '1'},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    package, distribution, module = json.loads(result.stdout)
    assert Path(package) == target / 'timm_convmixer' / '__init__.py'
    assert Path(distribution) == target
    assert module == 'timm_convmixer.convmixer'
