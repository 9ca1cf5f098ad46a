"""``python -m timm_convmixer measure``: which way of running a model is fastest on this machine.

A way is a few lines of Python. The lines that are timed are the lines that the user gets.
"""
import importlib.util
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch

from .comparison import architecture, bn_eps, create_timms, random_images, randomize_trivial, relative_error, tolerance
from .environment import describe_environment
from .timing import Isolated, Rounds, load_average, load_warning, paired_ratio, summarize

__all__ = ['Task', 'Way', 'find_ways', 'measure_ways']

SCHEMA = 1

# Of the time given, the share that getting ready may take; what is not ready by then is left out.
_PREPARING = 0.7
_MIN_ROUNDS, _MAX_ROUNDS = 3, 20
_LATE = 'no time was left; give --seconds more'
_INFERENCE_FORM = 'model = timm.utils.model.reparameterize_model(model)  # the inference form\n'


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        model: Name of one of the package's variants.
        device: ``'cpu'``, ``'cuda'`` or ``'cuda:N'``.
        dtype: ``'float32'``, ``'bfloat16'`` or ``'float16'``.
        batch_size: Number of images.
        image_size: Side of the images, in pixels.
    """
    model: str
    device: str
    dtype: str
    batch_size: int
    image_size: int

    @classmethod
    def create(
            cls,
            model: str,
            device: Optional[str] = None,
            dtype: str = 'float32',
            batch_size: Optional[int] = None,
            image_size: Optional[int] = None,
    ) -> 'Task':
        """Fill in what is None: the GPU if there is one, 64 images on it or 8 on a CPU, of the model's own size.

        Raises:
            ValueError: If a value is wrong; the message begins with the name of the command's argument.
        """
        known = timm.list_models(module='convmixer')
        if model not in (*known, *timm.list_models(module='convmixer', include_tags=True)):
            raise ValueError(f'argument MODEL: {model!r} is not a ConvMixer; choose from {", ".join(known)}')
        gpus = torch.cuda.device_count()
        devices = ['cpu', *(['cuda'] if gpus else []), *(f'cuda:{index}' for index in range(gpus))]
        device = device or ('cuda' if gpus else 'cpu')
        if device not in devices:
            raise ValueError(f'argument --device: {device!r} is not available here; choose from {", ".join(devices)}')
        patch_size = architecture(model)['patch_size']
        if image_size is not None and image_size < patch_size:
            raise ValueError(
                f'argument --image-size: {image_size} is less than a patch of {model}; give at least {patch_size}')
        return cls(
            model,
            device,
            dtype,
            batch_size or (8 if device == 'cpu' else 64),
            image_size or timm.get_pretrained_cfg(model).input_size[-1],
        )


@dataclass(frozen=True)
class Way:
    """A way to run a model, as code that takes ``images`` to ``logits``.

    Attributes:
        name: Name in the table.
        create: Code that creates ``model``; weights are loaded after it.
        steps: Code that prepares model and images.
        call: Code that runs the model once.
        imports: What the code imports besides timm and torch.
        packages: What must be installed besides the package's own requirements.
        flags: The same for timm's scripts, where they can.
        needs_kernels: Whether it is pointless where the GPU kernels do not serve.
        left_out: Why it cannot run, ``''`` if it can.
    """
    name: str
    create: str
    steps: str = ''
    call: str = 'with torch.inference_mode():\n    logits = model(images)\n'
    imports: Tuple[str, ...] = ()
    packages: Tuple[str, ...] = ()
    flags: str = ''
    needs_kernels: bool = False
    left_out: str = ''

    @property
    def compiles(self) -> bool:
        return 'torch.compile' in self.steps

    @property
    def setup(self) -> str:
        imports = sorted(('import timm', 'import torch', *self.imports), key=lambda line: line.split()[1])
        return '\n'.join([*imports, '', self.create])

    @property
    def code(self) -> str:
        return self.setup + self.steps + self.call


def find_ways(task: Task) -> List[Way]:
    """Return the ways to run a model on a device. The first is what the others are compared with."""
    arguments = ', '.join(
        f'{name}=torch.nn.{value.__name__}' if isinstance(value, type) else f'{name}={value}'
        for name, value in architecture(task.model).items())
    timms = f'model = timm.models.convmixer.ConvMixer(\n    {arguments},\n).eval()\n'
    eps = bn_eps(task.model)
    if eps != torch.nn.BatchNorm2d(1).eps:
        timms += (
            'for module in model.modules():\n'
            '    if isinstance(module, torch.nn.BatchNorm2d):\n'
            f'        module.eps = {eps}\n')
    ours = f'model = timm.create_model({task.model!r}).eval()\n'

    def move(*more: str) -> str:
        device = () if task.device == 'cpu' else (repr(task.device),)
        dtype = () if task.dtype == 'float32' else (f'torch.{task.dtype}',)
        to = ', '.join((*device, *dtype, *more))
        return f'model = model.to({to})\nimages = images.to({to})\n' if to else ''

    channels_last = move('memory_format=torch.channels_last')
    ways = [Way('timm, as created', timms, move()), Way('timm, channels last', timms, channels_last)]
    for name, form, flag in (('ours', '', ''), ('inference form', _INFERENCE_FORM, '--reparam')):
        if task.device == 'cpu':
            ways.append(Way(name if form else f'{name}, as created', ours, form + move(), flags=flag))
        else:
            ways += [_with_kernels(name, ours, form + move(), flag, on=False)]
            ways += [_with_kernels(name, ours, form + move(), flag, on=True)]
        if not form:
            ways.append(Way(f'{name}, channels last', ours, channels_last, flags='--channels-last'))
        ways.append(Way(
            f'{name}, compiled',
            ours,
            f'{form}{move()}model = torch.compile(model)\n',
            flags=f'{flag} --torchcompile'.strip(),
        ))
        if task.device == 'cpu':
            ways.append(_in_runtime(f'{name}, ONNX Runtime', ours, form, task, 'onnxruntime'))
            ways.append(_in_runtime(f'{name}, OpenVINO', ours, form, task, 'openvino'))
    return ways


def _with_kernels(name: str, create: str, steps: str, flag: str, on: bool) -> Way:
    function, argument, variable = (
        ('set_gpu_kernels', True, 'TIMM_CONVMIXER_GPU_KERNELS=1') if on
        else ('set_fused', False, 'TIMM_CONVMIXER_FUSED=0'))
    return Way(
        f'{name}, kernels {"on" if on else "off"}',
        create,
        f'{function}({argument})  # or {variable} in the environment\n{steps}',
        imports=(f'from timm_convmixer.kernels import {function}',),
        packages=('triton',) if on else (),
        flags=f'{variable} {flag}'.strip(),
        needs_kernels=on,
    )


def _in_runtime(name: str, create: str, form: str, task: Task, runtime: str) -> Way:
    steps = f"{form}timm.utils.onnx.onnx_export(model, 'convmixer.onnx', example_input=images)\n"
    left_out = ''
    if runtime == 'onnxruntime':
        steps += (
            'options = onnxruntime.SessionOptions()\n'
            'options.intra_op_num_threads = torch.get_num_threads()\n'
            "session = onnxruntime.InferenceSession('convmixer.onnx', options, providers=['CPUExecutionProvider'])\n")
        call = "session.run(None, {'input0': images.numpy()})"
        left_out = '' if task.dtype == 'float32' else 'in float32 alone'
    else:
        hint = dict(float32='f32', bfloat16='bf16', float16='f16')[task.dtype]
        steps += (
            'core = openvino.Core()\n'
            "network = core.read_model('convmixer.onnx')\n"
            'network.reshape(list(images.shape))\n'
            "network = core.compile_model(network, 'CPU', {\n"
            f"    'INFERENCE_PRECISION_HINT': '{hint}',\n"
            "    'INFERENCE_NUM_THREADS': torch.get_num_threads(),\n"
            "    'PERFORMANCE_HINT': 'LATENCY',\n"
            '})\n')
        call = 'network(images.numpy())'
    return Way(
        name,
        create,
        steps,
        f'logits = torch.from_numpy({call}[0])\n',
        imports=(f'import {runtime}', 'import timm.utils.onnx'),
        packages=('onnx', runtime),
        left_out=left_out,
    )


def _prepare(way: Way, task: Task, weights: str) -> Callable[[], torch.Tensor]:
    """Run the code of a way, in an interpreter of its own, and return a function that runs its last part."""
    os.chdir(tempfile.mkdtemp(dir=Path(weights).parent))  # for what it writes
    names: Dict[str, Any] = dict(images=random_images(task.batch_size, task.image_size))
    exec(way.setup, names)  # noqa: S102  # the code of find_ways
    names['model'].load_state_dict(torch.load(weights, weights_only=True))
    exec(way.steps, names)  # noqa: S102
    if way.needs_kernels:
        with torch.inference_mode():
            route = names['model'].route(names['images'])
        if route.name == 'layers':
            raise RuntimeError(route.reason)
    call = compile(way.call, way.name, 'exec')

    def run() -> torch.Tensor:
        exec(call, names)  # noqa: S102
        return names['logits']

    if way.compiles:
        run()  # compiles, while others are checked
    return run


@dataclass
class _Row:
    way: Way
    run: Optional[Isolated] = None
    outcome: str = ''
    reason: str = ''
    error: Optional[float] = None
    samples: List[float] = field(default_factory=list)

    def refuse(self, outcome: str, reason: str) -> None:
        """Take it out of the race."""
        self.outcome, self.reason = outcome, ' '.join(reason.split())
        self.close()

    def close(self) -> None:
        run, self.run = self.run, None
        if run is not None:
            run.close()


class _Race:
    def __init__(self, task: Task, ways: Sequence[Way], seconds: float, report: Callable[[str], None]):
        self.task = task
        self.rows = [_Row(way) for way in ways]
        self.seconds = seconds
        self.report = report
        self.start = time.perf_counter()

    def left(self, share: float = 1.) -> float:
        """Return what is left of a share of the time, in seconds, at least 0."""
        return max(0., share * self.seconds - (time.perf_counter() - self.start))

    def prepare(self, folder: str) -> None:
        """Start all ways and compare their logits with those of timm's own class."""
        torch.manual_seed(0)
        model = create_timms(self.task.model).eval()
        randomize_trivial(model, convmixer=True)
        weights = str(Path(folder, 'weights.pt'))
        torch.save(model.state_dict(), weights)

        # The compiler works while others are checked. On a GPU all start at once, since none can be forked.
        for row in self.rows:
            if row.way.compiles or self.task.device != 'cpu':
                self.launch(row, weights)
        reference = _compute_logits(model, self.task)
        for row in sorted(self.rows, key=lambda row: row.way.compiles):
            if row.run is None and not row.outcome:
                self.launch(row, weights)
            if row.run is not None:
                self.check(row, row.run, reference)
                self.report(f'{row.way.name}: {row.outcome or "checked"}')

    def launch(self, row: _Row, weights: str) -> None:
        missing = [package for package in row.way.packages if importlib.util.find_spec(package) is None]
        if row.way.left_out:
            row.refuse('left out', row.way.left_out)
        elif missing:
            row.refuse('left out', f'{missing[0]} is not installed')
        elif row is not self.rows[0] and not self.left(_PREPARING):
            row.refuse('left out', _LATE)
        else:
            preload = ('timm_convmixer.measure',) if self.task.device == 'cpu' else ()
            row.run = Isolated(_prepare, row.way, self.task, weights, wait=False, quiet=True, preload=preload)

    def check(self, row: _Row, run: Isolated, reference: torch.Tensor) -> None:
        baseline = self.rows[0]
        try:
            run.wait(None if row is baseline else self.left(_PREPARING))
            row.error = relative_error(run(), reference)
        except TimeoutError:
            row.refuse('left out', _LATE)
        except Exception as error:
            row.refuse('failed', f'{type(error).__name__}: {error}')
        else:
            allowed = tolerance(self.task.device, getattr(torch, self.task.dtype), baseline.error)
            if not row.error <= allowed:
                row.refuse('wrong', f'the error is {row.error:.1e}, more than {allowed:.1e}')

    def take_turns(self) -> None:
        """Time what is right, until the time is over; what is slow takes fewer turns."""
        active = {row.way.name: row for row in self.rows if row.run is not None}
        turns = Rounds({name: row.run for name, row in active.items() if row.run is not None})
        for name, row in active.items():
            row.samples = turns.samples[name]
        spent = dict.fromkeys(active, 0.)
        share = self.left() / max(1, len(active))
        for number in range(_MAX_ROUNDS):
            for name in turns.order(active):
                turn = spent[name] / max(1, number)
                first = number == 0 and active[name] is self.rows[0]
                if (turn >= self.left() and not first) or (number >= _MIN_ROUNDS and spent[name] + turn > share):
                    del active[name]
                    continue
                start = time.perf_counter()
                try:
                    turns.sample(name)
                except Exception as error:
                    active.pop(name).refuse('failed', f'{type(error).__name__}: {error}')
                spent[name] += time.perf_counter() - start
            if not active:
                break
            self.report(f'round {number + 1} of at most {_MAX_ROUNDS}: {len(active)} ways')

    def summarize(self, interrupted: bool) -> List[Dict[str, Any]]:
        """Return what is known of each way, for JSON."""
        baseline = self.rows[0]
        rows: List[Dict[str, Any]] = []
        for row in self.rows:
            if not row.outcome and row.samples:
                row.outcome = 'timed'
            elif not row.outcome:
                row.refuse('left out', 'interrupted before' if interrupted else _LATE)
            timed = row.outcome == 'timed'
            seconds = summarize(row.samples) if timed else None
            pairs = min(len(baseline.samples), len(row.samples)) if timed and baseline.outcome == 'timed' else 0
            rows.append(dict(
                way=row.way.name,
                outcome=row.outcome,
                reason=row.reason,
                error=row.error if row.error is not None and math.isfinite(row.error) else None,
                samples=row.samples,
                seconds=seconds,
                images_per_second=seconds and {
                    name: self.task.batch_size / seconds[of]
                    for name, of in (('median', 'median'), ('q1', 'q3'), ('q3', 'q1'))
                },
                speedup=paired_ratio(baseline.samples[:pairs], row.samples[:pairs]) if pairs else None,
                code=row.way.code,
                flags=row.way.flags,
            ))
        return rows


def _compute_logits(model: torch.nn.Module, task: Task) -> torch.Tensor:
    """Run a model in float32, without TF32."""
    images = random_images(task.batch_size, task.image_size).to(task.device)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            return model.to(task.device)(images).cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32


def measure_ways(
        task: Task,
        seconds: float = 60.,
        report: Callable[[str], None] = lambda line: None,
        ways: Optional[Sequence[Way]] = None,
) -> Dict[str, Any]:
    """Time the ways to run a model against each other.

    Ctrl-C ends it early, with what has been measured.

    Args:
        task: What to measure.
        seconds: Time to spend. A single call of each way may exceed it.
        report: Called with lines of progress.
        ways: Ways to measure, the one to compare with first; all that :func:`find_ways` finds if None.

    Returns:
        A document for JSON: the task, the environment, a row for each way, and the fastest if there are two.
    """
    load = load_average()
    race = _Race(task, find_ways(task) if ways is None else ways, seconds, report)
    interrupted = False
    with tempfile.TemporaryDirectory(prefix='timm-convmixer-', ignore_cleanup_errors=True) as folder:
        try:
            race.prepare(folder)
            race.take_turns()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            for row in race.rows:
                row.close()
    rows = race.summarize(interrupted)
    timed = [row for row in rows if row['outcome'] == 'timed']
    fastest = max(timed, key=lambda row: row['images_per_second']['median']) if len(timed) > 1 else None
    return dict(
        schema=SCHEMA,
        **asdict(task),
        environment=dict(describe_environment()),
        load_average=load,
        warning=load_warning(load) if task.device == 'cpu' else '',
        seconds=time.perf_counter() - race.start,
        interrupted=interrupted,
        rows=rows,
        fastest=fastest and fastest['way'],
        # The spread does not tell these from the fastest.
        as_fast=[
            row['way'] for row in timed
            if fastest and row is not fastest
            and row['images_per_second']['q3'] >= fastest['images_per_second']['q1']
        ],
    )
