"""Weights from the Hub, with the real client and a local server that implements the Hub's protocol."""
import io
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn as nn
from timm.models import save_for_hf

import timm_convmixer  # noqa: F401, registers the models
from hub_client import NAME, SMALL, as_config, as_pickle, as_safetensors, image, make_model, start_client
from hub_server import HubServer
from interpreter import RemoteError
from support import assert_close

# Small models with the kernel, patch and activation of the three names; timm and the client load them in the same way.
NAMES = ('convmixer_1536_20', 'convmixer_768_32', 'convmixer_1024_20_ks9_p14')
REPO = f'timm/{NAME}.in1k'


@pytest.fixture(scope='module')
def hub():
    """A Hub with repositories of the three names, which tests must not change."""
    with HubServer() as server:
        for name in NAMES:
            server.add_repo(f'timm/{name}.in1k').commit({
                'model.safetensors': as_safetensors(make_model(name).state_dict()),
                'pytorch_model.bin': b'Not to be loaded where there is model.safetensors.',
            })
        yield server


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """The cache shared by the online and offline clients."""
    return tmp_path_factory.mktemp('hf_home')


@pytest.fixture(scope='module')
def online(hub, home, tmp_path_factory):
    with start_client(hub.endpoint, tmp_path_factory.mktemp('online'), home) as client:
        yield client


@pytest.fixture(scope='module')
def offline(hub, home, tmp_path_factory):
    """A client in another process, which shares only files with the online one."""
    with start_client(hub.endpoint, tmp_path_factory.mktemp('offline'), home, offline=True) as client:
        yield client


@pytest.fixture(scope='module')
def unreachable(hub, home, tmp_path_factory):
    """A client in online mode without a server."""
    with HubServer() as closed:
        endpoint = closed.endpoint
    with start_client(endpoint, tmp_path_factory.mktemp('unreachable'), home) as client:
        yield client


@pytest.mark.parametrize('name', NAMES)
def test_first_download_then_cache(name, hub, online, tmp_path):
    expected = make_model(name)(image())
    start = len(hub.requests)
    assert_close(online.logits(name, cache_dir=str(tmp_path), **SMALL), expected)
    assert [request.origin for request, _ in hub.requests[start:] if request.method == 'GET'] == ['storage']
    assert not any('pytorch_model.bin' in path for path in hub.sent('HEAD', 'GET', since=start))

    start = len(hub.requests)
    assert_close(online.logits(name, cache_dir=str(tmp_path), **SMALL), expected)
    assert hub.sent('GET', since=start) == []
    assert hub.sent('HEAD', since=start) == [f'/timm/{name}.in1k/resolve/main/model.safetensors']


def test_name_with_tag(online):
    assert_close(online.logits(f'{NAME}.in1k', **SMALL), make_model()(image()))


def test_changed_repository_is_downloaded_again(hub, online):
    repository = hub.add_repo('owner/changing')
    for seed in (1, 2):
        model = make_model(seed=seed)
        repository.commit({'model.safetensors': as_safetensors(model.state_dict())})
        logits = online.logits(NAME, pretrained_cfg_overlay=dict(hf_hub_id='owner/changing'), **SMALL)
        assert_close(logits, model(image()))


def test_revision(hub, online):
    repository = hub.add_repo('owner/revisions')
    models = [make_model(seed=seed) for seed in range(3)]
    config = as_config(model_args=SMALL)
    files = [{'model.safetensors': as_safetensors(m.state_dict()), 'config.json': config} for m in models]
    first = repository.commit(files[0])
    repository.commit(files[1])
    repository.commit(files[2], branch='v2')
    for revision, model in ((first, models[0]), ('main', models[1]), ('v2', models[2])):
        overlay = dict(hf_hub_id=f'owner/revisions@{revision}')
        assert_close(online.logits(NAME, pretrained_cfg_overlay=overlay, **SMALL), model(image()))
        assert_close(online.logits(f'hf-hub:owner/revisions@{revision}'), model(image()))
    with pytest.raises(RemoteError, match='(?s)RevisionNotFoundError.*v3'):
        online.logits(NAME, pretrained_cfg_overlay=dict(hf_hub_id='owner/revisions@v3'), **SMALL)


def test_unknown_repository_is_named(online):
    with pytest.raises(RemoteError, match='(?s)RepositoryNotFoundError.*owner/no_such_model'):
        online.logits('hf-hub:owner/no_such_model')


def test_other_number_of_classes(online):
    code = '''
model = timm.create_model(name, pretrained=True, num_classes=10, **small).eval()
result = model.forward_features(image()).tolist(), list(model(image()).shape)
'''
    features, shape = online.run(code, name=NAME, small=SMALL)
    assert_close(torch.tensor(features), make_model().forward_features(image()))
    assert shape == [1, 10]


def test_one_channel(online):
    """A grey image gives the outputs of its RGB version."""
    grey = image(1).expand(-1, 3, -1, -1)
    assert_close(online.logits(NAME, in_chans=1, **SMALL), make_model()(grey))


def test_four_channels(online):
    """timm repeats the filters (R, G, B, R) and scales them by 3/4, which equals mixing the image's channels."""
    x = image(4) * 3 / 4
    mixed = torch.stack([x[:, 0] + x[:, 3], x[:, 1], x[:, 2]], dim=1)
    assert_close(online.logits(NAME, in_chans=4, **SMALL), make_model()(mixed))


def test_features_only(online):
    code = '''
model = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 2), **small).eval()
result = [x.tolist() for x in model(image())]
'''
    features = [torch.tensor(x) for x in online.run(code, name=NAME, small=SMALL)]
    expected = make_model().forward_intermediates(image(), indices=(0, 2), intermediates_only=True)
    assert len(features) == 2
    for actual, wanted in zip(features, expected):
        assert_close(actual, wanted)


@pytest.mark.parametrize('num_classes', [1000, 10])
@pytest.mark.parametrize('damage,named', [
    ('missing', r'[Mm]issing.*blocks\.1\.1\.weight'),
    ('shape', r'size mismatch for blocks\.1\.1\.weight'),
    ('depth', r'[Mm]issing.*blocks\.2\.'),
    ('format', r"Not a known ConvMixer checkpoint.*'layer1\.weight'"),
])
def test_damage_is_named(damage, named, num_classes, hub, online):
    """Also with another head, for which timm loads non-strictly."""
    state_dict = make_model(depth=2 if damage == 'depth' else 3).state_dict()
    if damage == 'missing':
        del state_dict['blocks.1.1.weight']
    elif damage == 'shape':
        state_dict['blocks.1.1.weight'] = state_dict['blocks.1.1.weight'][:-1].clone()
    elif damage == 'format':
        state_dict = {'layer1.weight': torch.zeros(1)}
    hub.add_repo(f'owner/damaged_{damage}').commit({'model.safetensors': as_safetensors(state_dict)})
    overlay = dict(hf_hub_id=f'owner/damaged_{damage}')
    with pytest.raises(RemoteError, match=f'(?s){named}'):
        online.logits(NAME, pretrained_cfg_overlay=overlay, num_classes=num_classes, **SMALL)


def test_only_pytorch_model_bin(hub, online):
    model = make_model(seed=4)
    hub.add_repo('owner/only_bin').commit({'pytorch_model.bin': as_pickle(model.state_dict())})
    logits = online.logits(NAME, pretrained_cfg_overlay=dict(hf_hub_id='owner/only_bin'), **SMALL)
    assert_close(logits, model(image()))


def test_pickle_that_runs_code_is_refused(hub, online, tmp_path):
    marker = tmp_path / 'it ran'

    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    content = as_pickle({**make_model().state_dict(), 'extra': RunsCode()})
    hub.add_repo('owner/evil').commit({'pytorch_model.bin': content})
    with pytest.raises(RemoteError, match='weights_only=True blocked loading this checkpoint'):
        online.logits(NAME, pretrained_cfg_overlay=dict(hf_hub_id='owner/evil'), **SMALL)
    assert not marker.exists()


def test_nothing_to_load(hub, online):
    hub.add_repo('owner/empty')
    with pytest.raises(RemoteError, match='(?s)EntryNotFoundError.*owner/empty.*pytorch_model.bin'):
        online.logits(NAME, pretrained_cfg_overlay=dict(hf_hub_id='owner/empty'), **SMALL)


MODEL_ARGS = dict(kernel_size=6, patch_size=3, act_layer='silu', **SMALL)


def save(model: nn.Module, folder: Path, **kwargs) -> None:
    # Older versions of timm do not record model_args.
    save_for_hf(model, str(folder), model_args=MODEL_ARGS, **kwargs)


@pytest.mark.parametrize('safe_serialization', [True, False, 'both'])
def test_save_for_hf_and_load(safe_serialization, hub, online, tmp_path):
    """From the folder and from the Hub, with other architecture arguments and classes than the variant's."""
    model = make_model(num_classes=6, **MODEL_ARGS)
    save(model, tmp_path, safe_serialization=safe_serialization, model_config=dict(label_names=list('abcdef')))
    repo = f'owner/saved_{safe_serialization}'
    hub.add_repo(repo).commit({path.name: path.read_bytes() for path in tmp_path.iterdir()})

    code = '''
result = []
for name in names:
    model = timm.create_model(name, pretrained=True).eval()
    result.append((model(image()).tolist(), model.pretrained_cfg['label_names'], model.pretrained_cfg['architecture']))
'''
    for logits, label_names, architecture in online.run(code, names=[f'local-dir:{tmp_path}', f'hf-hub:{repo}']):
        assert_close(torch.tensor(logits), model(image()))
        assert (label_names, architecture) == (list('abcdef'), NAME)


def test_saved_model_adapts(tmp_path):
    """Load from a folder with another number of classes and channels."""
    model = make_model(num_classes=6, **MODEL_ARGS)
    save(model, tmp_path, safe_serialization=True)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3, in_chans=1).eval()
    grey = image(1)
    assert_close(other.forward_features(grey), model.forward_features(grey.expand(-1, 3, -1, -1)))
    assert other(grey).shape == (1, 3)


def test_local_dir_without_config_or_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='config.json'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    (tmp_path / 'config.json').write_bytes(as_config(model_args=SMALL))
    with pytest.raises(RuntimeError, match='No suitable checkpoints found'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_push_to_hf_hub_and_load(hub, online):
    code = '''
from support import randomize_norms
from timm.models import push_to_hf_hub
torch.manual_seed(seed)
model = randomize_norms(timm.create_model(name, num_classes=6, **model_args), seed).eval()
push_to_hf_hub(
    model, 'owner/pushed', token='hf_test', model_args=model_args,
    model_card=dict(license='mit', description='A ConvMixer.'))
result = model(image()).tolist()
'''
    path = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n'
    for seed in (1, 2):  # the second push finds an existing repository
        pushed = torch.tensor(online.run(path + code, name=NAME, model_args=MODEL_ARGS, seed=seed))
        files = hub.repos['owner/pushed'].files()
        assert set(files) == {'config.json', 'model.safetensors', 'pytorch_model.bin', 'README.md'}
        assert json.loads(files['config.json'])['architecture'] == NAME
        assert b'license: mit' in files['README.md']

        model = make_model(seed=seed, num_classes=6, **MODEL_ARGS)
        for state_dict in (
                safetensors.torch.load(files['model.safetensors']),
                torch.load(io.BytesIO(files['pytorch_model.bin']), weights_only=True),
        ):
            assert state_dict.keys() == model.state_dict().keys()
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in state_dict.items())
        assert_close(pushed, model(image()))
        assert_close(online.logits('hf-hub:owner/pushed'), model(image()))


def test_push_needs_a_token(hub, online):
    code = '''
from timm.models import push_to_hf_hub
push_to_hf_hub(timm.create_model(name, **small), 'owner/no_token')
'''
    with pytest.raises(RemoteError, match='401'):
        online.run(code, name=NAME, small=SMALL)
    assert 'owner/no_token' not in hub.repos


@pytest.fixture(scope='module')
def warm(hub, online):
    """Fill the shared cache with a registered name, a repository with a config, and one with only a pickle."""
    model = make_model(seed=5)
    config = as_config(model_args=SMALL)
    hub.add_repo('owner/warm').commit({'model.safetensors': as_safetensors(model.state_dict()), 'config.json': config})
    hub.add_repo('owner/warm_bin').commit({'pytorch_model.bin': as_pickle(model.state_dict()), 'config.json': config})
    online.logits(NAME, **SMALL)
    online.logits('hf-hub:owner/warm')
    online.logits('hf-hub:owner/warm_bin')
    return model


def test_offline_with_a_warm_cache(warm, hub, offline):
    start = len(hub.requests)
    assert_close(offline.logits(NAME, **SMALL), make_model()(image()))
    assert_close(offline.logits('hf-hub:owner/warm'), warm(image()))
    assert_close(offline.logits('hf-hub:owner/warm_bin'), warm(image()))
    assert len(hub.requests) == start


@pytest.mark.slow
def test_unreachable_server_with_a_warm_cache(warm, unreachable):
    assert_close(unreachable.logits(NAME, **SMALL), make_model()(image()))
    assert_close(unreachable.logits('hf-hub:owner/warm'), warm(image()))


@pytest.mark.parametrize('name', [NAME, 'hf-hub:owner/warm'])
def test_offline_with_a_cold_cache(name, warm, hub, offline, tmp_path):
    """The error says that the file is not cached, and names the variable that keeps the client offline."""
    start = len(hub.requests)
    with pytest.raises(RemoteError, match='(?s)LocalEntryNotFoundError.*cannot find the requested files') as error:
        offline.logits(name, cache_dir=str(tmp_path))
    assert 'HF_HUB_OFFLINE' in str(error.value)
    assert len(hub.requests) == start


def test_offline_needs_no_network_for_shapes_alone(offline, tmp_path):
    """Without pretrained weights there are no requests."""
    code = 'result = list(timm.create_model(name, cache_dir=cache_dir, **small)(image()).shape)'
    assert offline.run(code, name=NAME, cache_dir=str(tmp_path), small=SMALL) == [1, 1000]
