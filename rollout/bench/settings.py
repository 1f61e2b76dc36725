"""What `rollout bench` is asked to run."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """What to run: B, H, L and D, the sequence lengths S, the device, and how long a row is timed, about, in seconds.

    Raises:
        ValueError: a size below 1, no sequence length, seconds not positive, or a device torch cannot use.
    """

    device: str = "cpu"
    batch: int = 32
    heads: int = 8
    layers: int = 4
    size: int = 64
    sequences: tuple[int, ...] = (64, 128, 256, 512)
    seconds: float = 2.0

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "layers", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {getattr(self, name)}")
        if not self.sequences or min(self.sequences) < 1:
            raise ValueError(f"bench: sequences must be one or more lengths of at least 1, got {self.sequences}")
        if not (0 < self.seconds < math.inf):
            raise ValueError(f"bench: seconds must be positive, got {self.seconds}")
        try:
            if torch.device(self.device).type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are timed")
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"bench: device must be one that torch can use here, got {self.device!r}: {reason}"
            ) from None

    @property
    def target(self) -> torch.device:
        return torch.device(self.device)
