"""Concurrency: threads that share a model, and process pools (fork, spawn, forkserver)."""
import json
import multiprocessing
import subprocess
import sys
import textwrap

import pytest

from interpreter import Interpreter
from support import child_env

# A process of its own, so that the first calls, which register operators, are made by the threads.
SETUP = '''
import copy, sys, threading
import timm, torch
import timm_convmixer
from timm.utils.model import reparameterize_model
from timm_convmixer import routes

torch.set_num_threads(1)
routes.SMALLEST_MAP = 0

def create(form, kernel_size=7):
    torch.manual_seed(0)
    model = timm.create_model('test_convmixer', dim=24, kernel_size=kernel_size).eval()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    return reparameterize_model(model) if form == 'inference form' else model

def images(seed):
    return torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(seed))

def in_threads(count, work):
    results, barrier = [None] * count, threading.Barrier(count)
    def run(index):
        barrier.wait()
        try:
            results[index] = work(index)
        except BaseException as error:
            results[index] = error
    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [result for result in results if isinstance(result, BaseException)]
    if failed:
        raise failed[0]
    return results
'''


@pytest.fixture(scope='module')
def interpreter(tmp_path_factory):
    with Interpreter(dict(OMP_NUM_THREADS='1'), log=tmp_path_factory.mktemp('load') / 'log') as interpreter:
        yield interpreter


@pytest.mark.parametrize('form', ['model', 'inference form'])
def test_threads_give_what_one_gives(form, interpreter):
    """8 threads call one model that was never called before, with and without gradients of the images."""
    mismatches = interpreter.run(SETUP + f'form = {form!r}\n' + textwrap.dedent('''
        model = create(form)

        def infer(seed):
            with torch.no_grad():
                return model(images(seed))

        def differentiate(seed):
            x = images(seed).requires_grad_()
            return torch.autograd.grad(model(x).square().sum(), x)[0]

        def work(index):
            return [call(seed) for seed in range(index, index + 6) for call in (infer, differentiate)]

        together = in_threads(8, work)
        alone = [work(index) for index in range(8)]
        with torch.no_grad():
            assert model.route(images(0)).name == 'inference'
        if form == 'model':
            assert model.route(images(0)).name == 'training'
        result = [
            (thread, call) for thread in range(8) for call in range(12)
            if not torch.equal(together[thread][call], alone[thread][call])]
    '''))
    assert mismatches == []


def test_threads_train_models_of_their_own(interpreter):
    """The fast backward pass keeps no state between calls."""
    mismatches = interpreter.run(SETUP + textwrap.dedent('''
        # Created before the threads start, which share one random generator.
        models = [create('model', kernel_size=5 + index % 4).train() for index in range(8)]

        def work(index, model=None):
            model = model or models[index]
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for seed in range(3):
                model(images(seed)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        copies = copy.deepcopy(models)
        together = in_threads(8, work)
        alone = [work(index, copies[index]) for index in range(8)]
        assert all(model.route(images(0)).name == 'training' for model in models)
        result = [index for index in range(8) if not torch.equal(together[index], alone[index])]
    '''))
    assert mismatches == []


def test_threads_create_models_at_once(interpreter):
    """With the weights in the package."""
    same = interpreter.run(SETUP + textwrap.dedent('''
        def work(index):
            return timm.create_model('test_convmixer', pretrained=True).state_dict()
        states = in_threads(8, work)
        result = [all(torch.equal(value, states[0][key]) for key, value in state.items()) for state in states]
    '''))
    assert same == [True] * 8


POOL = '''
import json, multiprocessing, os, sys
import timm, torch
import timm_convmixer
from timm.utils.model import reparameterize_model
from timm_convmixer import routes

torch.set_num_threads(1)
routes.SMALLEST_MAP = 0

def outputs(seed):
    # A worker starts from what fork left it, or from the import of this module alone.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model('test_convmixer.digits', pretrained=True).eval()
    assert type(model) is timm_convmixer.ConvMixer
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    results = []
    for form in (model, reparameterize_model(model)):
        with torch.no_grad():
            results.append(form(x).tolist())
    y = x.clone().requires_grad_()
    assert model.route(y).name == 'training'
    results.append(torch.autograd.grad(model(y).sum(), y)[0].sum(dim=(2, 3)).tolist())
    return results

if __name__ == '__main__':
    together = {}
    for method in sys.argv[1:]:
        if method != 'fork':
            alone = [outputs(seed) for seed in range(6)]
        with multiprocessing.get_context(method.split()[0]).Pool(2) as pool:
            together[method] = pool.map(outputs, range(6), chunksize=1)
    print(json.dumps({method: results == alone for method, results in together.items()}), flush=True)
    os._exit(0)  # torch takes seconds to leave the ordinary way
'''


@pytest.mark.parametrize('methods', [
    ['fork', 'fork once used'],
    pytest.param(['spawn', 'forkserver'], marks=pytest.mark.slow),  # each worker imports timm
], ids=' '.join)
def test_process_pools_give_what_one_process_gives(methods, tmp_path):
    """Workers forked after the import or after using the model, and spawned workers."""
    known = multiprocessing.get_all_start_methods()
    if not {method.split()[0] for method in methods} <= set(known):
        pytest.skip(f'no {" or ".join(methods)} here')
    script = tmp_path / 'pool.py'
    script.write_text(POOL)
    result = subprocess.run(
        [sys.executable, str(script), *methods],
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1]) == dict.fromkeys(methods, True)
