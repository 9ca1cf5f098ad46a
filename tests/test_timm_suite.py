"""timm's unchanged ``tests/test_models.py`` on our variants, from the sdist of the installed version.

The sdist is downloaded once into pytest's cache; ``TIMM_CONVMIXER_TIMM_SDIST`` may name an unpacked one instead.
``pytest --all`` runs every variant.
"""
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from support import ALL, child_env

SMALL_VARIANTS = ('test_convmixer', 'convmixer_256_8_ks5_p2', 'convmixer_512_12_ks8_p7', 'convmixer_1024_20_ks9_p14')

# Deselected because they download from the Hub: three checkpoints, hundreds of MB in all, and the reference inputs and
# outputs of timm's own test_* models.
NEED_THE_NETWORK = (
    'test_model_load_pretrained[1-convmixer_1536_20.in1k]',
    'test_model_load_pretrained[1-convmixer_768_32.in1k]',
    'test_model_load_pretrained[1-convmixer_1024_20_ks9_p14.in1k]',
    'test_model_inference[1-test_convmixer.digits]',
)

# Deselected without --all: tests that are cheap on small variants, but take as long on these as all others.
LONG = (
    'test_prune_intermediate_layers_contract[convmixer_512_12_ks8_p7]',
    'test_prune_intermediate_layers_contract[convmixer_1024_20_ks9_p14]',
)

# A pytest plugin for the child: records timm's tests for our variants, their outcomes, and the module of each model.
RECORDER = """
import json, os
import pytest
import timm

VARIANTS = set(os.environ['VARIANTS'].split(','))
record = dict(timm=timm.__file__, origins={}, available=[], outcomes={})


@pytest.hookimpl(tryfirst=True)  # before anything is deselected
def pytest_collection_modifyitems(items):
    for item in items:
        params = getattr(item, 'callspec', None)
        model_name = params.params.get('model_name') if params else None
        if isinstance(model_name, str) and model_name.split('.')[0] in VARIANTS:
            record['available'].append(item.name)


def pytest_runtest_setup(item):
    model_name = item.callspec.params['model_name']
    record['origins'][model_name] = timm.model_entrypoint(model_name).__module__


def pytest_runtest_logreport(report):
    name = report.nodeid.split('::')[-1]
    if report.when == 'call' or report.outcome != 'passed':
        record['outcomes'][name] = report.outcome


def pytest_sessionfinish():
    with open(os.environ['RECORD'], 'w') as f:
        json.dump(record, f)
"""


@pytest.fixture(scope='module')
def timm_sdist(request, tmp_path_factory) -> Path:
    given = os.environ.get('TIMM_CONVMIXER_TIMM_SDIST')
    if given:
        return Path(given)
    cache = getattr(request.config, 'cache', None)  # none with -p no:cacheprovider
    folder = cache.mkdir('timm-sdist') if cache else tmp_path_factory.mktemp('timm-sdist')
    archive = folder / f'timm-{timm.__version__}.tar.gz'
    if not archive.exists():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm']
        result = subprocess.run(
            [*pip, '--dest', folder, f'timm=={timm.__version__}'], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"timm's sdist could not be downloaded: {result.stderr.strip()[-500:]}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
    return folder / f'timm-{timm.__version__}'


def test_timm_suite(timm_sdist, tmp_path):
    version = {}
    exec((timm_sdist / 'timm' / 'version.py').read_text(), version)
    assert version['__version__'] == timm.__version__, f'{timm_sdist} is not the sdist of the installed timm'
    variants, deselected = SMALL_VARIANTS, NEED_THE_NETWORK + LONG
    if ALL:
        variants, deselected = timm.list_models(module='convmixer'), NEED_THE_NETWORK
        assert len(variants) == 12

    # Copy only the tests, so that they import the installed timm.
    shutil.copytree(timm_sdist / 'tests', tmp_path / 'tests')
    shutil.copy(timm_sdist / 'pyproject.toml', tmp_path)
    (tmp_path / 'recorder.py').write_text(RECORDER)
    changing = ('PYTEST_', 'GITHUB_ACTIONS', 'TORCH_', 'TIMM_CONVMIXER_')  # change the selection or the registry
    env = child_env(**dict.fromkeys(name for name in os.environ if name.startswith(changing)))
    env.update(
        PYTHONPATH=os.pathsep.join([str(tmp_path), env['PYTHONPATH']]),
        VARIANTS=','.join(variants),
        RECORD=str(tmp_path / 'record.json'),
        HF_HUB_OFFLINE='1',
    )
    result = subprocess.run(
        [
            sys.executable, '-m', 'pytest', '-q', '-p', 'recorder', '-p', 'no:cacheprovider', '-W', 'ignore',
            'tests/test_models.py',
            '-k', ' or '.join(variants),
            *(f'--deselect=tests/test_models.py::{name}' for name in deselected),
        ],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(result.stdout)  # shown by pytest -s or -rP
    assert result.returncode == 0

    record = json.loads((tmp_path / 'record.json').read_text())
    assert Path(record['timm']) == Path(timm.__file__)
    assert set(record['origins'].values()) == {'timm_convmixer.convmixer'}
    assert {name.split('.')[0] for name in record['origins']} == set(variants)
    # All of timm's tests for these variants ran and passed; none was skipped or lost.
    expected = set(record['available']) - set(deselected)
    assert record['outcomes'] == dict.fromkeys(expected, 'passed')
    forward = [name for name in expected if name.startswith('test_model_forward[')]
    assert len(forward) == len(variants)
