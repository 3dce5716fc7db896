"""What a run is (TrainConfig) and where it stands (TrainState): made, saved, restored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastvlp import dist
from fastvlp.batch import Batch
from fastvlp.config import differences, to_json
from fastvlp.convert.public_encoders import PublicImages, PublicTexts
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.loader import Loader, Row
from fastvlp.data.pairs import Data, Rows
from fastvlp.data.state_store import StatesConfig
from fastvlp.data.stores import Stored
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import Precision, PrecisionChoice, pick_device, pick_precision
from fastvlp.errors import UserError
from fastvlp.files import write_whole
from fastvlp.model.frozen_states import frozen_encoders
from fastvlp.model.inherited_config import inheritable_weights
from fastvlp.model.layers import Block
from fastvlp.model.model import ModelConfig, VLModel
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import (
    Inheritance,
    inherit,
    inherit_objectives,
    load_exactly,
    load_model,
    read_config,
    save_model,
)
from fastvlp.model.sizes import with_tokenizer
from fastvlp.objectives.objective import Ability, Objective, ObjectiveConfig
from fastvlp.objectives.saved_objectives import describe
from fastvlp.provenance import about
from fastvlp.random import hash64
from fastvlp.training.checkpoint import load_checkpoint, save_checkpoint
from fastvlp.training.flops import FlopCounter
from fastvlp.training.optim import OptimConfig, adamw
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.public_start import completed, load_encoders, public_tokenizer, read_encoders
from fastvlp.training.stored_inputs import rows_read, stored_inputs
from fastvlp.training.trained_parts import LastLayers, freeze

# A resumed run may change these; anything else would make it another run.
FREE = {
    "name", "out", "steps", "budget_s", "log_every", "validate_every", "checkpoint_every", "max_bad_steps", "init",
    "compile", "device", "tensorboard", "threads", "tokenizer", "data.workers", "data.cache", "data.test",
    "states.folder",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, whole. A recipe returns it; the command line overrides its fields; it is saved beside its results.

    Length: `steps`, or `budget_s` seconds of training (validation and checkpoints not counted); exactly one of the two.
    A step is `accumulate` micro-batches of `data.batch_size` rows on each rank. The model's vocabulary is filled in from
    the tokenizer: the file named by `tokenizer`, or a WordPiece of `vocab` tokens trained on the data's texts.

    mix: share of the steps that each objective gets, by name: a step runs one of them (UNITER, arXiv 1909.11740, section
    3.1); None: every step runs all. keep: share of image patches that are encoded (FLIP). augment: other looks at the
    images, in training alone. freeze: parts of the model that stay as they are, such as text.word or text.blocks.0. ema:
    decay of the averaged weights that are then validated and saved. compile: the transformer blocks. init: run folder to
    inherit weights from (`--from`), of the model and of objectives of the same names. threads: of the CPU, for the whole
    process: all arms of a comparison train with what the last arm to name a number says; None leaves torch's choice.
    """

    name: str
    data: Data
    model: ModelConfig
    objectives: Mapping[str, ObjectiveConfig]
    optim: OptimConfig
    out: str | None = None
    tokenizer: str | None = None
    vocab: int = 8000
    steps: int | None = None
    budget_s: float | None = None
    accumulate: int = 1
    mix: Mapping[str, float] | None = None
    keep: float = 1.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    freeze: tuple[str, ...] = ()
    train_last: LastLayers = field(default_factory=LastLayers)
    """Train the last layers of an encoder alone."""
    states: StatesConfig = field(default_factory=StatesConfig)
    """Store the states of encoders that the run keeps as they are."""
    seed: int = 0
    precision: PrecisionChoice = "auto"
    compile: bool = False
    ema: float | None = None
    log_every: int = 20
    validate_every: int | None = None
    checkpoint_every: int | None = None
    max_bad_steps: int = 10
    init: str | None = None
    image: str | None = None
    """Public image encoder to start from, in place of the model's: the folder of a model in the layout of transformers, or its
    name on the Hugging Face hub."""
    image_layers: int | None = None
    """How many of its first layers to take; None for all."""
    text: str | None = None
    """Public text encoder to start from, in place of the model's, with its tokenizer."""
    text_layers: int | None = None
    """How many of its first layers to take; None for all."""
    device: str = "auto"
    tensorboard: bool = False
    threads: int | None = None

    @property
    def folder(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def length(self) -> str:
        return f"{self.budget_s:g} s" if self.budget_s is not None else f"{self.steps} steps"


COUNTED = (
    "steps",
    "accumulate",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "max_bad_steps",
    "vocab",
    "threads",
)


def check(run: TrainConfig) -> None:
    """Raises UserError for what cannot be run, before any work is done."""
    if (run.steps is None) == (run.budget_s is None):
        has = "neither" if run.steps is None else "both"
        raise UserError(f"{run.name}: it has {has} of steps and budget_s (seconds); give one of the two alone")
    if not run.objectives:
        raise UserError(f"{run.name}: no objectives; a recipe names at least one")
    counted = {name: getattr(run, name) for name in COUNTED} | {"data.batch_size": run.data.batch_size}
    if wrong := {name: value for name, value in counted.items() if value is not None and value < 1}:
        raise UserError(f"{run.name}: {', '.join(f'{k} must be at least 1, not {v}' for k, v in wrong.items())}")
    if run.budget_s is not None and run.budget_s <= 0:
        raise UserError(f"{run.name}: budget_s is training seconds above 0, not {run.budget_s}")
    if run.data.workers < 0:
        raise UserError(f"{run.name}: data.workers is a number of processes, 0 for none, not {run.data.workers}")
    if run.ema is not None and not 0 < run.ema < 1:
        raise UserError(f"{run.name}: ema is a decay between 0 and 1, such as 0.999, not {run.ema}")
    if run.mix is not None and (
        run.mix.keys() != run.objectives.keys() or not all(part > 0 for part in run.mix.values())
    ):
        raise UserError(
            f"{run.name}: mix gives each of {', '.join(run.objectives)} a number above 0, not {dict(run.mix)}"
        )
    if not 0 < run.keep <= 1:
        raise UserError(f"{run.name}: keep is a share of the patches, above 0 and up to 1, not {run.keep}")
    if run.keep < 1:
        run.model.image.check_can_drop()
    if run.data.max_length > run.model.longest_text:
        raise UserError(
            f"{run.name}: data.max_length {run.data.max_length} exceeds the model's {run.model.longest_text} text "
            f"positions; lower it or raise model.text.positions"
        )


@dataclass(kw_only=True)
class TrainState:
    """Where a run stands. `wrapped` is `pretraining`, maybe under DDP. `elapsed`: seconds of training, agreed by all
    ranks. `pairs` and `tokens` (targets of all losses) count all ranks. `dropped`: unreadable records and what damaged
    shards lack, key -> reason. `bad_steps` in a row were skipped, `skipped` in all. `best`: lowest validation loss so
    far. `inherited`: what `run.init` gave. `stored`: where states of frozen encoders are. `length_was`: of a resumed run,
    when it was saved. `told`: the signal that this
    process got; `stop`: the one that all ranks stop for."""

    run: TrainConfig
    device: torch.device
    tokenizer: Tokenizer
    model: VLModel
    pretraining: Pretraining
    wrapped: nn.Module
    optimiser: torch.optim.Optimizer
    ema: AveragedModel | None
    train: Loader
    val: Loader | None
    step: int = 0
    elapsed: float = 0.0
    pairs: int = 0
    tokens: int = 0
    dropped: dict[str, str] = field(default_factory=dict)
    bad_steps: int = 0
    skipped: int = 0
    best: float = math.inf
    inherited: Inheritance | None = None
    stored: Stored | None = None
    length_was: str | None = None
    flops: FlopCounter = field(default_factory=FlopCounter)
    told: int | None = None
    stop: int | None = None

    @property
    def precision(self) -> Precision:
        return pick_precision(self.run.precision, self.device)

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end."""
        if self.run.steps is not None:
            return self.step / self.run.steps
        return self.elapsed / (self.run.budget_s or math.inf)

    @property
    def midway(self) -> float:
        """Progress in the middle of the coming step: what the schedule is read at, so that no step has rate 0, but for the
        first one by the clock, when nobody knows yet how long a step takes."""
        if self.run.steps is not None:
            return (self.step + 0.5) / self.run.steps
        pace = self.elapsed / self.step if self.step else 0.0
        return (self.elapsed + pace / 2) / (self.run.budget_s or math.inf)

    @property
    def evaluated(self) -> Pretraining:
        """What is validated and saved: the averaged weights where there are any."""
        return cast(Pretraining, self.ema.module) if self.ema is not None else self.pretraining


def start(run: TrainConfig, resume: bool = False) -> TrainState:
    """Everything that the loop needs; from the run's last checkpoint with `resume`, where there is one."""
    images, texts = read_encoders(run)
    run = completed(run, images, texts)
    check(run)
    if run.threads:
        torch.set_num_threads(run.threads)
    device = pick_device(run.device)
    precision = run_precision(run, device, resume)
    run = replace(run, precision=precision)
    tokenizer = find_tokenizer(run, resume, texts)
    pretraining, inherited = make_pretraining(run, tokenizer, images, texts)
    pretraining.to(device)
    model, size = pretraining.model, pretraining.model.config.image.size
    ema = None
    if run.ema is not None:
        ema = AveragedModel(pretraining, multi_avg_fn=get_ema_multi_avg_fn(run.ema))
    saved = saved_state(run) if resume and (run.folder / "last.pt").exists() else None
    if saved is not None:
        load_exactly(pretraining, saved["pretraining"], run.folder / "last.pt")
    # After the weights: stored states are those of one encoder.
    reads = rows_read(run.data, run.steps, run.accumulate)
    stored = stored_inputs(pretraining, run.states, augment=run.augment, precision=precision, reads=reads)
    given: dict[str, Any] = {"stored": stored} if stored is not None and (stored.images or stored.texts) else {}
    rows = run.data.rows("train", tokenizer, size, strict=False, **given)
    if rows is None:
        raise UserError(f"{run.name}: the data has no training split")
    for objective in cast(Mapping[str, Objective], pretraining.objectives).values():
        objective.check(samples(rows))
    held_out = run.data.rows("val", tokenizer, size, strict=True, **given)
    state = TrainState(
        run=run,
        device=device,
        tokenizer=tokenizer,
        model=model,
        pretraining=pretraining,
        wrapped=pretraining,
        optimiser=adamw(pretraining, run.optim),
        ema=ema,
        train=make_loader(run, rows),
        val=None if held_out is None else make_loader(run, held_out),
        dropped={part.key: part.reason for part in rows.damage},
        inherited=inherited,
        stored=stored,
        flops=FlopCounter(model.config.image.tokens),
    )
    if saved is not None:
        restore(state, saved)
    if run.compile:
        compile_blocks(pretraining)
    if dist.world() > 1:
        # Plain DDP raises on the step after one that left a parameter unused; the search warns where there is none.
        state.wrapped = nn.parallel.DistributedDataParallel(
            pretraining,
            find_unused_parameters=run.mix is not None or not pretraining.uses_all(),
            # All that is a buffer is a function of gathered rows, the same on every rank.
            broadcast_buffers=False,
        )
    return state


def run_precision(run: TrainConfig, device: torch.device, resume: bool) -> Precision:
    """Of `auto`, what the device computes fast; a resumed run goes on as it began."""
    if resume and run.precision == "auto" and (run.folder / "last.pt").exists():
        return read_saved_run(run.folder).precision
    return pick_precision(run.precision, device)


def samples(rows: Rows, most: int = 1000) -> Iterator[Batch]:
    """At most so many readable rows, each alone, evenly spread over the data."""
    for i in range(0, rows.count, -(-rows.count // most)):
        batch, _ = rows.make([Row(i, hash64(i))])
        if len(batch):
            yield batch


def make_pretraining(
    run: TrainConfig, tokenizer: Tokenizer, images: PublicImages | None = None, texts: PublicTexts | None = None
) -> tuple[Pretraining, Inheritance | None]:
    """What a run begins with: weights drawn from its seed, and those that it inherits."""
    config, inherited = with_tokenizer(run.model, tokenizer), None
    torch.manual_seed(hash64(run.seed))
    model = VLModel(config)
    objectives = {name: told.build(config, tokenizer) for name, told in run.objectives.items()}
    if run.init is not None:
        source = load_model(run.init)
        inherited = inherit(model, inheritable_weights(source, config), source.weights)
        inherit_objectives(objectives, source.objectives, inherited)
    else:
        inherited = load_encoders(model, objectives, images, texts)
    freeze(model, run.freeze, run.train_last)
    for objective in objectives.values():
        objective.begin(model)
    return Pretraining(model, objectives, run.keep), inherited


def compile_blocks(module: nn.Module) -> None:
    """The blocks, where nearly all the work is: one compilation serves all layers of a kind and, after the second text
    length, all lengths. Compiled whole, the draws of FLM crash the CPU backend of torch 2.13."""
    for part in module.modules():
        if isinstance(part, Block):
            part.compile()


def find_tokenizer(run: TrainConfig, resume: bool, texts: PublicTexts | None = None) -> Tokenizer:
    """The resumed run's own, that of a public text encoder, the one named, that of the weights to start from, or one trained
    on the data's texts."""
    own = run.folder / "tokenizer.json"
    if resume and own.exists():
        return Tokenizer.load(own)
    if texts is not None:
        return public_tokenizer(texts, run.tokenizer)
    if run.tokenizer is not None:
        return Tokenizer.load(run.tokenizer)
    if run.init is not None and read_config(run.init).text.present:
        return Tokenizer.load(Path(run.init) / "tokenizer.json")
    return Tokenizer.train(run.data.texts(), "wordpiece", vocab_size=run.vocab)


def make_loader(run: TrainConfig, rows: Rows) -> Loader:
    return Loader(
        rows.count,
        rows.make,
        batch_size=run.data.batch_size,
        seed=run.seed,
        rank=dist.rank(),
        world=dist.world(),
        workers=run.data.workers,
        pin=pick_device(run.device).type == "cuda",
        grouping=run.data.grouping,
        lengths=rows.lengths,
    )


def save(state: TrainState) -> None:
    """Everything that `restore` needs, and the weights alone beside it. The main rank writes, the others wait."""
    if dist.is_main():
        told: dict[str, Any] = {name: getattr(state, name) for name in COUNTERS} | {
            "dropped": state.dropped,
            "run": to_json(state.run),
            "rows": state.train.count,
            "ranks": dist.world(),
            "pretraining": state.pretraining.state_dict(),
            "optimiser": state.optimiser.state_dict(),
            "ema": None if state.ema is None else state.ema.state_dict(),
        }
        save_checkpoint(state.run.folder / "last.pt", told)
        save_weights(state, "last")
    dist.barrier()


def save_config(state: TrainState) -> TrainConfig:
    """Writes the run as config.json, with the vocabulary, which is known only now, and beside it where it runs, as
    about.json; returns the first."""
    whole = replace(state.run, model=state.model.config)
    if dist.is_main():
        write_whole(whole.folder / "config.json", json.dumps(to_json(whole), indent=2).encode())
        origin = about(state.device) | {"precision": state.precision}
        write_whole(whole.folder / "about.json", json.dumps(origin, indent=2).encode())
    return whole


COUNTERS = ("step", "elapsed", "pairs", "tokens", "bad_steps", "skipped", "best")


def save_weights(state: TrainState, name: str, **more: Any) -> None:
    """`name`.safetensors: the model and what is kept of the objectives, averaged where the run averages."""
    module = state.evaluated
    objectives = cast(Mapping[str, Objective], module.objectives)
    info = {
        "name": state.run.name,
        "task": next(iter(objectives)),
        "step": state.step,
        "elapsed_s": round(state.elapsed, 3),
        "pairs": state.pairs,
        "frozen": frozen_encoders(module.model),
        **describe(state.run.objectives, objectives, inherited_abilities(state)),
    }
    kept = {f"{own}.{key}": value for own, objective in objectives.items() for key, value in objective.kept().items()}
    save_model(state.run.folder, module.model, state.tokenizer, info | more, objectives=kept, name=name)


def inherited_abilities(state: TrainState) -> list[Ability]:
    """A joint space that came with the weights to start from still embeds. Other abilities are each objective's own."""
    came = state.inherited is not None and any(name.startswith("embed.") for name in state.inherited.loaded)
    return ["embed"] if came else []


def saved_state(run: TrainConfig) -> dict[str, Any]:
    """The last checkpoint of a run. Raises UserError where it is of another one."""
    path = run.folder / "last.pt"
    saved = load_checkpoint(path)
    if missing := {"run", "rows", "ranks", "pretraining", "optimiser", "ema", "dropped", *COUNTERS} - set(saved):
        raise UserError(f"{path}: not a checkpoint of a run, it lacks {', '.join(sorted(missing))}")
    changed = {k: v for k, v in differences(saved["run"], to_json(run)).items() if k not in FREE}
    refuse(path, changed | ({} if saved["ranks"] == dist.world() else {"ranks": (saved["ranks"], dist.world())}))
    return saved


def refuse(path: Path, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises UserError where the run that saved a checkpoint was another one; `changed`: then and now, by name."""
    if changed:
        fields = "; ".join(f"{name}: {old} then, {new} now" for name, (old, new) in changed.items())
        raise UserError(
            f"{path}: saved by another run ({fields}); resume with the same values, or choose another folder with --out"
        )


def restore(state: TrainState, saved: Mapping[str, Any]) -> None:
    """Brings a fresh state, whose weights are loaded, to where the checkpoint stood. Raises UserError where its data had
    other rows."""
    path, rows = state.run.folder / "last.pt", state.train.count
    refuse(path, {} if saved["rows"] == rows else {"rows": (saved["rows"], rows)})
    if state.ema is not None:
        load_exactly(state.ema, saved["ema"], path)
    state.optimiser.load_state_dict(saved["optimiser"])
    state.dropped = saved["dropped"] | state.dropped
    state.length_was = replace(state.run, **{name: saved["run"][name] for name in ("steps", "budget_s")}).length
    for name in COUNTERS:
        setattr(state, name, saved[name])
