"""A batch of three samples for several tests."""

from __future__ import annotations

import torch

X, Y = torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 2])
