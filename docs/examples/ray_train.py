"""BackMix on Ray Train: Ray places and restarts the processes, the training is `backmix train`.

python ray_train.py WORKERS RECIPE --data /shared/FILE.beton --out /shared/RUN [options]

Every path must be one that all workers see. A worker that fails makes Ray start all of them anew,
which go on from the last checkpoint.
"""

import sys
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(asked: dict[str, Any]) -> None:
    """Train in one worker; Ray has said in the environment which one this is."""
    from backmix.train.recipes import parse_run
    from backmix.train.run import train

    run = parse_run(asked["recipe"], asked["options"])
    code = train(run, asked["recipe"], ["backmix", "train", asked["recipe"], *asked["options"]])
    if code:
        raise RuntimeError(f"the run stopped with exit code {code}: backmix status {run.out}")


def main(workers: int, recipe: str, options: list[str], gpus: bool, restarts: int = 3) -> None:
    """Start the workers and wait for them."""
    TorchTrainer(
        work,
        train_loop_config={"recipe": recipe, "options": options},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=restarts)),
    ).fit()


if __name__ == "__main__":
    import torch

    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:], torch.cuda.is_available())
