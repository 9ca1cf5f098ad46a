"""Trains with timm's library until it is killed, for test_killed_training.py.

    python tests/killed_trainer.py

Reads one folder per line. For each it forks a process (so that torch is imported once), which resumes from the folder's
checkpoint as train.py --resume does. Prints the process id, then the exit status.
"""
import os
import signal
import sys
from pathlib import Path
from typing import Optional

import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3

EPOCHS = 12
BATCHES = 2


def find_checkpoint(folder: Path) -> Optional[Path]:
    """Return the checkpoint to resume: ``last``, or else the newest."""
    numbered = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda path: int(path.name.split('-')[1].split('.')[0]))
    last = folder / 'last.pth.tar'
    return last if last.exists() else numbered[-1] if numbered else None


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        'convmixer_512_12_ks8_p7', dim=16, depth=2, patch_size=4, num_classes=10, drop_path_rate=0.3)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.01, weight_decay=2e-5, eps=1e-3)
    scheduler, _ = create_scheduler_v2(optimizer, sched='cosine', num_epochs=EPOCHS, warmup_epochs=2)
    checkpoint = find_checkpoint(folder)
    start = resume_checkpoint(model, str(checkpoint), optimizer) if checkpoint else 0
    average = ModelEmaV3(model, decay=0.8)
    if checkpoint:
        load_checkpoint(average.module, str(checkpoint), use_ema=True)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=3)
    if checkpoint:
        saver.load_state_dict_from_checkpoint(str(checkpoint))
        scheduler.step(start)
    model.train()
    for epoch in range(start, EPOCHS):
        # The epoch determines images and dropped paths, so a resumed epoch draws the same.
        torch.manual_seed(epoch)
        for _ in range(BATCHES):
            images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=-loss.item())


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            train(Path(line.strip()))
            os._exit(0)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        code = os.waitstatus_to_exitcode(status)
        print('killed' if code == -signal.SIGKILL else code, flush=True)
    os._exit(0)  # torch takes seconds to exit normally


if __name__ == '__main__':
    main()
