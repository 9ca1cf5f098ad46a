"""The snippets of the README's section on where models are taken: each runs as it stands there, after the first."""
import re
import shutil
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / 'README.md').read_text(encoding='utf-8')
SECTION = README.partition('## Where to take it\n')[2].partition('\n## ')[0]
FIRST, *SNIPPETS = re.findall(r'```python\n(.*?)```', SECTION, flags=re.DOTALL)
NEEDED = ('onnxruntime', 'onnxscript', 'torchao', 'transformers', 'peft', 'segmentation_models_pytorch')


def assert_int8(graph: torch.fx.GraphModule) -> None:
    called = [str(node.target) for node in graph.graph.nodes if node.op == 'call_function']
    assert sum('onednn.qconv' in target for target in called) == 9  # patch embedding, two for each of four blocks
    assert sum('onednn.qlinear' in target for target in called) == 1
    assert not any('aten.conv' in target or 'aten.linear' in target for target in called)


def skip_search_for_training_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao looks for what quantisation-aware training leaves, and takes 16 seconds to find nothing."""
    from torchao.quantization.pt2e import quantize_pt2e

    monkeypatch.setattr(quantize_pt2e, '_fold_conv_bn_qat', lambda graph: graph, raising=False)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 7


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('snippet', SNIPPETS, ids=lambda snippet: snippet.partition('\n')[0])
def test_snippet(snippet, tmp_path, monkeypatch):
    pytest.importorskip('sklearn')
    for package in NEEDED:
        if package in snippet or (package == 'onnxscript' and 'torch.onnx' in snippet):
            pytest.importorskip(package)
    if ('aoti' in snippet or 'torch.compile' in snippet) and not (shutil.which('g++') or shutil.which('c++')):
        pytest.skip('needs a C++ compiler')
    if 'aoti' in snippet and not hasattr(torch._inductor, 'aoti_load_package'):
        pytest.skip('AOTInductor packages came with PyTorch 2.6')
    if 'torchao' in snippet:
        skip_search_for_training_patterns(monkeypatch)
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    namespace = {}
    exec(FIRST, namespace)
    with torch.no_grad():
        expected = namespace['model'](namespace['images'])
    exec(snippet, namespace)
    if 'quantized' in namespace:
        assert_int8(namespace['quantized'])
    if 'logits' in namespace:
        correct = (namespace['logits'].argmax(dim=1) == torch.tensor(namespace['labels'])).sum().item()
        # Of 355: the model gets 352. Eight bits may lose one in a hundred.
        assert correct >= (348 if 'quantized' in namespace else 350)
        if 'quantize' not in snippet and 'peft' not in snippet:
            torch.testing.assert_close(namespace['logits'].detach(), expected, rtol=1e-4, atol=1e-4)
    else:
        assert namespace['loss'].isfinite()
        gradients = [p.grad for p in namespace['dense'].encoder.model.blocks.parameters()]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
