"""The trained model in the runtimes of phones: ExecuTorch's XNNPACK, which runs here, and Core ML, which converts here.

test_readme.py runs the page's snippets, eight bits among them. Core ML runs on macOS alone: here PyTorch computes what
its graph says.
"""
from typing import Any, Dict

import pytest
import torch
import torch.nn.functional as F

from support import assert_close, pairwise
from test_export import FORMS, create, images

# One image, as on a phone; neither a square nor a multiple of the patch.
SIZE = (1, 33, 46)

pytestmark = pytest.mark.filterwarnings('ignore')


@torch.no_grad()
@pytest.mark.parametrize('kernel_size', [5, 8])
@pytest.mark.parametrize('form', FORMS)
def test_executorch_runs_one_delegate(form, kernel_size, tmp_path):
    pytest.importorskip('executorch')
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    model = create(form, kernel_size=kernel_size)
    edge = to_edge_transform_and_lower(
        torch.export.export(model, (images(SIZE),)), partitioner=[XnnpackPartitioner()])
    called = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == 'call_function']
    assert called == ['executorch_call_delegate', '<built-in function getitem>']
    edge.to_executorch().save(str(tmp_path / 'model.pte'))
    method = Runtime.get().load_program(tmp_path / 'model.pte').load_method('forward')
    for seed in range(2):
        assert_close(method.execute([images(SIZE, seed)])[0], model(images(SIZE, seed)))


def run_core_ml(graph: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a graph whose constants are stored, of the operators that a ConvMixer has. Others raise KeyError."""
    def pad_and_convolve(x, weight, bias, strides, pad_type, pad, dilations, groups):
        if pad_type == 'same':  # for a step of one; what is odd goes to the right and the bottom
            total = [side - 1 for side in weight.shape[2:]]
            pad = [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
        top, bottom, left, right = map(int, pad)
        return F.conv2d(
            F.pad(x, (left, right, top, bottom)), weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))

    operators = dict(
        conv=pad_and_convolve,
        gelu=lambda x, mode: F.gelu(x, approximate={'EXACT': 'none'}[mode]),
        batch_norm=lambda x, mean, variance, gamma, beta, epsilon: F.batch_norm(
            x, mean, variance, gamma, beta, eps=epsilon.item()),
        add=lambda x, y: x + y,
        reduce_mean=lambda x, axes, keep_dims: x.mean(axes.tolist(), bool(keep_dims)),
        reshape=lambda x, shape: x.reshape(shape.tolist()),
        linear=F.linear,
    )
    values: Dict[str, Any] = dict.fromkeys(graph.inputs, x)

    def find(variable: Any) -> Any:
        if variable.name in values:
            return values[variable.name]
        assert variable.op.op_type == 'const'
        # Attributes stay NumPy's.
        is_weight = getattr(variable.val, 'dtype', None) == 'float32' and variable.val.ndim
        return torch.from_numpy(variable.val.copy()) if is_weight else variable.val

    for operation in graph.operations:
        if operation.op_type != 'const':
            arguments = {name: find(variable) for name, variable in operation.inputs.items()}
            values[operation.outputs[0].name] = operators[operation.op_type](**arguments)
    return values[graph.outputs[0].name]


@torch.no_grad()
@pytest.mark.parametrize('how,form,kernel_size', pairwise(['export', 'trace'], FORMS, [5, 8]))
def test_core_ml_gets_layers_with_constants(how, form, kernel_size):
    coremltools = pytest.importorskip('coremltools')
    model = create(form, kernel_size=kernel_size)
    if how == 'trace':
        source = torch.jit.trace(model, images(SIZE))
        inputs = [coremltools.TensorType('images', shape=images(SIZE).shape)]
    else:
        source, inputs = torch.export.export(model, (images(SIZE),)).run_decompositions({}), None
    converted = coremltools.convert(
        source, inputs=inputs, compute_precision=coremltools.precision.FLOAT32, skip_model_load=True)
    graph = converted._mil_program.functions['main']
    operators = [operation.op_type for operation in graph.operations]
    for layer, count in dict(conv=9, gelu=9, batch_norm=9, add=4, linear=1).items():
        assert operators.count(layer) == count
    assert_close(run_core_ml(graph, images(SIZE, seed=1)), model(images(SIZE, seed=1)))
