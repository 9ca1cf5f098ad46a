import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from timm_convmixer import kernels
from timm_convmixer.kernels import depthwise_launch, depthwise_training, pointwise, support, tuning

ROOT = Path(__file__).parent.parent


def run_python(*arguments, **environment):
    """A Python process that imports this checkout, with other environment variables."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': path, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )


def make_inputs(dtype=torch.float32, kernel=5, batch=2, channels=3, size=8):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size, dtype=dtype)
    depthwise_weight = torch.randn(channels, 1, kernel, kernel, dtype=dtype)
    pointwise_weight = torch.randn(channels + 2, channels, 1, 1, dtype=dtype)
    bias, scale, shift = torch.randn(3, channels, dtype=dtype)
    wide = torch.randn(3, channels + 2, dtype=dtype)
    return (x, depthwise_weight, bias, scale, shift), (x, pointwise_weight, *wide)


@pytest.mark.skipif(not support.TRITON_PRESENT, reason='Triton 3.4 or newer is not installed')
@pytest.mark.parametrize('file', ['kernel_grid.py', 'training_grid.py', 'block_grid.py'])
def test_grid(file):
    """The whole of a grid: on the GPU, or under the interpreter where there is none."""
    environment = {} if torch.cuda.is_available() else {'TRITON_INTERPRET': '1'}
    result = run_python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'tests/{file}', **environment)
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    assert ' passed' in result.stdout


@pytest.mark.parametrize('act', ['gelu', 'relu', 'none'])
@pytest.mark.parametrize('kernel', [1, 4, 5])
def test_references_are_the_definition(kernel, act):
    activation = {'gelu': F.gelu, 'relu': F.relu, 'none': lambda x: x}[act]
    (x, weight, bias, scale, shift), wide = make_inputs(torch.float64, kernel)
    conv = torch.nn.Conv2d(3, 3, kernel, padding='same', groups=3).double()
    conv.weight.data, conv.bias.data = weight, bias
    expected = x + scale[:, None, None] * activation(conv(x)) + shift[:, None, None]
    torch.testing.assert_close(kernels.depthwise_mixing_ref(x, weight, bias, scale, shift, act), expected)
    torch.testing.assert_close(kernels.depthwise_mixing(x, weight, bias, scale, shift, act), expected)

    x, weight, bias, scale, shift = wide
    mixed = torch.einsum('bchw,oc->bohw', x, weight[:, :, 0, 0]) + bias[:, None, None]
    expected = scale[:, None, None] * activation(mixed) + shift[:, None, None]
    torch.testing.assert_close(kernels.pointwise_mixing_ref(x, weight, bias, scale, shift, act), expected)
    torch.testing.assert_close(kernels.pointwise_mixing(x, weight, bias, scale, shift, act), expected)


@pytest.mark.parametrize('act', ['gelu', 'none'])
@pytest.mark.parametrize('kernel', [3, 4])
def test_gradcheck_of_the_operators(kernel, act):
    narrow, wide = make_inputs(torch.float64, kernel, batch=1, channels=2, size=4)
    for operator, inputs in (
            (torch.ops.timm_convmixer.depthwise_mixing, narrow),
            (torch.ops.timm_convmixer.pointwise_mixing, wide),
    ):
        inputs = [t.clone().requires_grad_() for t in inputs]
        assert torch.autograd.gradcheck(lambda *args: operator(*args, act), inputs)
        assert torch.autograd.gradgradcheck(lambda *args: operator(*args, act), inputs)


def test_opcheck_on_the_cpu():
    narrow, wide = make_inputs()
    for operator, inputs in (
            (torch.ops.timm_convmixer.depthwise_mixing.default, narrow),
            (torch.ops.timm_convmixer.pointwise_mixing.default, wide),
    ):
        torch.library.opcheck(operator, (*inputs, 'gelu'))
        torch.library.opcheck(operator, (*[t.clone().requires_grad_() for t in inputs], 'relu'))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_fallback_is_the_reference_in_its_layout(memory_format):
    narrow, wide = make_inputs()
    for function, ref, (x, *rest) in (
            (kernels.depthwise_mixing, kernels.depthwise_mixing_ref, narrow),
            (kernels.pointwise_mixing, kernels.pointwise_mixing_ref, wide),
    ):
        x = x.contiguous(memory_format=memory_format)
        out = function(x, *rest)
        assert torch.equal(out, ref(x, *rest)) and out.is_contiguous(memory_format=memory_format)


def test_fallback_compiles_exports_and_scripts():
    narrow, wide = make_inputs()
    for function, ref, inputs in (
            (kernels.depthwise_mixing, kernels.depthwise_mixing_ref, narrow),
            (kernels.pointwise_mixing, kernels.pointwise_mixing_ref, wide),
    ):
        expected = ref(*inputs, 'gelu')
        compiled = torch.compile(function, fullgraph=True, backend='aot_eager')
        torch.testing.assert_close(compiled(*inputs, 'gelu'), expected)
        torch.testing.assert_close(torch.jit.script(ref)(*inputs, 'gelu'), expected)


def test_autocast_on_the_cpu_is_that_of_conv2d():
    narrow, wide = make_inputs()
    with torch.autocast('cpu', torch.bfloat16):
        assert kernels.depthwise_mixing(*narrow).dtype == torch.bfloat16
        assert kernels.pointwise_mixing(*wide).dtype == torch.bfloat16


@pytest.mark.parametrize('change,message', [
    (dict(act='swish'), r"act must be one of \('gelu', 'relu', 'none'\), got 'swish'"),
    (dict(scale=torch.ones(4)), r'scale must have shape \(3,\).*got \(4,\)'),
    (dict(shift=torch.ones(3, 1)), r'shift must have shape \(3,\).*got \(3, 1\)'),
    (dict(bias=torch.ones(1)), r'bias must have shape \(3,\).*got \(1,\)'),
])
def test_bad_arguments_are_named(change, message):
    x, weight, bias, scale, shift = make_inputs()[0]
    arguments = {**dict(x=x, weight=weight, bias=bias, scale=scale, shift=shift, act='gelu'), **change}
    with pytest.raises(ValueError, match=message):
        kernels.depthwise_mixing(**arguments)
    arguments['weight'] = torch.randn(3, 3, 1, 1)
    with pytest.raises(ValueError, match=message):
        kernels.pointwise_mixing(**arguments)


def test_support_says_why():
    narrow, wide = make_inputs()
    for answer in (kernels.depthwise_mixing_support(*narrow), kernels.pointwise_mixing_support(*wide)):
        assert not answer
        assert ('not a CUDA tensor' if support.TRITON_PRESENT else 'not installed') in answer.reason
        assert '(2, 3, 8, 8)' in answer.reason and 'torch.float32' in answer.reason and 'cpu' in answer.reason
    kernels.set_fused(False)
    try:
        assert 'TIMM_CONVMIXER_FUSED=0' in kernels.depthwise_mixing_support(*narrow).reason
    finally:
        kernels.set_fused(True)


def test_environment_variables():
    script = 'from timm_convmixer import kernels; print(kernels.use_fused(), kernels.use_autotune())'
    assert run_python('-c', script, TIMM_CONVMIXER_FUSED='0').stdout.split() == ['False', 'False']
    assert run_python('-c', script, TIMM_CONVMIXER_AUTOTUNE='1').stdout.split() == ['True', 'True']
    assert run_python('-c', script, TIMM_CONVMIXER_FUSED='').stdout.split() == ['True', 'False']


def test_kernels_are_imported_only_when_needed():
    script = '''
import sys, torch
from timm_convmixer import kernels
x, w, v = torch.randn(1, 3, 4, 4), torch.randn(3, 1, 3, 3), torch.ones(3)
kernels.depthwise_mixing(x, w, v, v, v)
print([name for name in sys.modules if name.startswith('timm_convmixer.') and name.endswith('_triton')])
print('timm' in sys.modules)
'''
    assert run_python('-c', script).stdout.split() == ['[]', 'False']


def test_works_without_triton():
    script = '''
import importlib.machinery
find_spec = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.split('.')[0] == 'triton' else find_spec(name, *args))
import torch
from timm_convmixer import kernels
x, w, v = torch.randn(1, 3, 4, 4), torch.randn(3, 1, 3, 3), torch.ones(3)
assert torch.equal(kernels.depthwise_mixing(x, w, v, v, v), kernels.depthwise_mixing_ref(x, w, v, v, v))
print(kernels.depthwise_mixing_support(x, w, v, v, v).reason)
'''
    result = run_python('-W', 'error', '-c', script)
    assert 'Triton 3.4 or newer is not installed' in result.stdout, result.stderr
    assert 'Triton' not in result.stderr


@pytest.mark.skipif(not support.TRITON_PRESENT, reason='Triton 3.4 or newer is not installed')
def test_default_configurations_fit_every_shape():
    for shared_memory in (232448, 101376):
        for itemsize in (2, 4):
            for kernel in range(1, 10):
                for width in (1, 4, 7, 8, 14, 16, 28, 32, 33, 56, 64):
                    problem = 256, 768, width, width, kernel, itemsize
                    for config in depthwise_launch.candidates(*problem, 132, shared_memory):
                        assert config.group * width <= depthwise_launch.block_k(width, config.group) <= 64
                        assert config.block_m >= 16 and config.steps >= 1
                    for config in depthwise_training.weight_gradient_candidates(*problem, 'tf32', 132, shared_memory):
                        assert config.group * width <= depthwise_launch.block_k(width, config.group) <= 64
                        assert config.block_m >= 16 and config.steps >= 1
            for positions in (1, 49, 256, 1024):
                assert pointwise.candidates(1, 768, positions, itemsize, 'tf32', 132, shared_memory)
    # The models of the benchmark, 224 pixels, batch 256, on an H200, all have a banded configuration.
    for channels, size, kernel in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9)):
        assert depthwise_launch.candidates(256, channels, size, size, kernel, 2, 132, 232448)
        assert depthwise_training.weight_gradient_candidates(
            256, channels, size, size, kernel, 2, 'tf32', 132, 232448)


class Problem:
    """A stand-in for a kernel whose launches take known times."""

    def __init__(self, times):
        self.times, self.launched = times, []

    def run(self, config):
        self.launched.append(config)
        if self.times[config] is None:
            raise RuntimeError('out of resources')

    def measure(self, run):
        run()
        return self.times[self.launched[-1]]


@pytest.fixture
def autotune(monkeypatch):
    monkeypatch.setattr(tuning, '_AUTOTUNE', 1)
    monkeypatch.setattr(tuning, 'INTERPRETED', False)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    tuning.clear_autotune_cache()
    yield
    tuning.clear_autotune_cache()


def test_autotune_measures_once_and_skips_what_does_not_run(autotune):
    problem = Problem({'a': 3.0, 'b': None, 'c': 1.0})
    x = torch.zeros(1)
    for _ in range(2):
        assert tuning.choose('key', ['a', 'b', 'c'], problem.run, x, problem.measure) == 'c'
    assert problem.launched == ['a', 'b', 'c']
    assert tuning.choose('other', ['b'], problem.run, x, problem.measure) == 'b'


def test_autotune_off_traced_or_capturing_takes_the_default(autotune, monkeypatch):
    problem = Problem({'a': 3.0, 'c': 1.0})

    def choose(x=None):
        x = torch.zeros(1) if x is None else x
        return tuning.choose('key', ['a', 'c'], problem.run, x, problem.measure)

    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        assert choose(torch.zeros(1)) == 'a'
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert choose() == 'a'
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    tuning.set_autotune(False)
    assert choose() == 'a'
    assert problem.launched == []


def test_batch_buckets():
    assert [tuning.batch_bucket(n) for n in (1, 2, 3, 64, 65, 256)] == [1, 2, 4, 64, 128, 256]


# Traces a block on CUDA tensors that hold no data, as torch.compile would, for a device of compute capability 9.0.
TRACE = '''
import torch, triton
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from timm_convmixer import kernels
from timm_convmixer.kernels import depthwise, depthwise_launch, depthwise_training, pointwise

class Driver:
    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

triton.runtime.driver.set_active(Driver())
for module in (depthwise, depthwise_launch, depthwise_training, pointwise):
    module.device_refusal, module.device_limits = lambda device: '', lambda device: (132, 232448)

class Block(torch.nn.Module):
    def forward(self, x, w, p, v):
        x = kernels.depthwise_mixing(x, w, v, v, v, 'gelu')
        return (kernels.pointwise_mixing(x, p, v, v, v, 'gelu'),)

with FakeTensorMode():
    new = lambda *shape: torch.empty(shape, device='cuda', dtype=torch.bfloat16)
    graph, _ = aot_export_module(
        Block(), (new(48, 64, 32, 32), new(64, 1, 9, 9), new(64, 64, 1, 1), new(64)), trace_joint=False)
calls = [node for node in graph.graph.nodes if 'triton_kernel_wrapper' in str(node.target)]
print([node.kwargs['tensors_to_clone'] for node in calls])
'''


@pytest.mark.skipif(not support.TRITON_PRESENT or not hasattr(torch.library, 'triton_op'), reason='no triton_op')
def test_torch_compile_sees_kernels_that_write_only_their_output():
    result = run_python('-c', TRACE, TRITON_INTERPRET='0')
    # A kernel that PyTorch could not analyse would count as writing all its inputs, and each of them would be copied.
    assert result.stdout.strip().endswith("[['out_ptr'], ['out_ptr']]"), result.stdout + result.stderr[-5000:]


@pytest.mark.skipif(not support.TRITON_PRESENT, reason='Triton 3.4 or newer is not installed')
def test_kernels_compile_for_hopper():
    result = run_python('benchmarks/compile_kernels.py', '--quick', TRITON_INTERPRET='0')
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]


def test_benchmark_script_runs():
    result = run_python('benchmarks/kernels.py', '--quick', '--device', 'cpu', '--only', 'ceilings', 'eager')
    assert result.returncode == 0, result.stdout + result.stderr[-5000:]
    assert 'timm, eager, channels_last' in result.stdout and 'left out: nothing' in result.stdout
    assert ' failed' not in result.stdout
