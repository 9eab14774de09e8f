"""Where the time and the memory of a training step go, and what serving costs: plain torch, for any module."""
