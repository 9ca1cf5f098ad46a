"""Compile every launch configuration of the Triton kernels for an NVIDIA GPU, without having one, and read what came
out.

    python benchmarks/compile_kernels.py                # all configurations for compute capability 9.0 (H100, H200)
    python benchmarks/compile_kernels.py --quick        # the default ones of convmixer_1536_20 at batch 256
    python benchmarks/compile_kernels.py --json FILE

Prints registers per thread, stack and spills (bytes of the stack frame, local loads and stores), shared memory and the
matrix instructions of each: HGMMA are Hopper's warp-group products, HMMA those of older GPUs. Exits with 1 if anything
spills, or if a kernel that should use the matrix units does not. These are facts about the compiled code; they are no
timings.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from timm_convmixer.kernels import (
    activation_norm,
    activation_norm_triton,
    depthwise_launch,
    depthwise_training,
    depthwise_weight_gradient_triton,
    pointwise,
)
from timm_convmixer.kernels.depthwise_triton import depthwise_kernel
from timm_convmixer.kernels.pointwise_triton import pointwise_mixing_kernel

CUOBJDUMP = Path(nvidia.__file__).parent / 'bin' / 'cuobjdump'
COLUMNS = {
    'registers': 10, 'stack': 6, 'spills': 7, 'shared': 8, 'HGMMA': 6, 'HMMA': 5, 'instructions': 13}
TRITON_TYPES = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16'}
# Statistics, sums and what is made of them.
FLOAT32_POINTERS = (
    'mean_ptr', 'var_ptr', 'invstd_ptr', 'partial_ptr', 'grad_weight_ptr', 'grad_bias_ptr', 'weight_grad_ptr',
    'bias_grad_ptr',
)
# What is expected to use the matrix units, where fp32 is not to be IEEE.
MATRIX_OPERATORS = (
    'depthwise', 'depthwise convolution', 'depthwise input gradient', 'depthwise weight gradient', 'pointwise')
# fp32 is TF32 or IEEE; the other types take no notice of the precision.
PRECISIONS = (
    (torch.bfloat16, 'tf32'), (torch.float16, 'tf32'), (torch.float32, 'tf32'), (torch.float32, 'ieee'))
# An H200: multiprocessors, bytes of shared memory a block may have.
PROCESSORS, SHARED_MEMORY = 132, 232448


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


def compile_kernel(
        dtype: torch.dtype,
        capability: int,
        kernel: Any,
        integers: Dict[str, int],
        constants: Dict[str, Any],
        num_warps: int,
        num_stages: int,
) -> Dict[str, Any]:
    """Compile as a launch with these arguments would, and read the resource usage and the instructions.

    Pointers are to `dtype`, but for those that `FLOAT32_POINTERS` names.
    """
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = 'constexpr', constants[name]
        elif name in integers and integers[name] == 1:
            signature[name], values[(index,)] = 'constexpr', 1
        elif name in integers:
            signature[name] = 'i32' if integers[name] < 2 ** 31 else 'i64'
            if integers[name] % 16 == 0:
                attributes[(index,)] = [['tt.divisibility', 16]]
        else:
            signature[name] = '*' + TRITON_TYPES[torch.float32 if name in FLOAT32_POINTERS else dtype]
            attributes[(index,)] = [['tt.divisibility', 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature=signature, constexprs=values, attrs=attributes),
        target=GPUTarget('cuda', capability, 32),
        options={'num_warps': num_warps, 'num_stages': num_stages, 'enable_fp_fusion': True},
    )
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ('-res-usage', '-sass')
        )
    match = re.search(r'REG:(\d+) STACK:(\d+)', usage)
    count = {name: len(re.findall(rf'\b{name}\b', code)) for name in ('HGMMA', 'HMMA', 'LDL', 'STL', 'LDGSTS')}
    return {
        'registers': int(match[1]),
        'stack': int(match[2]),
        'spills': count['LDL'] + count['STL'],
        'shared': compiled.metadata.shared,
        'HGMMA': count['HGMMA'],
        'HMMA': count['HMMA'],
        'LDGSTS': count['LDGSTS'],
        'instructions': len(re.findall(r'^\s+/\*[0-9a-f]{4,}\*/', code, re.MULTILINE)),
    }


class Variant(NamedTuple):
    """One kernel in one launch configuration: its arguments that are numbers, and those that it is compiled for."""
    operator: str
    config: Tuple[Any, ...]
    kernel: Any
    integers: Dict[str, int]
    constants: Dict[str, Any]
    num_warps: int
    num_stages: int


def depthwise_variants(problem: Problem, batch: int, dtype: torch.dtype, precision: str) -> Iterator[Variant]:
    """The depthwise kernel in its three uses."""
    size, channels, kernel = problem.size, problem.channels, problem.kernel
    integers = {'batch': batch, 'channels': channels}
    integers.update(dict.fromkeys(('x_batch_stride', 'out_batch_stride'), channels * size * size))
    alone = {'ACT': 'none', 'AFFINE': False}
    for operator, flip, use in (
            ('depthwise', False, {'HAS_BIAS': True, 'ACT': problem.act, 'AFFINE': True, 'HAS_RESIDUAL': True}),
            ('depthwise convolution', False, {'HAS_BIAS': True, **alone, 'HAS_RESIDUAL': False}),
            ('depthwise input gradient', True, {'HAS_BIAS': False, **alone, 'HAS_RESIDUAL': True}),
    ):
        mode, configs = 'taps', [depthwise_launch.taps_config(batch, channels, size, size, PROCESSORS)]
        if precision != 'ieee':
            mode, configs = precision, depthwise_launch.candidates(
                batch, channels, size, size, kernel, dtype.itemsize, PROCESSORS, SHARED_MEMORY, flip)
        for config in configs:
            yield Variant(operator, config, depthwise_kernel, integers, {
                'H': size,
                'W': size,
                'KERNEL': kernel,
                'FLIP': flip,
                **use,
                'PRECISION': mode,
                'GROUP': config.group,
                'BLOCK_M': config.block_m,
                'BLOCK_K': depthwise_launch.block_k(size, config.group),
                'STEPS': config.steps,
                'PREFETCH': config.prefetch,
            }, config.num_warps, 1)


def weight_gradient_variants(problem: Problem, batch: int, dtype: torch.dtype, precision: str) -> Iterator[Variant]:
    """The gradient of the depthwise weight, and the sum of its parts."""
    size, channels, kernel = problem.size, problem.channels, problem.kernel
    integers = {'batch': batch, 'channels': channels}
    strides = dict.fromkeys(('x_batch_stride', 'grad_batch_stride'), channels * size * size)
    configs = depthwise_training.weight_gradient_candidates(
        batch, channels, size, size, kernel, dtype.itemsize, precision, PROCESSORS, SHARED_MEMORY)
    for config in configs:
        constants = {
            'H': size,
            'W': size,
            'KERNEL': kernel,
            'GROUP': config.group,
            'BLOCK_K': depthwise_launch.block_k(size, config.group),
            'TAPS': depthwise_launch.round_up(kernel * kernel + 1),
        }
        yield Variant(
            'depthwise weight gradient',
            config,
            depthwise_weight_gradient_triton.weight_gradient_kernel,
            {**integers, **strides},
            {**constants, 'PRECISION': precision, 'BLOCK_M': config.block_m, 'STEPS': config.steps},
            config.num_warps,
            config.num_stages,
        )
        chunks = -(-batch * -(-size // config.group) // (config.block_m * config.steps))
        yield Variant(
            'depthwise weight gradient, merge',
            config,
            depthwise_weight_gradient_triton.merge_weight_gradient_kernel,
            {'chunks': chunks, 'channels': channels},
            {**constants, 'CHUNKS': depthwise_launch.round_up(chunks)},
            1,
            3,
        )


def pointwise_variants(problem: Problem, batch: int, dtype: torch.dtype, precision: str) -> Iterator[Variant]:
    """The pointwise kernel."""
    size, channels = problem.size, problem.channels
    integers = {'batch': batch, 'out_channels': channels}
    integers.update(dict.fromkeys(('x_batch_stride', 'out_batch_stride'), channels * size * size))
    for config in pointwise.candidates(
            batch, channels, size * size, dtype.itemsize, precision, PROCESSORS, SHARED_MEMORY):
        yield Variant('pointwise', config, pointwise_mixing_kernel, integers, {
            'ACT': problem.act,
            'HAS_BIAS': True,
            'IN_CHANNELS': channels,
            'POSITIONS': size * size,
            'PRECISION': precision,
            'BLOCK_M': config.block_m,
            'BLOCK_N': config.block_n,
            'BLOCK_K': config.block_k,
        }, config.num_warps, config.num_stages)


def activation_norm_variants(problem: Problem, batch: int) -> Iterator[Variant]:
    """What surrounds the convolutions in training: one configuration each."""
    module = activation_norm_triton
    channels, positions = problem.channels, problem.size ** 2
    planes, width = activation_norm.tile_shape(positions)
    images = activation_norm.images_per_program(batch, channels, planes, PROCESSORS)
    tile = {'POSITIONS': positions, 'ACT': problem.act, 'PLANES': planes, 'WIDTH': width}
    by_channel = {'batch': batch, 'channels': channels}
    by_plane = {'planes': batch * channels, 'channels': channels}
    sums = (images, planes, width)
    yield Variant('statistics', sums, module.statistics_kernel, by_channel, {**tile, 'IMAGES': images}, 4, 3)
    yield Variant('statistics, merge', sums, module.merge_statistics_kernel, by_channel, {
        'POSITIONS': positions,
        'IMAGES': images,
        'CHUNKS': activation_norm.chunks_to_merge(batch, images),
        'BLOCK': activation_norm.MERGED_CHANNELS,
    }, 1, 3)
    yield Variant(
        'affine', (planes, width), module.affine_kernel, by_plane, {**tile, 'HAS_RESIDUAL': True}, 4, 3)
    yield Variant(
        'norm gradient, sums', sums, module.gradient_sums_kernel, by_channel, {**tile, 'IMAGES': images}, 4, 3)
    yield Variant(
        'norm gradient', (planes, width), module.input_gradient_kernel, by_plane,
        {**tile, 'HAS_WEIGHT': True, 'BATCH_STATISTICS': True}, 4, 3)


def variants(problem: Problem, batch: int, dtype: torch.dtype, precision: str) -> Iterator[Variant]:
    """Every configuration the operators would consider for a problem, each operator's default first."""
    training = batch == TRAINING_BATCH or (batch == 256 and problem in PROBLEMS[:REAL_MODELS])
    for variant in depthwise_variants(problem, batch, dtype, precision):
        if (batch != TRAINING_BATCH) if variant.operator == 'depthwise' else training:
            yield variant
    if batch != TRAINING_BATCH:
        yield from pointwise_variants(problem, batch, dtype, precision)
    if training:
        yield from weight_gradient_variants(problem, batch, dtype, precision)
        if precision == 'tf32':
            yield from activation_norm_variants(problem, batch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quick', action='store_true', help='only convmixer_1536_20, bfloat16, batch 256')
    parser.add_argument('--defaults', action='store_true', help='leave out what only tuning would choose')
    parser.add_argument('--capability', type=int, default=90, help='compute capability times ten')
    parser.add_argument('--json', type=Path, help='write the table here as well')
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error('TRITON_INTERPRET is set: there is nothing to compile')

    rows: List[Dict[str, Any]] = []
    bad = 0
    print(f'Triton {triton.__version__}, PyTorch {torch.__version__}, compute capability {args.capability / 10}')
    print(''.join(f'{key:>{width}}' for key, width in COLUMNS.items()))
    for problem in PROBLEMS[:1] if args.quick else PROBLEMS:
        for dtype, precision in PRECISIONS:
            if args.quick and dtype != torch.bfloat16:
                continue
            for batch in BATCHES[:1] if args.quick else BATCHES:
                operators = set()
                for name, config, *compiled in variants(problem, batch, dtype, precision):
                    default = name not in operators
                    operators.add(name)
                    if (args.quick or args.defaults) and not default:
                        continue
                    facts = compile_kernel(dtype, args.capability, *compiled)
                    expected = name in MATRIX_OPERATORS and not (precision == 'ieee' and dtype == torch.float32)
                    matrix_units = not expected or facts['HGMMA'] + facts['HMMA'] > 0
                    wrong = facts['stack'] or facts['spills'] or not matrix_units
                    # A candidate that is not the default may be bad: tuning is there to find that out.
                    bad += bool(wrong and default)
                    rows.append({
                        'operator': name, 'model': problem.model, 'batch': batch, 'dtype': TRITON_TYPES[dtype],
                        'precision': precision if dtype == torch.float32 else '', 'default': default,
                        'config': config._asdict() if hasattr(config, '_asdict') else list(config), **facts,
                    })
                    numbers = ''.join(f'{facts[key]:>{width}}' for key, width in COLUMNS.items())
                    print(
                        f'{numbers}  {name} {problem.model} batch {batch} '
                        f'{rows[-1]["dtype"]} {rows[-1]["precision"]} {tuple(config)}{" default" if default else ""}'
                        f'{" <-- spills or no matrix units" if wrong else ""}',
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
