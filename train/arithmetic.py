"""What a GPU may choose by itself: how exactly it multiplies, and by which algorithm."""

import os

import torch

from backmix.train.options import Run


def set_arithmetic(run: Run, device: torch.device) -> None:
    """Set torch's switches for a run on a GPU; on a CPU nothing is to be chosen.

    Matrix products in fp32 may round their factors to TF32, as convolutions do by torch's default,
    and cuDNN times its algorithms at the first batch, where all views have one size. The choice may
    fall differently the next time, and with it the last bits. With --deterministic neither, and
    only algorithms whose results do not depend on the order in which threads finish; operations
    that have none say so once, and are used.
    """
    if device.type != "cuda":
        return
    exact = run.deterministic
    if exact:
        # Read when cuBLAS is used first; without it its sums depend on how streams share memory.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(exact, warn_only=True)
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = not exact and run.loader.grow_from == 0
