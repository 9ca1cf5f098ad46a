"""Compile the Triton kernels for an NVIDIA GPU, without having one, and read what came out.

    python benchmarks/compile_kernels.py                        # every configuration, for an H100 or H200
    python benchmarks/compile_kernels.py --quick                # what convmixer_1536_20 launches at batch 256 in bf16
    python benchmarks/compile_kernels.py --defaults --dtypes bf16 --capability 80
    python benchmarks/compile_kernels.py --json FILE

Prints registers per thread, stack and spills (bytes of the stack frame, local loads and stores), shared memory, matrix
instructions (HGMMA are Hopper's warp-group products, UTCMMA those of Blackwell's data center GPUs, HMMA the rest's) and
instructions in all. Exits with 1 if what is launched spills, or misses the matrix units where it should use them. These
are facts about the compiled code; they are no timings.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple, Union

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_convmixer.kernels.gpu import (
    activation_affine,
    activation_norm_backward,
    activation_statistics,
    depthwise,
    depthwise_weight_gradient,
    pointwise,
    pointwise_weight_gradient,
)
from timm_convmixer.kernels.gpu.launch import H100, DeviceLimits, Launch

CUOBJDUMP = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
COLUMNS = {
    'registers': 10, 'stack': 6, 'spills': 7, 'shared': 8, 'HGMMA': 6, 'HMMA': 5, 'UTCMMA': 7, 'instructions': 13}
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32, 'fp32 ieee': torch.float32}
# Statistics, sums and what is made of them.
FLOAT32_POINTERS = (
    'mean_ptr', 'invstd_ptr', 'statistics_ptr', 'partial_ptr', 'weight_grad_ptr', 'bias_grad_ptr', 'scale_ptr',
    'shift_ptr', 'running_mean_ptr', 'running_var_ptr',
)
LIMITS = {
    80: DeviceLimits(108, 166912), 86: DeviceLimits(84, 101376), 89: DeviceLimits(128, 101376), 90: H100,
    100: DeviceLimits(148, 232448, has_async_products=True), 120: DeviceLimits(170, 101376),
}
CPU = torch.device('cpu')


class Problem(NamedTuple):
    """One layer of one model: what the launch configuration is chosen by."""
    model: str
    channels: int
    size: int
    kernel: int
    act: str


PROBLEMS = (
    Problem('convmixer_1536_20', 1536, 32, 9, 'gelu'),
    Problem('convmixer_768_32', 768, 32, 7, 'relu'),
    Problem('convmixer_1024_20_ks9_p14', 1024, 16, 9, 'gelu'),
    Problem('convmixer_1024_12_ks8_p7', 1024, 32, 8, 'gelu'),
    Problem('convmixer_1536_20_ks3_p7', 1536, 32, 3, 'gelu'),
    Problem('convmixer_256_8_ks5_p2', 256, 16, 5, 'gelu'),
    Problem('convmixer_1536_20 at 448 pixels', 1536, 64, 9, 'gelu'),
    Problem('maps of 7 x 7', 768, 7, 7, 'gelu'),
)
# Inference at 256 images and at one. Training at this many, and the first problems, which are released models, at 256
# as well.
BATCHES = (256, 64, 1)
TRAINING_BATCH = 64
REAL_MODELS = 3


class Variant(NamedTuple):
    """One launch: of which operation, in which configuration, and the pointers that are None."""
    operation: str
    config: Tuple[Any, ...]
    launch: Union[Launch, pointwise.PersistentLaunch]
    absent: Tuple[str, ...] = ()
    on_matrix_units: bool = False


def compile_launch(
        launch: Union[Launch, pointwise.PersistentLaunch],
        dtype: torch.dtype,
        absent: Tuple[str, ...],
        capability: int,
) -> Any:
    """Compile what a launch would.

    Pointers are to ``dtype``, but for those that ``FLOAT32_POINTERS`` names.
    """
    blocks: Dict[str, List[int]] = {}
    if isinstance(launch, pointwise.PersistentLaunch):
        launch, blocks = launch.launch, launch.blocks
    names = launch.kernel.arg_names
    pointers = len(names) - len(launch.values)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = None if index < pointers else launch.values[index - pointers]
        if index < pointers and name not in absent:
            pointee = 'float32' if name in FLOAT32_POINTERS else str(dtype).replace('torch.', '')
            pointee = {'float32': 'fp32', 'float16': 'fp16', 'bfloat16': 'bf16'}[pointee]
            if name == 'momentum':
                signature[name] = 'fp32'
            elif name in blocks:
                signature[name] = f'tensordesc<{pointee}{blocks[name]}>'.replace(' ', '')
            else:
                signature[name] = '*i64' if name == 'tracked_ptr' else f'*{pointee}'
                attributes[index,] = [['tt.divisibility', 16]]
        elif name in absent or name in launch.constants or value == 1:
            signature[name], constants[index,] = 'constexpr', value
        else:
            signature[name] = 'i32' if value < 2 ** 31 else 'i64'
            if value % 16 == 0:
                attributes[index,] = [['tt.divisibility', 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget('cuda', capability, 32),
        options=launch.options,
    )


def read_facts(compiled: Any) -> Dict[str, Any]:
    """The resource usage and the instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ('-res-usage', '-sass')
        )
    match = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    count = {
        name: len(re.findall(rf'\b{name}\b', code)) for name in ('HGMMA', 'HMMA', 'UTC[A-Z]MMA', 'LDL', 'STL')}
    return {
        'registers': int(match[1]),
        'stack': int(match[2]),
        'spills': count['LDL'] + count['STL'],
        'shared': compiled.metadata.shared,
        'HGMMA': count['HGMMA'],
        'HMMA': count['HMMA'],
        'UTCMMA': count['UTC[A-Z]MMA'],
        'instructions': len(re.findall(r'^\s+/\*[0-9a-f]{4,}\*/', code, re.MULTILINE)),
    }


def variants(
        problem: Problem,
        batch: int,
        dtype: torch.dtype,
        precision: str,
        limits: DeviceLimits,
) -> Iterator[Variant]:
    """Every configuration of every operation for a problem, each operation's default first."""
    kernel, act = problem.kernel, problem.act
    shape = batch, problem.channels, problem.size, problem.size
    training = batch == TRAINING_BATCH or (batch == 256 and problem in PROBLEMS[:REAL_MODELS])
    fast = precision == 'tf32'
    vectors, all_vectors = ('scale_ptr', 'shift_ptr'), ('bias_ptr', 'scale_ptr', 'shift_ptr')
    for operation, wanted, flip, absent in (
            ('depthwise mixing', batch != TRAINING_BATCH, False, ()),
            ('depthwise convolution', training, False, (*vectors, 'residual_ptr')),
            ('depthwise input gradient', training, True, all_vectors),
    ):
        for config in depthwise.candidates(shape, kernel, dtype, precision, limits, flip) if wanted else ():
            launch = depthwise.make_launch(CPU, shape, kernel, config, 'none' if vectors[0] in absent else act, flip)
            yield Variant(operation, config, launch, absent, fast)
    if batch != TRAINING_BATCH:
        for config in pointwise.candidates(shape, shape[1], dtype, precision, limits):
            launch = pointwise.make_launch(CPU, shape, shape[1], config, act, precision)
            yield Variant('pointwise mixing', config, launch, (), fast)
    if not training:
        return
    if dtype != torch.float32:
        for config in pointwise.candidates(shape, shape[1], dtype, precision, limits):
            launch = pointwise.make_launch(CPU, shape, shape[1], config, 'none', precision)
            yield Variant('pointwise convolution', config, launch, vectors, fast)
        sums = pointwise_weight_gradient.make_launch(CPU, shape, shape[1], dtype, limits).sums
        yield Variant('pointwise weight gradient', (), sums, (), fast)
    for config in depthwise_weight_gradient.candidates(shape, kernel, dtype, precision, limits):
        launches = depthwise_weight_gradient.make_launches(CPU, shape, kernel, config, precision)
        yield Variant('depthwise weight gradient', config, launches.sums, (), fast)
        yield Variant('depthwise weight gradient, merge', config, launches.merge)
    if fast:
        tensors = *[torch.float32] * 4, torch.int64
        statistics = activation_statistics.statistics_launches(CPU, shape, dtype, act, 1e-5, True, tensors)
        backward = activation_norm_backward.backward_launches(CPU, shape, dtype, act, True)
        for operation, launch in (
                ('statistics', statistics[0]),
                ('statistics, merge', statistics[1]),
                ('affine', activation_affine.affine_launch(CPU, shape, dtype, act, True)),
                ('norm gradient, sums', backward[0]),
                ('norm gradient, merge', backward[1]),
                ('norm gradient', backward[2]),
        ):
            yield Variant(operation, (), launch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='only convmixer_1536_20, bfloat16, batch 256, defaults')
    parser.add_argument('--defaults', action='store_true', help='leave out what is a candidate only')
    parser.add_argument('--released', action='store_true', help='only the three models whose weights are published')
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument('--capability', type=int, choices=LIMITS, default=90, help='compute capability times ten')
    parser.add_argument('--json', type=Path, help='write the table here as well')
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error('TRITON_INTERPRET is set: there is nothing to compile')
    problems, batches = PROBLEMS[:REAL_MODELS] if args.released else PROBLEMS, BATCHES
    if args.quick:
        problems, batches, args.dtypes, args.defaults = PROBLEMS[:1], BATCHES[:1], ['bf16'], True

    rows: List[Dict[str, Any]] = []
    bad = 0
    print(f'Triton {triton.__version__}, PyTorch {torch.__version__}, compute capability {args.capability / 10}')
    print(''.join(f'{key:>{width}}' for key, width in COLUMNS.items()))
    for problem in problems:
        for name in args.dtypes:
            precision = 'ieee' if name.endswith('ieee') else 'tf32'
            for batch in batches:
                operations = set()
                for variant in variants(problem, batch, DTYPES[name], precision, LIMITS[args.capability]):
                    default = variant.operation not in operations
                    operations.add(variant.operation)
                    if args.defaults and not default:
                        continue
                    facts = read_facts(
                        compile_launch(variant.launch, DTYPES[name], variant.absent, args.capability))
                    missed = variant.on_matrix_units and not facts['HGMMA'] + facts['HMMA'] + facts['UTCMMA']
                    wrong = facts['stack'] or facts['spills'] or missed
                    # A candidate that is not the default may be bad: measuring is there to find that out.
                    bad += bool(wrong and default)
                    config = getattr(variant.config, '_asdict', dict)()
                    rows.append(dict(
                        operation=variant.operation, model=problem.model, batch=batch, dtype=name, default=default,
                        config=config, **facts))
                    print(
                        ''.join(f'{facts[key]:>{width}}' for key, width in COLUMNS.items())
                        + f'  {variant.operation} {problem.model} batch {batch} {name} {tuple(variant.config)}'
                        + (' default' if default else '') + (' <-- spills or no matrix units' if wrong else ''),
                        flush=True,
                    )
    if args.json:
        args.json.write_text(json.dumps({
            'triton': triton.__version__, 'torch': torch.__version__, 'capability': args.capability, 'kernels': rows,
        }, indent=1) + '\n')
    print(f'{len(rows)} kernels, {bad} of the defaults spill or miss the matrix units')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
