"""A modified model computes exactly what its layers compute, as timm's class does: see surgery.py."""
from dataclasses import replace

import pytest
import torch
from timm.utils.model import reparameterize_model

import surgery
from support import ALL
from surgery import OPERATIONS, Program, differences, random_program, single_programs

# A program that compiles takes a second, others some hundredths.
RANDOM_PROGRAMS = 500 if ALL else 40


def check(program: Program) -> None:
    found = differences(program)
    again = f'python tests/surgery.py --only {" ".join(program.operations)} --way {program.way} ' \
            f'--size {program.size} --seed {program.seed}'
    assert not found, '\n'.join([f'{program} (to run it alone: {again})', *found])


@pytest.mark.parametrize(
    'program',
    list(single_programs()),
    ids=lambda program: f'{program.operations[0]}-{program.way}',
)
def test_operation(program):
    check(program)


@pytest.mark.parametrize('size', sorted(surgery.SIZES))
@pytest.mark.parametrize('way', surgery.WAYS)
def test_untouched(way, size):
    check(Program(('nothing',), way, size))


@pytest.mark.parametrize('seed', range(RANDOM_PROGRAMS))
def test_random_program(seed):
    check(random_program(seed))


def test_tells_what_differs():
    """The comparison finds every kind of difference from timm's model."""
    def found(more: str, way: str, *names: str) -> str:
        def execute(program: Program) -> surgery.Outcome:
            return surgery.execute(replace(program, operations=(*program.operations, more)), ours=False)

        return '\n'.join(differences(Program(names or ('nothing',), way), execute))

    assert not found('nothing', 'train')
    assert 'output: off by' in found('circular_padding', 'train')
    assert 'gradient of images: off by' in found('full_backward_pre_hook_that_replaces_on_block', 'eval')
    assert 'gradient of head.bias: none, timm has one' in found('only_depthwise_bias_trained', 'train')
    assert 'after it, stem.2.running_mean: off by' in found('momentum_none', 'train_no_grad')
    assert 'features: strides' in found('images_in_channels_last', 'inference')
    assert 'RuntimeError in run' in found('padding_valid', 'train')
    assert 'hook: ' in found('identity_spatial_mixing', 'train', 'forward_hook_on_depthwise')
    assert 'strides seen by a hook: ' in found('images_in_channels_last', 'train', 'forward_hook_on_depthwise')
    assert 'observer: convolution 3 times, timm 5' in found('block_deleted', 'train_no_grad', 'dispatch_mode')
    assert 'dtype torch.bfloat16' in found('autocast', 'inference')


@pytest.mark.parametrize('size', sorted(surgery.SIZES))
def test_fast_paths_run(size):
    """Without surgery the fast paths run; otherwise these tests would prove nothing."""
    model, x = surgery.create(surgery.SIZES[size], ours=True), torch.zeros(2, 3, *surgery.SIZES[size].image)
    with surgery.lowered_thresholds():
        assert model.route(x).name == 'training'
        with torch.no_grad():
            assert model.eval().route(x).name == 'inference'
            assert reparameterize_model(model).route(x).name == 'inference'


def test_leaves_the_process_as_it_was():
    state = torch.get_rng_state(), torch.get_num_threads(), torch.nn.Conv2d.forward, torch.get_default_dtype()
    for name in OPERATIONS:
        if OPERATIONS[name].category in ('patches of classes', 'observers and contexts'):
            differences(Program((name,), OPERATIONS[name].ways[0]))
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (torch.get_num_threads(), torch.nn.Conv2d.forward, torch.get_default_dtype())
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not torch.are_deterministic_algorithms_enabled()
