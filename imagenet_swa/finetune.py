"""The story of a run: pretrained network -> cycles of SGD -> averages -> BatchNorm statistics -> evaluation -> report."""

from pathlib import Path

from imagenet_swa.config import Config
from imagenet_swa.run import Run


def finetune(config: Config) -> Path:
    """Alg. 1 of the paper from pretrained weights to report.md, whose path is returned; resumes where a run stopped.

    Raises:
        StopRequested: a signal or the time limit asked for it; all ranks raise it, after a checkpoint.
    """
    with Run.start(config) as run:
        run.evaluate_what_is_due()  # the pretrained network, or what an interruption left out
        while run.epoch < config.swa.num_epochs:
            run.train_one_epoch()  # and capture the weights wherever the learning rate is at its minimum
            if run.epoch == config.swa.start_epoch:  # after training from scratch; fine-tuning begins with it
                run.begin_averaging()
            run.save_checkpoint()
            run.evaluate_what_is_due()
        return run.finish()
