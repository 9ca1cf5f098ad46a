"""An interpreter that does slow imports once and runs each piece of code in a fork.

Each piece sees a fresh process after these imports, at a hundredth of the cost. interpreter.py has a process that keeps
its state instead.
"""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Dict

__all__ = ['AVAILABLE', 'Forks']

AVAILABLE = hasattr(os, 'fork')

_LOOP = '''
import json, os, sys, traceback
for line in sys.stdin:
    code, *outputs = json.loads(line)
    process = os.fork()
    if not process:
        for number, output in enumerate(outputs, start=1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec(code, dict(globals()))
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # torch takes seconds to leave the ordinary way
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
os._exit(0)
'''


class Forks:
    """Starts ``sys.executable``.

    Args:
        imports: Code to run once, before the forks.
        folder: Folder for the logs.
        flags: Flags of the interpreter.
        env: The environment.
        cwd: Initial working directory of each piece of code.
    """

    def __init__(self, imports: str, folder: Path, *flags: str, env: Dict[str, str], cwd: Path):
        self._folder, self._calls = folder, 0
        self._log = folder / 'forks.log'
        self._command = [sys.executable, *flags, '-c', textwrap.dedent(imports) + _LOOP]
        with self._log.open('w') as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env, cwd=cwd)

    def run(self, code: str) -> subprocess.CompletedProcess:
        """Run code and wait for it. Standard error begins with that of the imports."""
        self._calls += 1
        outputs = [self._folder / f'{self._calls}.{name}' for name in ('stdout', 'stderr')]
        self._process.stdin.write(json.dumps([textwrap.dedent(code), *map(str, outputs)]) + '\n')
        self._process.stdin.flush()
        status = self._process.stdout.readline()
        assert status, self._log.read_text()
        stdout, stderr = (output.read_text() for output in outputs)
        return subprocess.CompletedProcess(self._command, int(status), stdout, self._log.read_text() + stderr)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def __enter__(self) -> 'Forks':
        return self

    def __exit__(self, *args) -> None:
        self.close()
