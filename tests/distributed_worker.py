"""One of the processes that test_distributed.py starts with torchrun.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/distributed_worker.py FOLDER

Imports timm but not the plugin, which has to register itself, as in train.py. Reads FOLDER/inputs.pt; each process
writes its results to FOLDER/rank{i}.pt.
"""
import os
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    fully_shard = None  # private and GPU-only in PyTorch 2.5

NAME = 'convmixer_512_12_ks8_p7'
STEPS = 3


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=10, dim=16, depth=3, **kwargs)


def create_optimizer(model):
    return create_optimizer_v2(model, opt='adamw', lr=0.01, weight_decay=0.05, eps=1e-3)


def step(model, optimizer, images, labels):
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return loss.detach(), gradients


class KnownNames(Dataset):
    """Returns which models a DataLoader's worker knows after importing only this file."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {'known': timm.is_model(NAME), 'worker': torch.utils.data.get_worker_info().id}


def train_data_parallel(images, labels, folder, checkpointing):
    model = create(drop_path_rate=0.)
    model.set_grad_checkpointing(checkpointing)
    ddp = DistributedDataParallel(model)
    optimizer = create_optimizer(ddp)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss, step_gradients = step(ddp.train(), optimizer, images, labels)
        losses.append(loss)
        gradients.append(step_gradients)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    distribute_bn(ddp, dist.get_world_size(), reduce=True)
    if dist.get_rank() == 0 and not checkpointing:
        saver = CheckpointSaver(ddp, optimizer, checkpoint_dir=str(folder), recovery_dir=str(folder))
        saver.save_checkpoint(epoch=0, metric=0.)
    reduced = {key: value.clone() for key, value in model.state_dict().items()}
    continued = step(ddp, optimizer, images, labels)[0]
    return dict(losses=losses, gradients=gradients, before=before, reduced=reduced, continued=continued)


def resume_under_data_parallel(images, labels, path):
    model = create()
    optimizer = create_optimizer(model)
    epoch = resume_checkpoint(model, path, optimizer)
    ddp = DistributedDataParallel(model)
    return dict(epoch=epoch, **dict(zip(('loss', 'gradients'), step(ddp.train(), optimizer, images, labels))))


def train_fully_sharded(images, labels, checkpointing):
    if fully_shard is None:
        return None
    model = create()
    model.set_grad_checkpointing(checkpointing)
    mesh = dist.device_mesh.init_device_mesh('cpu', (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = create_optimizer(model)
    losses = [step(model.train(), optimizer, images, labels)[0] for _ in range(STEPS)]
    sharded = {name: parameter.to_local().numel() for name, parameter in model.named_parameters()}
    whole = {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}
    return dict(losses=losses, sharded=sharded, whole=whole)


def main(folder: Path) -> None:
    known_at_start = timm.is_model(NAME)
    from timm_convmixer import routes

    routes.SMALLEST_MAP = 0
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    inputs = torch.load(folder / 'inputs.pt', weights_only=True)
    images, labels = (tensor.chunk(dist.get_world_size())[rank] for tensor in (inputs['images'], inputs['labels']))
    seen = {
        'known': known_at_start,
        'route': create().route(images).name,
        'workers': {
            context: list(DataLoader(KnownNames(), num_workers=1, multiprocessing_context=context, batch_size=None))
            for context in (('fork', 'spawn') if rank == 0 else ('fork',))  # spawn is slow
        },
        'data_parallel': train_data_parallel(images, labels, folder, checkpointing=False),
        'data_parallel_checkpointing': train_data_parallel(images, labels, folder, checkpointing=True),
        'resumed': resume_under_data_parallel(images, labels, str(folder / 'single' / 'last.pth.tar')),
        'fully_sharded': train_fully_sharded(images, labels, checkpointing=False),
        'fully_sharded_checkpointing': train_fully_sharded(images, labels, checkpointing=True),
    }
    torch.save(seen, folder / f'rank{rank}.pt')
    dist.destroy_process_group()
    os._exit(0)  # torch takes seconds to exit normally


if __name__ == '__main__':
    main(Path(sys.argv[1]))
