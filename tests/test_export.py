"""The trained model and its inference form: exported, compiled, traced, and in ONNX Runtime.

test_readme.py tests backends that need a C++ compiler (torch.compile's default, AOTInductor). Even kernels, which need
asymmetric padding, are the trained kernels padded with zeros.
"""
import copy
import io

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils.model import reparameterize_model
from timm.utils.onnx import onnx_export
from torch.export import Dim

from support import assert_close, pairwise
from timm_convmixer.inference_form import FusedConvMixerBlock

# (B, H, W) to export for, and to run: also batches of one, and sizes that no patch divides.
SIZE = (2, 32, 36)
SIZES = [SIZE, (1, 32, 32), (5, 40, 36), (3, 64, 61)]
# PyTorch specializes sizes of one, so a feature map of height one cannot be dynamic.
DYNAMIC = {0: Dim('batch'), 2: Dim('height', min=8, max=1024), 3: Dim('width', min=8, max=1024)}
FORMS = ['plain', 'fused']


def create(form: str, **kwargs) -> nn.Module:
    model = timm.create_model('test_convmixer.digits', pretrained=True, **kwargs).eval()
    return reparameterize_model(model) if form == 'fused' else model


def images(size, seed: int = 0) -> torch.Tensor:
    batch, height, width = size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same(run, model: nn.Module, sizes=SIZES) -> None:
    for size in sizes:
        assert_close(run(images(size)), model(images(size)))


@pytest.mark.parametrize('kernel_size', [5, 8])
@pytest.mark.parametrize('form', FORMS)
def test_export(form, kernel_size):
    model = create(form, kernel_size=kernel_size)
    program = torch.export.export(model, (images(SIZE),), dynamic_shapes=(DYNAMIC,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module(), model)


@pytest.mark.parametrize('form,training', [('plain', False), ('plain', True), ('fused', False)])
def test_compiles_once_for_all_sizes(form, training):
    model = create(form).train(training)
    compiled_sizes = []

    def backend(graph, example_inputs):
        compiled_sizes.append(example_inputs)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(training):
        for size in [SIZE, (5, 40, 36), (3, 64, 61), (4, 24, 60)]:
            output = compiled(images(size))
            if not training:
                assert_close(output, model(images(size)))
    assert len(compiled_sizes) == 1


@pytest.mark.filterwarnings('ignore:.*torch.jit:Warning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('how,form,kernel_size', pairwise(['script', 'trace'], FORMS, [5, 8]))
def test_torchscript(how, form, kernel_size):
    model = create(form, kernel_size=kernel_size)
    module = torch.jit.script(model) if how == 'script' else torch.jit.trace(model, images(SIZE))
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    assert_same(torch.jit.load(file), model)


@pytest.mark.parametrize('kernel_size', [5, 8])
@pytest.mark.parametrize('form', FORMS)
def test_fx(form, kernel_size):
    model = create(form, kernel_size=kernel_size)
    graph = torch.fx.symbolic_trace(model)
    assert_same(graph, model)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert_same(graph, model)


def onnx_runtime(path):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


# timm's exporter fixes the image size but not the batch size.
FIXED_SIZES = [(batch, *SIZE[1:]) for batch in (2, 5)]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dynamic,form,kernel_size', pairwise([False, True], FORMS, [5, 8]))
def test_onnx_by_timm(dynamic, form, kernel_size, tmp_path):
    pytest.importorskip('onnx')
    model = create(form, kernel_size=kernel_size)
    path = tmp_path / 'model.onnx'
    onnx_export(model, str(path), example_input=images(SIZE), dynamic_size=dynamic)
    assert_same(onnx_runtime(path), model, sizes=SIZES if dynamic else FIXED_SIZES)


@pytest.mark.parametrize('kernel_size', [5, 8])
def test_both_forms_are_exported_as_the_same_operators(kernel_size, tmp_path):
    """The affines of the inference form must not cost a runtime more than BatchNorms."""
    onnx = pytest.importorskip('onnx')
    operators = []
    for name in FORMS:
        path = tmp_path / f'{name}.onnx'
        onnx_export(create(name, kernel_size=kernel_size), str(path), example_input=images(SIZE))
        operators.append([node.op_type for node in onnx.load(str(path)).graph.node if node.op_type != 'Constant'])
    assert operators[0].count('BatchNormalization') > 4
    assert operators[0] == operators[1]


@pytest.mark.skipif(not hasattr(torch.compiler, 'is_exporting'), reason='needs PyTorch 2.7')
@pytest.mark.parametrize('kernel_size', [5, 8])
def test_torch_export_gives_both_forms_the_same_operators(kernel_size):
    """Runtimes take a batch normalisation whole if its statistics are stored, not computed in the graph."""
    operators = []
    for form in FORMS:
        program = torch.export.export(create(form, kernel_size=kernel_size), (images(SIZE),)).run_decompositions({})
        # Without overloads, by which PyTorch tells padding='same' from numbers.
        operators.append([
            str(getattr(node.target, 'overloadpacket', node.target)) for node in program.graph.nodes
            if node.op == 'call_function'])
    assert sum('batch_norm' in operator for operator in operators[0]) == 9
    assert operators[0] == operators[1]


@pytest.mark.filterwarnings('ignore:.*torch.jit:Warning')
def test_a_trace_has_both_forms_as_the_same_operators():
    """Core ML and OpenVINO take a trace, and Core ML knows no ``addcmul``."""
    plain, fused = (
        [node.kind() for node in torch.jit.trace(create(form), images(SIZE)).inlined_graph.nodes()
         if node.kind().startswith('aten::')]
        for form in FORMS)
    assert plain.count('aten::batch_norm') == 9
    assert [kind.replace('_convolution_mode', '_convolution') for kind in plain] == fused


@torch.no_grad()
@pytest.mark.parametrize('fill', [float('nan'), None])
def test_exports_what_was_loaded(fill):
    """What an export takes and the state dict leaves out is right on any device and after any way of loading."""
    model = create('fused')
    other = copy.deepcopy(model).to('meta')
    if fill is not None:
        other.to_empty(device='cpu')
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(fill)
    other.load_state_dict(model.state_dict(), assign=fill is None)
    assert_same(torch.export.export(other, (images(SIZE),)).module(), model, sizes=[SIZE])


# Exporting takes seconds, so the two ways share the combinations.
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form,kernel_size', [pytest.param('plain', 5, marks=pytest.mark.slow), ('fused', 8)])
def test_onnx_by_timm_with_dynamo(form, kernel_size, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    model = create(form, kernel_size=kernel_size)
    path = tmp_path / 'model.onnx'
    onnx_export(model, str(path), example_input=images(SIZE), dynamic_size=True, use_dynamo=True)
    assert_same(onnx_runtime(path), model)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('form,dynamic', [
    ('plain', False),
    pytest.param('fused', False, marks=pytest.mark.slow),
    pytest.param('fused', True, marks=pytest.mark.slow),
])
def test_onnx_by_torch(form, dynamic, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    model = create(form)
    program = torch.onnx.export(
        model, (images(SIZE),), dynamo=True, dynamic_shapes=(DYNAMIC,) if dynamic else None, verbose=False)
    program.save(str(tmp_path / 'model.onnx'))
    assert_same(onnx_runtime(tmp_path / 'model.onnx'), model, sizes=SIZES if dynamic else [SIZE])


@pytest.mark.parametrize('kernel_size,padding', [(1, (0, 0)), (5, (2, 2)), (8, 'same')])
def test_the_inference_form_pads_odd_kernels_in_numbers(kernel_size, padding):
    """Quantizers do not support ``padding='same'``, which only even kernels need."""
    block = create('fused', kernel_size=kernel_size).blocks[0]
    assert type(block) is FusedConvMixerBlock and block.depthwise.padding == padding
