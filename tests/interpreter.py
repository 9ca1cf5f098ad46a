"""A fresh Python interpreter that runs code for tests.

Use it where a process must start clean: for environment variables that are read on import, or modules that must not be
imported yet. Many tests share one interpreter, and so the cost of ``import torch``.
"""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Mapping, Optional

__all__ = ['Interpreter', 'RemoteError']

_LOOP = '''
import json, os, sys, traceback
replies = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # what libraries print must not mix with the replies
for line in sys.stdin:
    namespace = {'__name__': '__main__'}
    try:
        exec(json.loads(line), namespace)
        reply = {'result': namespace.get('result')}
    except BaseException as error:
        traceback.print_exc()
        reply = {'error': ''}
        while error is not None:
            reply['error'] += ''.join(traceback.format_exception_only(type(error), error))
            error = error.__cause__
    replies.write(json.dumps(reply) + '\\n')
    replies.flush()
os._exit(0)  # torch takes seconds to leave the ordinary way
'''


class RemoteError(Exception):
    """An exception raised in the interpreter, with its causes, one line ``Type: message`` each."""


class Interpreter:
    """Starts ``sys.executable`` with this repository first on its path.

    Args:
        env: Changes to the current environment; None unsets a variable.
        log: File for stdout and stderr of the interpreter.
    """

    def __init__(self, env: Mapping[str, Optional[str]], log: Path):
        root = Path(__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
        env = {**os.environ, 'PYTHONPATH': path, **env}
        self.log = log
        self._log = open(log, 'w')
        self._process = subprocess.Popen(
            [sys.executable, '-c', _LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={name: value for name, value in env.items() if value is not None},
        )

    def run(self, code: str) -> Any:
        """Run code in a new namespace and return its ``result``, which must be JSON-serializable.

        Raises:
            RemoteError: If the code raised an exception.
        """
        self._process.stdin.write(json.dumps(textwrap.dedent(code)) + '\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'The interpreter died, see {self._log.name}.')
        reply = json.loads(line)
        if 'error' in reply:
            raise RemoteError(reply['error'])
        return reply['result']

    def kill(self) -> None:
        """Kill the interpreter; a :meth:`run` in progress raises RuntimeError."""
        self._process.kill()

    def close(self) -> None:
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died with unread input
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> 'Interpreter':
        return self

    def __exit__(self, *args) -> None:
        self.close()
