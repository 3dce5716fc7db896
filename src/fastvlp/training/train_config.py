"""TrainConfig: the config of a run: its model, data, objectives, optimiser and length."""

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
    "max_bad_steps", "init", "compile", "recompute", "group_texts", "device", "report_to", "shard", "threads", "tokenizer",
    "data.workers", "data.cache", "data.test", "states.folder", "masked_validation", "validation_rows",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options that pretraining and fine-tuning share."""

    accumulate: Count = 1
    """Number of micro-batches in a step, on each rank. Contrastive losses compare all rows of the step, with exact
    gradients."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random changes of the images, in training only."""
    freeze: tuple[str, ...] = ()
    """Parts of the model that are not trained, such as image, text.word or text.blocks.0."""
    train_last: LastLayers = field(default_factory=LastLayers)
    """Train only the last layers of an encoder."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train low-rank adapters instead of whole parts of the model."""
    states: StatesConfig = field(default_factory=StatesConfig)
    """Store the states of frozen encoders."""
    seed: int = 0
    """Seed of all random numbers: new weights, the order of rows, masks, dropout."""
    precision: PrecisionChoice = "auto"
    """Number type of matrix products: fp32, bf16, or auto, which is bf16 on devices that compute it fast. Weights, optimiser
    and losses are always fp32."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile. One step in fifty runs uncompiled, to count its FLOPs."""
    recompute: bool = False
    """Compute the states inside each block again in the backward pass instead of keeping them: less memory, more work."""
    group_texts: bool = False
    """Encode the texts of a contrastive batch in groups of similar length on a GPU too, as on a CPU: less padding, but more and
    smaller matrix products."""
    ema: Annotated[float, Range(above=0, below=1)] | None = None
    """Decay of averaged weights, such as 0.999. If it is set, the averaged weights are validated and saved."""
    log_every: Count = 20
    """Steps between lines of the log. A line is also printed after 10 seconds."""
    validation_rows: Count = 256
    """Number of rows that a contrastive loss compares in validation. It does not depend on the batch size."""
    max_bad_steps: Count = 10
    """End the run after this many steps in a row whose loss or gradient is not finite. Such a step changes no weights."""
    device: str = "auto"
    """Device such as cpu or cuda:1; auto takes a GPU if there is one."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that also show the log: tensorboard, wandb, mlflow, trackio, or several of them."""
    threads: Annotated[int, Range(least=1, most=4096)] | None = None
    """CPU threads of PyTorch, for the whole process; by default PyTorch chooses."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """Config of a run: its data, model, objectives, optimiser and length.

    A recipe returns a config, the command line changes its fields, and the run saves it in its folder. A step consists of
    `accumulate` micro-batches of `data.batch_size` rows on each rank. A run ends after `steps` steps, or after `budget_s`
    seconds; exactly one of the two must be given.
    """

    name: str
    """Name of the run."""
    data: Data
    """The data, and how batches are made of them."""
    model: ModelConfig
    """The model. Its vocabulary size is filled in from the tokenizer."""
    objectives: Mapping[str, ObjectiveConfig]
    """The objectives, by names of your choice. Their losses are added."""
    optim: OptimConfig
    """The optimiser and its learning rates."""
    out: str | None = None
    """Folder of the run; by default runs/NAME."""
    tokenizer: str | None = None
    """File of a tokenizer. By default the tokenizer of the weights to start from is used, or a new one is trained on the texts
    of the data."""
    vocab: Count = 8000
    """Vocabulary size of a new tokenizer."""
    steps: Count | None = None
    """Steps after which the run ends."""
    budget_s: Positive | None = None
    """Seconds of training after which the run ends. Validation and checkpoints do not count."""
    mix: Mapping[str, Positive] | None = None
    """Run only one objective in each step, and draw it with these shares (UNITER, arXiv 1909.11740, section 3.1). By default
    each step runs all objectives."""
    keep: PositiveShare = 1.0
    """Share of an image's patches that are encoded in training (FLIP, arXiv 2212.00794)."""
    keep_states: PositiveShare = 1.0
    """Share of an image's encoded states that is read in training by objectives that predict words (OpenVision 2, arXiv
    2509.01644: 0.35)."""
    reduced: ReducedStart = field(default_factory=ReducedStart)
    """Use smaller images, fewer patches or shorter texts in the first part of the run."""
    teacher: str | None = None
    """Folder of the teacher of all objectives that distil: a run, an export, or a converted public model. By default the
    teacher that the objectives name."""
    teacher_time: Literal["free", "counted"] = "free"
    """counted subtracts from `budget_s` the time in which the teacher was trained and its vectors were computed; free does
    not."""
    masked_validation: bool = False
    """Validate on a share of each image and text, with `keep`, `keep_states` and `text_keep` as in training. By default
    validation reads whole images and texts, as the model will be used."""
    validate_every: Count | None = None
    """Steps between validations. The end of the run is always validated. The weights with the lowest loss are kept as best."""
    patience: Count | None = None
    """End the run after this many validations in a row without a new lowest loss; None: never."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints. The end of the run always has a checkpoint."""
    checkpoint_s: Positive | None = 600.0
    """Also save a checkpoint after this many seconds of training since the last one; None: only by `checkpoint_every`."""
    shard: bool = False
    """Divide weights, gradients and the optimiser's moments among the ranks (FSDP2), for models that do not fit into the
    memory of one rank. By default each rank has all of them (DDP)."""
    init: str | None = None
    """Folder of a run or an export whose weights the run starts from: those of the model, and those of objectives with the
    same names."""
    image: str | None = None
    """Public image encoder to start from, instead of the recipe's: the folder of a model in the layout of transformers, or its
    name on the Hugging Face hub."""
    image_layers: Count | None = None
    """Number of first layers of the public image encoder to use; None for all."""
    text: str | None = None
    """Public text encoder to start from, with its tokenizer, instead of the recipe's: a folder or a name, as for `image`."""
    text_layers: Count | None = None
    """Number of first layers of the public text encoder to use; None for all."""
    text_prefix: str | None = None
    """Words to put before every text, if the public text encoder was trained with them, such as "query: " (e5)."""

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def length(self) -> str:
        return f"{self.budget_s:g} s" if self.budget_s is not None else f"{self.steps} steps"


def check(run: TrainConfig) -> None:
    """Raises UserError if the config cannot be run. It is checked before any work is done."""
    name = run.name
    if (run.steps is None) == (run.budget_s is None):
        given = "neither" if run.steps is None else "both"
        raise UserError(f"{name}: it has {given} of `steps` and `budget_s` (seconds); give one of the two")
    if not run.objectives:
        raise UserError(f"{name}: it has no objectives; give at least one")
    try:
        check_numbers(run)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    mix = run.mix
    if mix is not None and mix.keys() != run.objectives.keys():
        raise UserError(
            f"{name}: `mix` must have a number above 0 for each of {', '.join(run.objectives)}; it is {dict(mix)}"
        )
    if run.patience is not None and run.validate_every is None:
        raise UserError(
            f"{name}: `patience` counts validations, and without `validate_every` there is only one, at the end; give "
            f"`validate_every` too"
        )
    if run.keep < 1:
        run.model.image.check_can_drop()
    run.reduced.check(run.model)
    if run.shard and run.compile:
        raise UserError(f"{name}: `compile` does not work with `shard` yet; leave out one of the two")
    if run.shard and run.optim.matrices == "muon":
        raise UserError(f"{name}: `optim.matrices` muon needs whole matrices, but `shard` divides them; choose adamw")
    if run.data.max_length > run.model.longest_text:
        raise UserError(
            f"{name}: `data.max_length` {run.data.max_length} exceeds the model's {run.model.longest_text} text positions; "
            f"lower it, or raise `model.text.positions`"
        )
