"""What the parent and a worker say to each other over their pipe.

The parent sends one command and waits for its answer. During ``Train`` the worker works only while
it holds a ``Go``: it sends a ``StepDone`` per step, a ``BlockDone`` when the granted steps are used
up, and then waits, blocked on the pipe. ``Halt`` ends training after the current step and an
evaluation after the current batch. Times in seconds, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fasttune.demo.encode import Example
from fasttune.demo.model import ModelSource


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to load its model."""

    name: str  # "stock" or "patched"
    patched: bool
    source: ModelSource
    dtype: str  # a torch name
    device: str
    seed: int
    pad_id: int
    scratch: str  # a folder for the Trainer's output_dir; removed by the parent
    log: str  # a file for what the process prints


# Commands, from the parent


@dataclass(frozen=True)
class Calibrate:
    """Forward and backward of each batch without an optimizer step; nothing is learnt."""

    batches: list[list[Example]]


@dataclass(frozen=True)
class Evaluate:
    """Mean loss per trained token over ``batches``."""

    batches: list[list[Example]]


@dataclass(frozen=True)
class Generate:
    """Greedy continuation of a prompt."""

    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Train:
    """One epoch over ``examples``, in this order."""

    examples: list[Example]  # steps * batch_size * grad_accum of them
    steps: int
    warmup_steps: int
    batch_size: int
    grad_accum: int
    lr: float


@dataclass(frozen=True)
class Go:
    """Permission to do the next ``steps`` optimizer steps."""

    steps: int


@dataclass(frozen=True)
class Halt:
    """Stop training after the current step."""


@dataclass(frozen=True)
class Describe:
    """What fasttune patched, as text."""


@dataclass(frozen=True)
class Save:
    """Write the adapter to this folder."""

    folder: str


@dataclass(frozen=True)
class Quit:
    """End the process."""


Command = Calibrate | Evaluate | Generate | Train | Go | Halt | Describe | Save | Quit


# Events, from a worker


@dataclass(frozen=True)
class Ready:
    """The model is loaded (and patched)."""

    parameters: int
    trainable: int
    threads: int
    memory_method: str


@dataclass(frozen=True)
class Calibrated:
    """Time of each batch."""

    seconds: list[float]


@dataclass(frozen=True)
class Evaluated:
    """Mean loss per trained token."""

    loss: float
    seconds: float


@dataclass(frozen=True)
class Generated:
    """The new tokens, without the prompt."""

    ids: list[int]


@dataclass(frozen=True)
class StepDone:
    """One optimizer step, counted from 1."""

    step: int
    seconds: float
    loss: float
    grad_norm: float
    lr: float


@dataclass(frozen=True)
class BlockDone:
    """The granted steps are used up."""

    peak_bytes: int


@dataclass(frozen=True)
class Trained:
    """Training is over, completed or halted."""

    steps: int


@dataclass(frozen=True)
class Described:
    """The text of ``fasttune.report``."""

    text: str


@dataclass(frozen=True)
class Saved:
    """The adapter is written."""


@dataclass(frozen=True)
class Notice:
    """A warning of fasttune that the user should see."""

    text: str


@dataclass(frozen=True)
class Failed:
    """The worker met an exception and ends."""

    error: str  # one line
    traceback: str


Event = (
    Ready
    | Calibrated
    | Evaluated
    | Generated
    | StepDone
    | BlockDone
    | Trained
    | Described
    | Saved
    | Notice
    | Failed
)
