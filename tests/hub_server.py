"""A fake Hugging Face Hub: the part of its protocol that huggingface_hub uses for models.

It serves file metadata, downloads (with ranges, and a redirect to another origin for large files), repository and tree
information, and uploads (create-repo, preupload, LFS, commit). Repositories live in memory.

    with HubServer() as hub:
        hub.add_repo('timm/some_model').commit({'model.safetensors': data})
        environment = dict(HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET='1')

``hub.fault`` injects faults. It is called with every request and its reply, and returns the reply to send, or None to
close the connection.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ['HubServer', 'Reply', 'Repository', 'Request']

# Model files that the Hub's default .gitattributes puts into LFS.
_LFS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pt')


@dataclass
class Request:
    """A request; ``origin`` is ``'hub'``, or ``'storage'`` for large files."""
    origin: str
    method: str
    path: str
    query: Dict[str, List[str]]
    headers: Mapping[str, str]
    body: bytes = field(repr=False, default=b'')


@dataclass
class Reply:
    """A reply.

    Args:
        status: HTTP status.
        headers: Headers. The default Content-Length is the length of the body.
        body: Content, not sent for HEAD.
        cut_after: Number of bytes of the body after which to close the connection, None for all.
        halfway: Called after half of the body; the client waits until it returns.
    """
    status: int = 200
    headers: Dict[str, str] = field(default_factory=dict)
    body: bytes = field(repr=False, default=b'')
    cut_after: Optional[int] = None
    halfway: Optional[Callable[[], None]] = None


def _json(content: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(status, {'Content-Type': 'application/json', **headers}, json.dumps(content).encode())


def _error(status: int, code: str, message: str, **headers: str) -> Reply:
    return _json({'error': message}, status, **{'X-Error-Code': code, 'X-Error-Message': message}, **headers)


def _is_lfs(path: str) -> bool:
    return path.endswith(_LFS_SUFFIXES)


def _oid(path: str, content: bytes) -> str:
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Repository:
    """A model repository with commits and branches."""

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self.commits: Dict[str, Dict[str, bytes]] = {}
        self.branches: Dict[str, str] = {}
        self.commit({})

    def commit(self, files: Mapping[str, bytes], branch: str = 'main', delete: Iterable[str] = ()) -> str:
        """Commit files to a branch (a new one starts from ``main``) and return the commit's id."""
        parent = self.branches.get(branch) or self.branches.get('main')
        tree = {**self.commits.get(parent, {}), **files}
        for path in delete:
            del tree[path]
        identity = [self.repo_id, parent, len(self.commits), {path: _oid(path, tree[path]) for path in tree}]
        commit = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> Optional[str]:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = 'main') -> Dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubServer:
    """The Hub at ``endpoint``, and the storage of large files on another port, both on 127.0.0.1.

    Attributes:
        repos: Repositories by id, ``owner/name``.
        requests: All requests with the status of their replies, None for a closed connection.
        fault: Function of a request and its reply that returns the reply to send, or None for no faults.
    """

    def __init__(self):
        self.repos: Dict[str, Repository] = {}
        self.requests: List[Tuple[Request, Optional[int]]] = []
        self.fault: Optional[Callable[[Request, Reply], Optional[Reply]]] = None
        self._objects: Dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._servers = {}
        for origin in ('hub', 'storage'):
            server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
            server.daemon_threads = True
            server.hub, server.origin = self, origin
            threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
            self._servers[origin] = server

    def url(self, origin: str) -> str:
        return f'http://127.0.0.1:{self._servers[origin].server_port}'

    @property
    def endpoint(self) -> str:
        return self.url('hub')

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def __enter__(self) -> 'HubServer':
        return self

    def __exit__(self, *args) -> None:
        self.close()

    def add_repo(self, repo_id: str) -> Repository:
        self.repos[repo_id] = Repository(repo_id)
        return self.repos[repo_id]

    def sent(self, *methods: str, since: int = 0) -> List[str]:
        """Return the paths of requests with one of these methods, from number ``since`` on."""
        return [request.path for request, _ in self.requests[since:] if request.method in methods]

    def answer(self, request: Request) -> Reply:
        """Return the reply of a healthy Hub."""
        method = 'GET' if request.method == 'HEAD' else request.method
        for route_origin, route_method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and (route_origin, route_method) == (request.origin, method):
                with self._lock:
                    return handle(self, request, **{k: v and unquote(v) for k, v in match.groupdict().items()})
        return _error(404, 'NotFound', f'The stand-in has no {request.method} {request.path}.')

    def _find(self, repo: str, revision: str) -> Tuple[Optional[Repository], Optional[str], Optional[Reply]]:
        if repo not in self.repos:
            return None, None, _error(404, 'RepoNotFound', 'Repository not found')
        commit = self.repos[repo].resolve(revision)
        if commit is None:
            return None, None, _error(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return self.repos[repo], commit, None

    def _download(self, request: Request, repo: str, revision: str, path: str) -> Reply:
        repository, commit, error = self._find(repo, revision)
        if error:
            return error
        headers = {'X-Repo-Commit': commit}
        if path not in repository.commits[commit]:
            return _error(404, 'EntryNotFound', 'Entry not found', **headers)
        content = repository.commits[commit][path]
        oid = _oid(path, content)
        if not _is_lfs(path):
            return _ranged(request, Reply(headers={**headers, 'ETag': f'"{oid}"'}, body=content))
        self._objects[oid] = content
        return Reply(302, {
            **headers,
            'X-Linked-ETag': f'"{oid}"',
            'X-Linked-Size': str(len(content)),
            'Location': f'{self.url("storage")}/{oid}',
        })

    def _download_object(self, request: Request, oid: str) -> Reply:
        if oid not in self._objects:
            return Reply(404)
        return _ranged(request, Reply(headers={'ETag': f'"{oid}"'}, body=self._objects[oid]))

    def _upload_object(self, request: Request, oid: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != oid:
            return Reply(400)
        self._objects[oid] = request.body
        return Reply()

    def _info(self, request: Request, repo: str, revision: Optional[str] = None) -> Reply:
        repository, commit, error = self._find(repo, revision or 'main')
        siblings = [] if error else [{'rfilename': path} for path in sorted(repository.commits[commit])]
        return error or _json(dict(_id=repo, id=repo, modelId=repo, sha=commit, private=False, siblings=siblings))

    def _tree(self, request: Request, repo: str, revision: str, folder: Optional[str] = None) -> Reply:
        repository, commit, error = self._find(repo, revision)
        if error:
            return error
        entries = []
        for path, content in sorted(repository.commits[commit].items()):
            if folder and not path.startswith(f'{folder}/'):
                continue
            entry = dict(type='file', path=path, size=len(content), oid=_oid(path, content))
            if _is_lfs(path):
                entry['lfs'] = dict(oid=_oid(path, content), size=len(content), pointerSize=134)
            entries.append(entry)
        return _json(entries)

    def _create_repo(self, request: Request) -> Reply:
        content = json.loads(request.body)
        repo = f'{content.get("organization") or "user"}/{content["name"]}'
        answer = dict(url=f'{self.endpoint}/{repo}', name=repo, id=repo)
        if not request.headers.get('authorization'):
            return _error(401, 'Unauthorized', 'Invalid username or password.')
        if repo in self.repos:
            return _json({**answer, 'error': 'You already created this model repo'}, 409)
        self.add_repo(repo)
        return _json(answer)

    def _validate_yaml(self, request: Request) -> Reply:
        return _json(dict(errors=[], warnings=[]))

    def _preupload(self, request: Request, repo: str, revision: str) -> Reply:
        repository, commit, error = self._find(repo, revision)
        if error:
            return error
        files = []
        for path in (file['path'] for file in json.loads(request.body)['files']):
            info = dict(path=path, uploadMode='lfs' if _is_lfs(path) else 'regular', shouldIgnore=False)
            if path in repository.commits[commit]:
                info['oid'] = _oid(path, repository.commits[commit][path])
            files.append(info)
        return _json(dict(files=files))

    def _lfs_batch(self, request: Request, repo: str) -> Reply:
        objects = []
        for wanted in json.loads(request.body)['objects']:
            answer = dict(oid=wanted['oid'], size=wanted['size'])
            if wanted['oid'] not in self._objects:
                answer['actions'] = dict(upload=dict(href=f'{self.url("storage")}/{wanted["oid"]}'))
            objects.append(answer)
        return _json(dict(transfer='basic', objects=objects))

    def _commit(self, request: Request, repo: str, revision: str) -> Reply:
        repository, _, error = self._find(repo, revision)
        if error:
            return error
        if not request.headers.get('authorization'):
            return _error(401, 'Unauthorized', 'Invalid username or password.')
        files, delete = {}, []
        for line in request.body.splitlines():
            operation = json.loads(line)
            key, value = operation['key'], operation['value']
            if key == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                if value['oid'] not in self._objects:
                    return _error(400, 'BadRequest', f'{value["path"]} was committed but not uploaded.')
                files[value['path']] = self._objects[value['oid']]
            elif key == 'deletedFile':
                delete.append(value['path'])
            elif key != 'header':
                return _error(400, 'BadRequest', f'The stand-in knows no operation {key!r}.')
        commit = repository.commit(files, revision, delete)
        return _json(dict(success=True, commitOid=commit, commitUrl=f'{self.endpoint}/{repo}/commit/{commit}'))


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_REVISION = r'(?P<revision>[^/]+)'
_ROUTES = (
    ('hub', 'GET', rf'/api/models/{_REPO}(/revision/{_REVISION})?', HubServer._info),
    ('hub', 'GET', rf'/api/models/{_REPO}/tree/{_REVISION}(/(?P<folder>.+))?', HubServer._tree),
    ('hub', 'POST', r'/api/repos/create', HubServer._create_repo),
    ('hub', 'POST', r'/api/validate-yaml', HubServer._validate_yaml),
    ('hub', 'POST', rf'/api/models/{_REPO}/preupload/{_REVISION}', HubServer._preupload),
    ('hub', 'POST', rf'/api/models/{_REPO}/commit/{_REVISION}', HubServer._commit),
    ('hub', 'POST', rf'/{_REPO}\.git/info/lfs/objects/batch', HubServer._lfs_batch),
    ('hub', 'GET', rf'/{_REPO}/resolve/{_REVISION}/(?P<path>.+)', HubServer._download),
    ('storage', 'GET', r'/(?P<oid>[0-9a-f]{64})', HubServer._download_object),
    ('storage', 'PUT', r'/(?P<oid>[0-9a-f]{64})', HubServer._upload_object),
)


def _ranged(request: Request, reply: Reply) -> Reply:
    """Apply the request's Range header to the reply."""
    reply.headers['Accept-Ranges'] = 'bytes'
    wanted = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('range') or '')
    if not wanted:
        return reply
    size, start = len(reply.body), int(wanted[1])
    stop = min(int(wanted[2] or size) + 1, size)
    if start >= stop:
        return Reply(416, {**reply.headers, 'Content-Range': f'bytes */{size}'})
    return Reply(206, {**reply.headers, 'Content-Range': f'bytes {start}-{stop - 1}/{size}'}, reply.body[start:stop])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def _read_body(self) -> bytes:
        if self.headers.get('transfer-encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('content-length') or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b';')[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.server.origin, self.command, url.path, parse_qs(url.query), headers, self._read_body())
        reply = hub.answer(request)
        if hub.fault is not None:
            reply = hub.fault(request, reply)
        hub.requests.append((request, reply.status if reply else None))
        if reply is None:
            self._hang_up()
            return
        self.send_response(reply.status)
        for name, value in {'Content-Length': str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == 'HEAD':
            return
        body = reply.body[:reply.cut_after]
        try:
            if reply.halfway is not None:
                self.wfile.write(body[:len(body) // 2])
                reply.halfway()
                body = body[len(body) // 2:]
            self.wfile.write(body)
        except ConnectionError:  # the client closed the connection
            self.close_connection = True
            return
        if reply.cut_after is not None or len(reply.body) < int(reply.headers.get('Content-Length', 0)):
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args) -> None:
        """Log nothing: see ``HubServer.requests``."""
