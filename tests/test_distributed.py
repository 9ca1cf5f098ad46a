"""Training in two CPU processes, started by torchrun, equals training in one.

The processes run distributed_worker.py. timm's train.py cannot run in several CPU processes, because it passes a CPU to
DistributedDataParallel as a device id; test_scripts.py runs it on GPUs.
"""
import copy
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
import torch.distributed as dist
from timm.models import resume_checkpoint
from timm.utils import CheckpointSaver

import distributed_worker as worker
from support import child_env

PROCESSES = 2

pytestmark = [
    pytest.mark.usefixtures('small_maps'),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()),
        reason='needs torch.distributed with gloo',
    ),
    pytest.mark.skipif(
        not any(entry_point.name == 'timm_convmixer' for entry_point in entry_points(group='torch.backends')),
        reason='timm-convmixer is not installed: the processes import nothing of it, PyTorch loads its entry point',
    ),
]


def train_shards(model, optimizer, images, labels):
    """Simulate one step of all processes: batch statistics per shard, averaged gradients."""
    model.train()
    losses, statistics = [], []
    before = copy.deepcopy(dict(model.named_buffers()))
    optimizer.zero_grad()
    for shard in range(PROCESSES):
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])
        loss = torch.nn.functional.cross_entropy(
            model(images.chunk(PROCESSES)[shard]), labels.chunk(PROCESSES)[shard])
        (loss / PROCESSES).backward()
        losses.append(loss.detach())
        statistics.append(copy.deepcopy(dict(model.named_buffers())))
    with torch.no_grad():
        # DistributedDataParallel broadcasts the buffers of process 0 before each step.
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[0][name])
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return losses, gradients, statistics


@pytest.fixture(scope='module')
def inputs():
    generator = torch.Generator().manual_seed(3)
    return dict(images=torch.randn(16, 3, 32, 32, generator=generator), labels=torch.arange(16) % 10)


@pytest.fixture(scope='module')
def single(inputs):
    """The same training in one process."""
    model = worker.create()
    optimizer = worker.create_optimizer(model)
    steps = [train_shards(model, optimizer, **inputs) for _ in range(worker.STEPS)]
    return dict(model=model, optimizer=optimizer, steps=steps)


@pytest.fixture(scope='module')
def ranks(inputs, single, tmp_path_factory):
    """The results of each process."""
    folder = tmp_path_factory.mktemp('distributed')
    torch.save(inputs, folder / 'inputs.pt')
    (folder / 'single').mkdir()
    saver = CheckpointSaver(
        single['model'],
        single['optimizer'],
        checkpoint_dir=str(folder / 'single'),
        recovery_dir=str(folder / 'single'),
    )
    saver.save_checkpoint(epoch=4, metric=0.)
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={PROCESSES}',
         worker.__file__, str(folder)],
        # Use the loopback interface: the host name may not resolve.
        env=child_env(GLOO_SOCKET_IFNAME='lo' if sys.platform.startswith('linux') else None),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, [torch.load(folder / f'rank{rank}.pt', weights_only=True) for rank in range(PROCESSES)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_names_are_known_in_every_process(ranks):
    for seen in ranks[1]:
        assert seen['known'] and seen['route'] == 'training'
        for context, workers in seen['workers'].items():
            assert [item['known'] for item in workers] == [True, True], context
    assert 'spawn' in ranks[1][0]['workers']


@pytest.mark.parametrize('run', ['data_parallel', 'data_parallel_checkpointing'])
def test_data_parallel_gradients(ranks, single, run):
    for index, (losses, gradients, _) in enumerate(single['steps']):
        for rank, seen in enumerate(ranks[1]):
            assert_close(seen[run]['losses'][index], losses[rank])
            for actual, expected in zip(seen[run]['gradients'][index], gradients):
                assert_close(actual, expected)
    # The test needs different shards.
    assert abs(single['steps'][0][0][0] - single['steps'][0][0][1]) > 1e-3


@pytest.mark.parametrize('run', ['data_parallel', 'data_parallel_checkpointing'])
def test_data_parallel_statistics(ranks, single, run):
    """Each process has statistics of its shards; timm's ``--dist-bn reduce`` averages them."""
    statistics = single['steps'][-1][2]
    for rank, seen in enumerate(ranks[1]):
        for name, expected in statistics[rank].items():
            assert_close(seen[run]['before'][name], expected)
            if expected.is_floating_point():
                assert_close(seen[run]['reduced'][name], sum(shard[name] for shard in statistics) / PROCESSES)
        assert seen[run]['reduced']['stem.2.num_batches_tracked'] == worker.STEPS


def test_checkpoint_of_several_processes_resumes_in_one(ranks, inputs):
    folder, seen = ranks
    model = worker.create()
    optimizer = worker.create_optimizer(model)
    assert resume_checkpoint(model, str(folder / 'last.pth.tar'), optimizer) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, seen[0]['data_parallel']['reduced'][key]), key
    losses, _, _ = train_shards(model, optimizer, **inputs)
    for rank in range(PROCESSES):
        assert_close(losses[rank], seen[rank]['data_parallel']['continued'])


def test_checkpoint_of_one_process_resumes_in_several(ranks, single, inputs):
    model = copy.deepcopy(single['model'])
    optimizer = worker.create_optimizer(model)
    optimizer.load_state_dict(single['optimizer'].state_dict())
    losses, gradients, _ = train_shards(model, optimizer, **inputs)
    for rank, seen in enumerate(ranks[1]):
        assert seen['resumed']['epoch'] == 5
        assert_close(seen['resumed']['loss'], losses[rank])
        for actual, expected in zip(seen['resumed']['gradients'], gradients):
            assert_close(actual, expected)


@pytest.mark.parametrize('run', ['fully_sharded', 'fully_sharded_checkpointing'])
def test_fully_sharded_block_by_block(ranks, single, run):
    """FSDP2, which shards every parameter, gives the losses of one process."""
    if worker.fully_shard is None:
        pytest.skip('this PyTorch has fully_shard for GPUs alone')
    model = single['model']
    for rank, seen in enumerate(ranks[1]):
        for index, (losses, _, _) in enumerate(single['steps']):
            assert_close(seen[run]['losses'][index], losses[rank])
        for name, parameter in model.named_parameters():
            assert_close(seen[run]['whole'][name], parameter.detach())
    for name, parameter in model.named_parameters():
        shares = [seen[run]['sharded'][name] for seen in ranks[1]]
        assert sum(shares) == parameter.numel() and max(shares) < parameter.numel(), name
