"""The fake Hub over plain HTTP: replies that the client does not show, and fault injection."""
import dataclasses
import http.client
import json
import urllib.error
import urllib.request

import pytest

from hub_server import HubServer, Reply

CONTENT = bytes(range(256)) * 400
FILE = '/owner/model/resolve/main/model.safetensors'


@pytest.fixture
def hub():
    with HubServer() as server:
        server.add_repo('owner/model').commit({'model.safetensors': CONTENT, 'config.json': b'{}'})
        yield server


def fetch(hub: HubServer, path: str, method: str = 'GET', **headers):
    """Return status, headers and body, also of error replies, after redirects."""
    request = urllib.request.Request(hub.endpoint + path, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def test_files(hub):
    assert fetch(hub, FILE)[2] == CONTENT
    status, headers, body = fetch(hub, '/owner/model/resolve/main/config.json', 'HEAD')
    assert (status, headers['Content-Length'], body) == (200, '2', b'')
    assert headers['X-Repo-Commit'] == hub.repos['owner/model'].resolve('main')
    assert hub.sent('HEAD') == ['/owner/model/resolve/main/config.json']


@pytest.mark.parametrize('asked,start,stop', [('0-9', 0, 10), ('100000-', 100000, 102400), ('5-999999', 5, 102400)])
def test_ranges(asked, start, stop, hub):
    status, headers, body = fetch(hub, FILE, Range=f'bytes={asked}')
    assert (status, body) == (206, CONTENT[start:stop])
    assert headers['Content-Range'] == f'bytes {start}-{stop - 1}/{len(CONTENT)}'


def test_range_past_the_end(hub):
    assert fetch(hub, FILE, Range='bytes=102400-')[0] == 416


@pytest.mark.parametrize('path,code', [
    ('/owner/model/resolve/main/no_file', 'EntryNotFound'),
    ('/owner/model/resolve/no_revision/config.json', 'RevisionNotFound'),
    ('/owner/no_repo/resolve/main/config.json', 'RepoNotFound'),
    ('/api/models/owner/no_repo', 'RepoNotFound'),
    ('/api/models/owner/model/revision/no_revision', 'RevisionNotFound'),
])
def test_what_is_not_there(path, code, hub):
    status, headers, _ = fetch(hub, path)
    assert (status, headers['X-Error-Code']) == (404, code)


def test_information(hub):
    info = json.loads(fetch(hub, '/api/models/owner/model/revision/main')[2])
    assert info == json.loads(fetch(hub, '/api/models/owner/model')[2])
    assert [sibling['rfilename'] for sibling in info['siblings']] == ['config.json', 'model.safetensors']
    tree = json.loads(fetch(hub, f'/api/models/owner/model/tree/{info["sha"]}')[2])
    assert [(file['path'], file['size'], 'lfs' in file) for file in tree] == [
        ('config.json', 2, False),
        ('model.safetensors', len(CONTENT), True),
    ]


def test_fault_replaces_the_reply(hub):
    hub.fault = lambda request, reply: Reply(503, {'Retry-After': '1'})
    assert fetch(hub, FILE)[0] == 503
    hub.fault = lambda request, reply: reply
    assert fetch(hub, FILE)[0] == 200


def test_fault_corrupts_the_body(hub):
    hub.fault = lambda request, reply: dataclasses.replace(reply, body=bytes(len(reply.body)))
    assert fetch(hub, FILE)[2] == bytes(len(CONTENT))


@pytest.mark.parametrize('change,sent', [
    (dict(cut_after=1000), 1000),
    (dict(headers={'Content-Length': str(len(CONTENT) + 5)}), len(CONTENT)),
], ids=['cut', 'said to be longer'])
def test_fault_hangs_up_early(change, sent, hub):
    hub.fault = lambda request, reply: dataclasses.replace(reply, **change) if request.origin == 'storage' else reply
    with pytest.raises(http.client.IncompleteRead) as error:
        fetch(hub, FILE)
    assert error.value.partial == CONTENT[:sent]


def test_fault_hangs_up_at_once(hub):
    hub.fault = lambda request, reply: None
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        fetch(hub, FILE)
    assert [status for _, status in hub.requests] == [None]
