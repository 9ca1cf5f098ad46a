"""What the tests of the Triton kernels share: where a kernel runs, inputs, poison, and how close is close.

On a machine with a GPU the kernels run there, in the process of the tests. On any other they run under Triton's
interpreter, in one process of its own, because Triton decides at import whether kernels are interpreted.
"""
import atexit
import base64
import contextlib
import functools
import pickle
import tempfile
from pathlib import Path

import pytest
import torch

from interpreter import Interpreter, RemoteError
from support import identify
from timm_convmixer import kernels
from timm_convmixer.kernels.gpu import support

INTERPRETED = support.is_interpreted()
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = 'cuda' if RUNS_HERE and not INTERPRETED else 'cpu'
# Every configuration of every problem, and not one after the other in turn: interpreted that takes hours.
FULL = DEVICE == 'cuda'
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = ('gelu', 'relu', 'none')
# What rounding the output alone costs; the interpreter truncates to bf16 where hardware rounds to nearest.
FLOORS = {torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 6e-3 if INTERPRETED else 3e-3}

DEPTHWISE_SHAPES = (  # batch, channels, height, width, kernel
    (1, 1, 1, 1, 3),
    (2, 3, 5, 7, 9),
    (3, 2, 8, 8, 8),
    (2, 1, 1, 16, 5),
    (17, 1, 16, 16, 9),
    (5, 1, 32, 32, 7),
    (2, 2, 13, 33, 4),
    (1, 2, 9, 64, 3),
    (2, 1, 32, 32, 9),
    (1, 1, 5, 64, 9),
    (1, 1, 3, 64, 8),
    (3, 2, 14, 14, 6),
    (1, 3, 4, 4, 9),
    (70, 1, 2, 1, 3),
    (2, 2, 7, 7, 7),
    (2, 2, 3, 16, 1),
    (1, 2, 70, 5, 2),
)


def let_tensors_be_bounds():
    """Let tensors bound loops: Triton's interpreter before 3.7 calls int() on arrays, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter
    original = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)

        def index(self):
            return int(self.handle.data.squeeze())

        if scope:
            scope[0].set_attr(tensor, '__index__', index)
        else:
            tensor.__index__ = index

    interpreter._patch_lang_tensor = patch


if INTERPRETED:
    let_tensors_be_bounds()


@contextlib.contextmanager
def on_this_machine():
    """The kernels on, and float32 meaning float32, unless a test asks for TF32."""
    kernels.set_gpu_kernels()
    # The older of PyTorch's two interfaces: after the newer one alone, torch.export fails as it reads the older.
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True
        kernels.set_gpu_kernels(False)


@functools.cache
def interpreting_process() -> Interpreter:
    process = Interpreter({'TRITON_INTERPRET': '1'}, Path(tempfile.mkdtemp()) / 'interpreted.log')
    atexit.register(process.close)
    return process


def on_kernels(test):
    """A decorator: run a test where kernels run, which is here or in the process that interprets them."""
    @functools.wraps(test)
    def run(**kwargs):
        if RUNS_HERE:
            with on_this_machine():
                return test(**kwargs)
        pytest.importorskip('triton', '3.4')
        packed = base64.b64encode(pickle.dumps(kwargs)).decode()
        process = interpreting_process()
        try:
            process.run(f'''
                import base64, importlib, pickle, sys
                sys.path.insert(0, {str(Path(__file__).parent)!r})
                module = importlib.import_module({test.__module__!r})
                getattr(module, {test.__name__!r})(**pickle.loads(base64.b64decode({packed!r})))
            ''')
        except RemoteError as error:
            log = Path(process.log).read_text()
            pytest.fail(f'{error}\n{log[-6000:]}', pytrace=False)
    return run


@pytest.fixture(autouse=True)
def ieee():
    """For files that are run in the interpreting process as a whole, and import this."""
    with on_this_machine():
        yield


def shapes_by_dtype_and_act(shapes):
    """Every shape with every dtype, activations in turn; all but one of each shape, in turn, are marked slow."""
    return [
        pytest.param(shape, dtype, ACTS[(i + i // 3 + j) % 3],
                     id=f'{identify(shape)}-{identify(dtype)}-{ACTS[(i + i // 3 + j) % 3]}',
                     marks=() if j == i % 3 else pytest.mark.slow)
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(DTYPES)
    ]


def by_dtype(shapes, every=1):
    """Every shape with every dtype; all but one of each ``every``-th shape, in turn, are marked slow."""
    return [
        pytest.param(shape, dtype, id=f'{identify(shape)}-{identify(dtype)}',
                     marks=() if j == (i + 1) % 3 and i % every == 0 else pytest.mark.slow)
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(DTYPES)
    ]


def some(configs, shape, dtype):
    """All configurations, or one of them, another for other shapes and dtypes."""
    return configs if FULL else [configs[(sum(shape) + DTYPES.index(dtype)) % len(configs)]]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_as_close_as_pytorch(actual, own, expected, floor):
    """The error of ``actual`` is at most 1.5 times that of PyTorch's ``own`` result. NaN never passes."""
    error, own_error = relative_error(actual, expected), relative_error(own, expected)
    assert error <= max(1.5 * own_error, floor), f'error {error:.3g}, of PyTorch {own_error:.3g}, floor {floor:.3g}'


def assert_same_specials(actual, expected, tolerance):
    """NaN where NaN is expected, the same infinities, and close everywhere else."""
    assert torch.equal(actual.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert torch.equal(actual[infinite].double(), expected[infinite])
    finite = expected.isfinite()
    assert finite.any() and not finite.all()
    error = relative_error(actual[finite], expected[finite])
    assert error <= tolerance, f'error {error:.3g}, tolerance {tolerance:.3g}'


def floor_of(dtype, precision):
    """The error that a configuration may have whatever PyTorch's is. The interpreter multiplies in fp32, not TF32."""
    return 1e-3 if dtype == torch.float32 and precision == 'tf32' and not INTERPRETED else FLOORS[dtype]


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


def poisoned(shape, dtype, gap=24):
    """A NaN tensor of ``shape``, contiguous but for ``gap`` elements between images, and the storage it lies in."""
    size = shape[1] * shape[2] * shape[3]
    storage = torch.full(((size + gap) * shape[0] + gap,), float('nan'), dtype=dtype, device=DEVICE)
    view = storage[gap:].as_strided(shape, (size + gap, shape[2] * shape[3], shape[3], 1), gap)
    return view, storage


def assert_only_written(view, storage):
    """Every element of ``view`` was written and nothing else of ``storage`` was."""
    assert not view.isnan().any()
    view.fill_(float('nan'))
    assert storage.isnan().all()


def with_gaps(x):
    """The values of ``x`` in a tensor with room between its images."""
    view, _ = poisoned(x.shape, x.dtype)
    return view.copy_(x)


def far_apart(shape, dtype):
    """Three images of which the last begins beyond what 32 bits can count; the pages between them are never touched."""
    stride = 2 ** 30 + 16
    storage = torch.empty(2 * stride + shape[1] * shape[2] * shape[3], dtype=dtype, device=DEVICE)
    return storage.as_strided(shape, (stride, shape[2] * shape[3], shape[3], 1))


def depthwise_inputs(shape, dtype):
    """x, weight, bias, the gradient of the output, and a residual."""
    batch, channels, height, width, kernel = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad, residual = torch.randn(3, batch, channels, height, width, generator=generator)
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator) / kernel
    return [t.to(DEVICE, dtype) for t in (x, weight, torch.randn(channels, generator=generator), grad, residual)]
