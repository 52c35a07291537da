"""Recording: what TracIn needs of a training run, kept from inside the training loop and read again.

`recorder` watches the loop, `schedules` say when to save, `snapshots` take what is saved, `record` is how it lies in a
directory, and `resuming` says where a recording goes on.
"""

from tracer.training.recording.record import FILE, CheckpointRecord, Recording, load_checkpoints, open_recording
from tracer.training.recording.recorder import CheckpointRecorder
from tracer.training.recording.schedules import Even, Geometric, LossDecrease, Schedule, make_schedule

__all__ = [
    "FILE",
    "CheckpointRecord",
    "CheckpointRecorder",
    "Even",
    "Geometric",
    "LossDecrease",
    "Recording",
    "Schedule",
    "load_checkpoints",
    "make_schedule",
    "open_recording",
]
