"""Registration in fresh interpreters: every way to import timm, every switch that turns registration off.

Tests of what follows ``import torch`` run in forks of one interpreter that has imported it, which saves four seconds
each. ``pytest --all`` also runs each in an interpreter of its own.
"""
import importlib.metadata
import json
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest

import forks
import timm_convmixer
from support import ALL

PACKAGE_DIR = Path(timm_convmixer.__file__).parent
TIMM_NAMES = ('convmixer_1536_20', 'convmixer_768_32', 'convmixer_1024_20_ks9_p14')
NEW_NAMES = (
    'convmixer_1536_20_ks3_p7', 'convmixer_1024_16_ks9_p7', 'convmixer_1024_12_ks8_p7', 'convmixer_512_16_ks8_p7',
    'convmixer_512_12_ks8_p7', 'convmixer_256_8_ks5_p2', 'convmixer_256_8_ks9_p1', 'test_convmixer',
    'tf_convmixer_512_16_ks8_p7',
)
SWITCHES = ('TORCH_DEVICE_BACKEND_AUTOLOAD', 'TIMM_CONVMIXER_AUTOLOAD')
NOT_REGISTERED = 'could not register its models'

# Printed by each child at the end: where the models come from, and traces of registration.
REPORT = """
import inspect, json, sys
import timm, timm.models, timm_convmixer
print(json.dumps(dict(
    package=timm_convmixer.__file__,
    origins={name: timm.model_entrypoint(name).__module__ for name in timm.list_models('*convmixer*')},
    in_module=timm.list_models(module='convmixer'),
    in_module_with_tags=timm.list_models(module='convmixer', include_tags=True),
    hooks=[type(finder).__name__ for finder in sys.meta_path if type(finder).__module__.startswith('timm_convmixer')],
    loader=f'{type(timm.models.__loader__).__module__}.{type(timm.models.__loader__).__name__}',
    same_loader=timm.models.__loader__ is timm.models.__spec__.loader,
    source='from .convmixer import' in inspect.getsource(timm.models),
)), flush=True)
"""
# torch takes seconds to exit normally.
LEAVE = 'import os, sys; sys.stdout.flush(); sys.stderr.flush(); os._exit(0)'
REPORT_INDENTED = textwrap.indent(REPORT, ' ' * 8)


def fresh(**env: str) -> Dict[str, Any]:
    """Return arguments to start a child outside the source tree, with both switches at their defaults unless given."""
    inherited = {name: value for name, value in os.environ.items() if name not in (*SWITCHES, 'PYTHONWARNINGS')}
    return dict(env={**inherited, 'OMP_NUM_THREADS': '1', **env}, cwd=Path(os.path.abspath(os.sep)))


def assert_succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, f'rc {result.returncode}\n{result.stdout}\n{result.stderr}'
    return result


def run(*args: Any, **env: str) -> subprocess.CompletedProcess:
    """Run a fresh interpreter."""
    return assert_succeeded(
        subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=600, **fresh(**env)))


def run_code(code: str, *flags: str, **env: str) -> subprocess.CompletedProcess:
    return run(*flags, '-c', f'{textwrap.dedent(code)}\n{LEAVE}', **env)


# torchvision accounts for most of timm's import time.
AFTER_TORCH = """
import sys, torch, torchvision.models.feature_extraction
assert 'timm' not in sys.modules and 'timm_convmixer' in sys.modules
"""


@pytest.fixture(scope='module')
def run_after_torch(tmp_path_factory) -> Iterator[Callable[[str], subprocess.CompletedProcess]]:
    """Run code after ``import torch`` and before any import of timm, with all warnings shown."""
    if ALL or not forks.AVAILABLE:
        yield lambda code: run_code(f'import torch\n{textwrap.dedent(code)}', '-W', 'always')
        return
    with forks.Forks(AFTER_TORCH, tmp_path_factory.mktemp('forks'), '-W', 'always', **fresh()) as after_torch:
        yield lambda code: assert_succeeded(after_torch.run(code))


def last_json(result: subprocess.CompletedProcess) -> Any:
    return json.loads(result.stdout.splitlines()[-1])


def assert_registered(report: Dict[str, Any]) -> None:
    assert Path(report['package']).parent == PACKAGE_DIR, \
        f'A fresh interpreter finds {report["package"]}, pytest runs {PACKAGE_DIR}: install this checkout.'
    assert report['origins'] == dict.fromkeys(TIMM_NAMES + NEW_NAMES, 'timm_convmixer.convmixer')
    assert sorted(report['in_module']) == sorted(TIMM_NAMES + NEW_NAMES)
    assert len(report['in_module_with_tags']) == len(set(report['in_module_with_tags'])) == 12
    assert report['hooks'] == []
    assert report['loader'] == '_frozen_importlib_external.SourceFileLoader'
    assert report['same_loader'] and report['source']


def test_entry_point_is_installed():
    entry_points = importlib.metadata.entry_points(group='torch.backends', name='timm_convmixer')
    assert len(entry_points) > 0, \
        'No distribution here provides the entry point timm_convmixer of the group torch.backends, without which ' \
        'nothing is registered automatically. Install the package: pip install -e .'
    assert {entry_point.value for entry_point in entry_points} == {'timm_convmixer._autoload:autoload'}


IMPORTS = (
    'import timm',
    'import timm_convmixer, timm',
    'from timm_convmixer import ConvMixer',  # imports timm
    'from timm_convmixer import ConvMixerBlock, checkpoint_filter_fn; import timm',
)


@pytest.mark.parametrize('imports', [
    *IMPORTS[:2], *(pytest.param(imports, marks=pytest.mark.slow) for imports in IMPORTS[2:])])
def test_registered_without_a_warning(imports):
    result = run_code(f'{imports}\n{REPORT}', '-W', 'always')
    assert_registered(last_json(result))
    assert 'timm_convmixer' not in result.stderr and 'Overwriting' not in result.stderr


@pytest.mark.parametrize('imports', IMPORTS)
def test_registered_without_a_warning_after_torch(imports, run_after_torch):
    result = run_after_torch(f'{imports}\n{REPORT}')
    assert_registered(last_json(result))
    assert 'timm_convmixer' not in result.stderr and 'Overwriting' not in result.stderr


def test_only_the_model_imports_timm(run_after_torch):
    # Importing timm registers the models, which imports convmixer.py and its dependencies. If one of them imported timm
    # at its top, importing it first would be circular. Modules that those do not import may import timm.
    may_import_timm = {'__main__', 'comparison', 'convert', 'convmixer', 'environment', 'measure'}
    names = [module.name for module in pkgutil.iter_modules(timm_convmixer.__path__)]
    assert {'checkpoints', 'convmixer', 'layers', 'registry'} < set(names)
    result = run_after_torch(f"""
        import importlib, sys
        for name in {sorted({*names} - may_import_timm)}:
            importlib.import_module('timm_convmixer.' + name)
            assert 'timm' not in sys.modules, name
    """ + REPORT_INDENTED)
    assert_registered(last_json(result))
    assert NOT_REGISTERED not in result.stderr


def test_warnings_as_errors():
    # timm and torch import without warnings of their own.
    run_code("import torch, timm; timm.create_model('test_convmixer')", '-W', 'error')


def test_package_imports_neither_torch_nor_timm():
    result = run_code("""
        import sys
        before = set(sys.modules)
        import json, timm_convmixer
        public = sorted(timm_convmixer.__all__), timm_convmixer.__version__, 'ConvMixer' in dir(timm_convmixer)
        print(json.dumps([sorted(set(sys.modules) - before), public]))
    """)
    imported, (names, version, listed) = last_json(result)
    assert {name for name in imported if name.startswith('timm_convmixer')} == {
        'timm_convmixer', 'timm_convmixer._autoload'}
    assert third_party(imported) == []
    assert names == ['ConvMixer', 'ConvMixerBlock', '__version__', 'checkpoint_filter_fn']
    assert version == timm_convmixer.__version__ and listed


def third_party(modules) -> list:
    return sorted(name for name in modules if name.split('.')[0] not in (*sys.stdlib_module_names, 'timm_convmixer'))


def test_what_the_plugin_imports():
    # Keeps `import torch` and `import timm` cheap: the plugin may only add its own modules and some of the standard
    # library. Anything else, such as Triton, is imported on first use.
    code = """
        import json, sys
        import torch
        after_torch = sorted(sys.modules)
        import timm
        print(json.dumps([after_torch, sorted(sys.modules)]), flush=True)
    """
    on = last_json(run_code(code))
    off = last_json(run_code(code, **dict.fromkeys(SWITCHES, '0')))
    added_to_torch, added_to_timm = (set(with_plugin) - set(without) for with_plugin, without in zip(on, off))
    assert {name for name in added_to_torch if name.startswith('timm')} == {
        'timm_convmixer', 'timm_convmixer._autoload'}
    assert third_party(added_to_torch) == []
    assert 'timm_convmixer.convmixer' in added_to_timm
    assert third_party(added_to_timm) == []


@pytest.mark.parametrize('switch, register', [
    # As train.py --device-modules does.
    ('TORCH_DEVICE_BACKEND_AUTOLOAD', "import importlib; importlib.import_module('timm_convmixer')"),
    ('TIMM_CONVMIXER_AUTOLOAD', 'import timm_convmixer'),
])
def test_switched_off_until_imported(switch, register):
    result = run_code(f"""
        import sys, timm, torch
        loaded = [name for name in sys.modules if name.startswith('timm_convmixer')]
        assert loaded == [], loaded
        hooks = [finder for finder in sys.meta_path if 'timm_convmixer' in type(finder).__module__]
        assert hooks == [], hooks
        for name in {TIMM_NAMES}:
            assert timm.model_entrypoint(name).__module__ == 'timm.models.convmixer', name
        assert sorted(timm.list_models('*convmixer*')) == sorted({TIMM_NAMES})
        {register}
    """ + REPORT_INDENTED, '-W', 'always', **{switch: '0'})
    assert_registered(last_json(result))
    assert 'timm_convmixer' not in result.stderr and 'Overwriting' not in result.stderr


@pytest.mark.parametrize('switch', [pytest.param(SWITCHES[0], marks=pytest.mark.slow), SWITCHES[1]])
def test_switched_off_but_imported_first(switch):
    result = run_code(f'import timm_convmixer\nimport torch\nimport timm\n{REPORT}', '-W', 'always', **{switch: '0'})
    assert_registered(last_json(result))
    assert 'timm_convmixer' not in result.stderr


def test_failed_import_of_timm_is_retried(run_after_torch):
    result = run_after_torch("""
        import sys
        sys.modules['timm.models.convnext'] = None  # makes its import fail
        try:
            import timm
        except ImportError:
            pass
        else:
            raise AssertionError('timm was to fail')
        del sys.modules['timm.models.convnext']
        import timm
    """ + REPORT_INDENTED)
    assert_registered(last_json(result))


def test_reloading_changes_nothing(run_after_torch):
    result = run_after_torch("""
        import importlib, timm, timm_convmixer
        importlib.reload(timm_convmixer)
        importlib.reload(timm.models)
    """ + REPORT_INDENTED)
    assert_registered(last_json(result))
    assert 'timm_convmixer' not in result.stderr and 'Overwriting' not in result.stderr


def test_imported_by_several_threads_at_once(run_after_torch):
    result = run_after_torch("""
        import sys, threading
        sys.setswitchinterval(1e-5)
        statements = ['import timm', 'import timm_convmixer', 'import timm_convmixer, timm'] * 2
        barrier = threading.Barrier(len(statements))
        errors = []
        def run(statement):
            barrier.wait()
            try:
                exec(statement, {})
            except Exception as error:
                errors.append((statement, error))
        threads = [threading.Thread(target=run, args=(statement,)) for statement in statements]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [], errors
    """ + REPORT_INDENTED)
    assert_registered(last_json(result))
    assert NOT_REGISTERED not in result.stderr


@pytest.mark.parametrize('source, error', [
    ("raise RuntimeError('broken on purpose')", 'RuntimeError: broken on purpose'),
    pytest.param('def broken(:', 'SyntaxError: invalid syntax', marks=pytest.mark.slow),
], ids=['raises', 'syntax'])
def test_broken_plugin_leaves_timm_working(tmp_path, source, error):
    broken = tmp_path / 'timm_convmixer'
    shutil.copytree(PACKAGE_DIR, broken, ignore=shutil.ignore_patterns('__pycache__'))
    (broken / 'convmixer.py').write_text(source + '\n')
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])])
    result = run_code(f"""
        import sys, warnings
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            import torch
        assert 'timm_convmixer' in sys.modules
        import timm, timm_convmixer
        assert timm_convmixer.__file__.startswith({str(tmp_path)!r}), timm_convmixer.__file__
        assert sorted(timm.list_models('*convmixer*')) == sorted({TIMM_NAMES})
        model = timm.create_model('convmixer_1024_20_ks9_p14', num_classes=0, device='meta')
        assert type(model).__module__ == 'timm.models.convmixer'
        try:
            timm_convmixer.ConvMixer
        except Exception as error:
            print(type(error).__name__ + ': ' + str(error))
    """, '-W', 'always', PYTHONPATH=path)
    assert result.stderr.count(NOT_REGISTERED) == 1, result.stderr
    assert error in result.stderr
    assert result.stdout.startswith(error)


def test_overwriting_stays_silent_for_three_names_only(run_after_torch):
    result = run_after_torch(f"""
        import json, timm, warnings
        from timm_convmixer.registry import register_model
        warned = {{}}
        for name in {TIMM_NAMES + NEW_NAMES + ('resnet18', 'convmixer_of_another_package')}:
            def model(pretrained=False, **kwargs):
                pass
            model.__name__ = name
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                register_model(model)
            warned[name] = [str(warning.message) for warning in caught]
            assert timm.model_entrypoint(name) is model
        print(json.dumps(warned))
    """)
    warned = last_json(result)
    assert {name for name, messages in warned.items() if messages} == {*NEW_NAMES, 'resnet18'}
    for name in (*NEW_NAMES, 'resnet18'):
        assert len(warned[name]) == 1 and warned[name][0].startswith(f'Overwriting {name} in registry')


SPAWN_SCRIPT = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset


class ModelNames(Dataset):
    def __init__(self, block, model):
        self.block = block  # pickled first: a worker imports timm_convmixer.layers before anything else of ours
        self.model = model

    def __len__(self):
        return 2

    def __getitem__(self, index):
        import timm
        from timm_convmixer import ConvMixer, ConvMixerBlock
        created = timm.create_model('test_convmixer').eval()
        created.load_state_dict(self.model.state_dict())
        assert type(created) is type(self.model) is ConvMixer, (type(created), type(self.model))
        assert type(created.blocks[0]) is type(self.block) is ConvMixerBlock
        with torch.no_grad():
            x = torch.full((1, 3, 32, 32), float(index))
            return created(x)[0], self.model(x)[0], timm.model_entrypoint('convmixer_768_32').__module__


if __name__ == '__main__':
    import timm
    model = timm.create_model('test_convmixer').eval()
    dataset = ModelNames(model.blocks[0], model)
    loader = DataLoader(dataset, num_workers=1, multiprocessing_context='spawn')
    for index, (created, sent, (origin,)) in enumerate(loader):
        with torch.no_grad():
            expected = model(torch.full((1, 3, 32, 32), float(index)))
        torch.testing.assert_close(created, expected)
        torch.testing.assert_close(sent, expected)
        assert origin == 'timm_convmixer.convmixer', origin
    print('batches', index + 1)
"""


def test_unpickled_in_a_fresh_interpreter(tmp_path):
    """A spawned worker imports ``timm_convmixer.layers`` before anything else of the package."""
    import timm
    import torch
    torch.manual_seed(0)
    model = timm.create_model('test_convmixer').eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        (tmp_path / 'pickle').write_bytes(pickle.dumps((model.blocks[0], model, x, model(x))))
    result = run_code(f"""
        import pickle
        with open({str(tmp_path / 'pickle')!r}, 'rb') as file:
            block, model, x, expected = pickle.load(file)
        import torch
        from timm_convmixer import ConvMixer, ConvMixerBlock
        assert type(block) is ConvMixerBlock and type(model) is ConvMixer
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
    """ + REPORT_INDENTED, '-W', 'always')
    assert_registered(last_json(result))
    assert NOT_REGISTERED not in result.stderr


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SPAWN_SCRIPT)
    result = run(script)
    assert result.stdout.split() == ['batches', '2']
    assert NOT_REGISTERED not in result.stderr
