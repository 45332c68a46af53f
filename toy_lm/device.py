"""Which device a job runs on, and in which precision.

Knows torch alone; asks the driver only when a function is called.
"""

import torch


def pick_device(device: str) -> torch.device:
    """Raises ValueError for anything but "auto", "cpu" and "cuda", or where CUDA is asked for and absent."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, allowed are 'auto', 'cpu' and 'cuda'")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, but torch sees no CUDA device here; use 'cpu'")
    return torch.device(device)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where matrix units compute in it (NVIDIA sm_80 and later); None keeps fp32."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return None
