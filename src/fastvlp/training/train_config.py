"""TrainConfig: what a run trains, on what, how, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fastvlp.config import Count, Positive, PositiveShare, Range, check_numbers
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import Data
from fastvlp.data.state_store import StatesConfig
from fastvlp.dist import PrecisionChoice
from fastvlp.errors import UserError
from fastvlp.model.lora import LoRAConfig
from fastvlp.model.model import ModelConfig
from fastvlp.objectives.objective import ObjectiveConfig
from fastvlp.training.optim import OptimConfig
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.trackers import TrackerName
from fastvlp.training.trained_parts import LastLayers

# A resumed run may change these; anything else would make it another run.
CHANGEABLE = {
    "name", "out", "steps", "budget_s", "log_every", "validate_every", "patience", "checkpoint_every", "checkpoint_s",
    "max_bad_steps", "init", "compile", "recompute", "device", "report_to", "shard", "threads", "tokenizer", "data.workers",
    "data.cache", "data.test", "states.folder", "masked_validation", "validation_rows",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run trains, whatever it learns."""

    accumulate: Count = 1
    """Micro-batches of a step, on each rank. Contrastive losses see all rows of the step, with exact gradients."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the images, in training alone."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained, such as image, text.word or text.blocks.0."""
    train_last: LastLayers = field(default_factory=LastLayers)
    """Train the last layers of an encoder alone."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train low-rank adapters in place of whole parts."""
    states: StatesConfig = field(default_factory=StatesConfig)
    """Store the states of encoders that the run keeps as they are."""
    seed: int = 0
    """Seed of everything that is drawn: new weights, the order of rows, masks, dropout."""
    precision: PrecisionChoice = "auto"
    """Number type of matrix products: fp32, bf16, or auto, which is bf16 where the device is fast at it. Weights, optimiser and
    losses are fp32 in both."""
    compile: bool = False
    """Compile the transformer blocks. A step whose FLOPs are counted runs uncompiled."""
    recompute: bool = False
    """Compute the states inside each block again in the backward pass, in place of keeping them: less memory, more work."""
    ema: Annotated[float, Range(above=0, below=1)] | None = None
    """Decay of averaged weights, such as 0.999; then these are validated and saved. By default there are none."""
    log_every: Count = 20
    """Steps between lines of the log; a line also comes after 10 seconds."""
    validation_rows: Count = 256
    """Rows that a contrastive loss tells apart in validation, whatever the batch size."""
    max_bad_steps: Count = 10
    """End the run after so many steps in a row whose loss or gradient is not finite; such a step changes no weights."""
    device: str = "auto"
    """Device such as cpu or cuda:1; auto takes a GPU if there is one."""
    report_to: tuple[TrackerName, ...] = ()
    """Where else the log is shown: tensorboard, wandb, mlflow or trackio, or several of them."""
    threads: Annotated[int, Range(least=1, most=4096)] | None = None
    """CPU threads of PyTorch, for the whole process; its own choice by default."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """A run: its data, model and objectives, and how long it trains.

    A recipe returns one, the command line changes its fields, and it is saved beside the run's results. One step is
    `accumulate` micro-batches of `data.batch_size` rows on each rank. A run ends after `steps`, or after `budget_s` seconds:
    exactly one of the two is given.
    """

    name: str
    """Name of the run."""
    data: Data
    """What is read, and how it becomes batches."""
    model: ModelConfig
    """The model. Its vocabulary is filled in from the tokenizer."""
    objectives: Mapping[str, ObjectiveConfig]
    """What is learned, by names of your choice. The losses of all objectives are added."""
    optim: OptimConfig
    """The optimiser and its learning rates."""
    out: str | None = None
    """Folder of the run; by default runs/NAME."""
    tokenizer: str | None = None
    """File of a tokenizer. By default it is that of the weights to start from, or is trained on the texts of the data."""
    vocab: Count = 8000
    """Tokens of a tokenizer that is trained on the texts of the data."""
    steps: Count | None = None
    """Steps after which the run ends."""
    budget_s: Positive | None = None
    """Seconds of training after which the run ends; validation and checkpoints do not count."""
    mix: Mapping[str, Positive] | None = None
    """Share of the steps that each objective gets: a step runs one of them (UNITER, arXiv 1909.11740, section 3.1). By default
    each step runs all."""
    keep: PositiveShare = 1.0
    """Share of an image's patches that are encoded in training (FLIP, arXiv 2212.00794)."""
    keep_states: PositiveShare = 1.0
    """Share of an image's encoded states that objectives which predict words read in training (OpenVision 2, arXiv 2509.01644:
    0.35)."""
    reduced: ReducedStart = field(default_factory=ReducedStart)
    """A cheaper beginning of the run: smaller images, fewer patches, shorter texts."""
    teacher: str | None = None
    """Folder of the teacher of all objectives that have one: a run, an export, or a converted public model. By default it is
    the one that they name."""
    teacher_time: Literal["free", "counted"] = "free"
    """Whether what a teacher took, its training and its vectors, is taken off `budget_s`."""
    masked_validation: bool = False
    """Validate as in training, on a share of each image and text, where `keep`, `keep_states` and `text_keep` say so; by
    default on whole ones, as the model will be used."""
    validate_every: Count | None = None
    """Steps between validations; there is always one at the end. The weights with the lowest loss are kept as best."""
    patience: Count | None = None
    """End the run after so many validations in a row whose loss was no new lowest; None: never."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; there is always one at the end."""
    checkpoint_s: Positive | None = 600.0
    """Training seconds after which a checkpoint is saved, whatever `checkpoint_every` says; None: only after its steps."""
    shard: bool = False
    """Divide weights, gradients and the optimiser's moments among the ranks, for a model that is too large for each to have
    all of them (FSDP2); by default each has all (DDP)."""
    init: str | None = None
    """Folder of a run or an export to take weights from: the model's, and those of objectives of the same names."""
    image: str | None = None
    """Public image encoder to start from, in place of the model's: the folder of a model in the layout of transformers, or its
    name on the Hugging Face hub."""
    image_layers: Count | None = None
    """How many of its first layers to take; None for all."""
    text: str | None = None
    """Public text encoder to start from, in place of the model's, with its tokenizer."""
    text_layers: Count | None = None
    """How many of its first layers to take; None for all."""
    text_prefix: str | None = None
    """What the public text encoder was trained to find before every text, such as "query: " (e5)."""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def length(self) -> str:
        return f"{self.budget_s:g} s" if self.budget_s is not None else f"{self.steps} steps"


def check(run: TrainConfig) -> None:
    """Raises UserError for a config that cannot be run, before any work is done."""
    name = run.name
    if (run.steps is None) == (run.budget_s is None):
        given = "neither" if run.steps is None else "both"
        raise UserError(f"{name}: it has {given} of `steps` and `budget_s` (seconds); give one of the two")
    if not run.objectives:
        raise UserError(f"{name}: it has no objectives; a recipe names at least one")
    try:
        check_numbers(run)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    mix = run.mix
    if mix is not None and mix.keys() != run.objectives.keys():
        raise UserError(f"{name}: `mix` gives each of {', '.join(run.objectives)} a number above 0, not {dict(mix)}")
    if run.patience is not None and run.validate_every is None:
        raise UserError(
            f"{name}: `patience` counts validations, of which there is one at the end; give `validate_every` too"
        )
    if run.keep < 1:
        run.model.image.check_can_drop()
    run.reduced.check(run.model)
    if run.shard and run.compile:
        raise UserError(f"{name}: `compile` does not work with `shard` yet; leave out one of the two")
    if run.shard and run.optim.matrices == "muon":
        raise UserError(f"{name}: `optim.matrices` muon needs whole matrices, and `shard` divides them; choose adamw")
    if run.data.max_length > run.model.longest_text:
        raise UserError(
            f"{name}: `data.max_length` {run.data.max_length} exceeds the model's {run.model.longest_text} text positions; "
            f"lower it, or raise `model.text.positions`"
        )
