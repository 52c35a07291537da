"""Record a training run for TracIn from inside the training loop, and read the recording.

`recorder` watches the loop, `schedules` decide when to save and what to leave out, `snapshots` take what is saved,
`record` is the format of a directory, and `resuming` decides where a recording continues.
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
