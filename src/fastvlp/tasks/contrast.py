"""Fine-tunes two encoders on your own pairs: `train()` with a contrastive objective, and retrieval before and after."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastvlp import dist
from fastvlp.convert.checkpoints import convert
from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import PairData
from fastvlp.data.records.schema import usable_captions
from fastvlp.data.records.shards import Shards
from fastvlp.data.splits import find_splits, is_folder, place_in
from fastvlp.data.tokenize import Tokenizer
from fastvlp.dist import PrecisionChoice
from fastvlp.errors import UserError
from fastvlp.eval.encoding import MaskedEncoding
from fastvlp.model.model import ModelConfig
from fastvlp.model.saved_run import read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.clip import CLIPConfig
from fastvlp.objectives.pair_embedding import PairsConfig
from fastvlp.objectives.saved_objectives import saved_configs
from fastvlp.tasks.contrast_scores import Held, recall_on
from fastvlp.tasks.contrast_settings import ContrastSettings, Plan, plan
from fastvlp.tasks.interface import with_options
from fastvlp.tasks.interpolation import interpolate
from fastvlp.tasks.task_scores import new_scores_path, save_scores
from fastvlp.training.checkpoint import CHECKPOINT
from fastvlp.training.loop import train
from fastvlp.training.optim import OptimConfig
from fastvlp.training.train_config import TrainConfig
from fastvlp.training.trained_parts import LastLayers

# Tokens for unknown words, in vocabularies that have such a token.
UNKNOWN = {"[UNK]", "<unk>", "<|unk|>"}
# If a larger share of the words is unknown, the model cannot read the captions.
TOO_MANY_UNKNOWN = 0.5


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A tuned model.

    Attributes:
        folder: folder of its run.
        before, after: retrieval of the old and the tuned model, by split (`test`, or `val` if there is no test; `original`),
            then by metric.
        path: file that holds the scores.
    """

    folder: Path
    before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    after: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    path: Path | None = None


def finetune_contrast(
    source: Annotated[str | Path, tyro.conf.arg(name="from")],
    data: str | Path,
    *,
    original: str | Path | None = None,
    captions: str | None = None,
    freeze: tuple[str, ...] = (),
    name: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    workers: int = 0,
    device: str = "auto",
    precision: PrecisionChoice = "auto",
    threads: int | None = None,
    resume: bool = False,
    **options: Any,
) -> Tuned | None:
    """Fine-tune the image and the text encoder of a model such as CLIP on your own pairs, and score it before and after.

    Options that are not given are chosen by the number of pairs; the first lines of the run say which values were chosen.

    Args:
        source: Folder of a run, an export, a converted or a public model, or a public model's name on the Hugging Face hub.
        data: Folder with a sub-folder for each split: train, val, and test if there is one.
        original: Folder of held-out pairs of another kind (its split test or val, or the folder itself). Retrieval on them is
            scored before and after, to measure how much the model loses on them.
        captions: Field of the records with the captions: captions, captions_zh, or captions+captions_zh for both languages.
        freeze: Parts of the model that are not trained, such as image to train only the text encoder (LiT).
        name: Name of the new run; by default the name of the source, and contrast.
        out: Folder of the new run; by default runs/NAME.
        seed: Seed of all random numbers.
        workers: Number of processes that load data; 0 loads data in a thread.
        device: Device such as cpu or cuda:1; auto takes a GPU if there is one.
        precision: Number type of matrix products: fp32, bf16, or auto, which is bf16 on devices that compute it fast.
        threads: CPU threads that PyTorch uses; by default PyTorch chooses.
        resume: Continue from the last checkpoint.
        **options: Fields of `ContrastSettings`.

    Returns: The folder and the scores; None on all ranks except the main rank.

    Raises:
        UserError: The source is not a model with a joint space of images and texts, or the data cannot be used.
    """
    settings = with_options(ContrastSettings, options, "contrast")
    run_name = name or f"{Path(source).name}-contrast"
    machine: dict[str, Any] = {"device": device, "precision": precision, "threads": threads, "seed": seed}
    folder = new_folder(Path(out or f"runs/{run_name}"), resume)
    with dist.process_group():
        pairs = splits_in(str(data), settings)
        start = saved_start(str(source), folder, resume)
        saved = two_encoders(load_model(start), str(source))
        pairs = replace(pairs, **reading_of(start, saved.model.config, pairs.train, captions), workers=workers)
        made = planned(saved, pairs, settings, freeze)
        run = run_for(
            saved, pairs, made, settings, freeze=freeze, name=run_name, out=str(folder), init=start, **machine
        )
        if dist.is_main():
            print("\n".join(lines_of(run, pairs, made, saved, str(source))), flush=True)
        held = held_out(pairs, None if original is None else str(original), start)
        return train_and_compare(run, held, settings.alpha, resume)


def new_folder(folder: Path, resume: bool) -> Path:
    """Returns the folder of the run. Raises UserError if it already has a run that is not to be continued."""
    if (folder / CHECKPOINT).exists() and not resume:
        raise UserError(f"{folder}: already has a run; continue it with `resume`, or choose another `out`")
    return folder


def train_and_compare(run: TrainConfig, held: Mapping[str, Held], alpha: float, resume: bool) -> Tuned | None:
    """Trains, averages old and tuned weights with `alpha`, and measures retrieval before and after. Returns None on all ranks
    except the main rank."""
    encoding = MaskedEncoding(device=run.device, precision=run.precision, threads=run.threads)
    assert run.init is not None
    before = scores_on(held, run.init, encoding)
    train(run, resume=resume)
    if not dist.is_main():
        return None
    if alpha < 1:
        interpolate(run.folder, run.init, alpha)
    after = scores_on(held, run.folder, encoding)
    scores = after | {f"{name} before": score for name, score in before.items()}
    save_scores(path := new_scores_path(run.folder), scores)
    return Tuned(folder=run.folder, before=before, after=after, path=path)


def splits_in(folder: str, settings: ContrastSettings) -> PairData:
    """Returns the data with only its splits set; all other fields depend on the model. Raises UserError if a split is
    missing."""
    places = find_splits(folder)
    if "val" not in places and settings.patience is not None:
        raise UserError(
            f"{folder}: no split val, which decides when to stop and which weights are best; hold out some pairs with "
            "`vlp data import --val 0.1`, or set `patience` to None"
        )
    return PairData(
        train=places["train"],
        val=places.get("val"),
        test=places.get("test"),
        batch_size=1,
    )


def field_in(place: str, own: str) -> str:
    """Returns the field with the captions of a split: the one of the model's training if the split has it, otherwise the
    English or the Chinese captions. Raises UserError if there are none."""
    shards = Shards(place)
    infos = [shards.info(i) for i in range(min(100, len(shards)))]
    with_captions = [
        name for name in (own, "captions", "captions_zh") if any(usable_captions(info, name) for info in infos)
    ]
    if not with_captions:
        fields = ", ".join(sorted({name for info in infos for name in info})) or "none"
        raise UserError(
            f"{place}: no captions in the first records (fields: {fields}); name their field with `captions`"
        )
    return with_captions[0]


def saved_start(source: str, run: Path, resume: bool) -> str:
    """Returns the folder of the model to start from. A public model is first converted into the run's folder.

    Raises UserError if there is no such model, or the hub does not answer.
    """
    if (Path(source) / "model.json").is_file():
        return source
    place = run / "start"
    if dist.is_main() and not (resume and (place / "model.json").is_file()):
        if place.exists() and not (place / "model.json").is_file():
            raise UserError(f"{place}: not a model that was converted here; choose another `out`")
        shutil.rmtree(place, ignore_errors=True)
        try:
            done = convert(source, place)
        except UserError as error:
            hint = f"; `vlp convert {source} OUT` has options for it" if Path(source).exists() else ""
            raise UserError(f"{error}{hint}") from error
        print(f"{source}: {done.layout}, {done.parameters / 1e6:.1f} M parameters, converted to {place}", flush=True)
    dist.barrier()
    return str(place)


def two_encoders(saved: Saved, source: str) -> Saved:
    """Returns the model unchanged. Raises UserError if it has no joint space of images and texts."""
    config = saved.model.config
    absent = [part for part in ("image", "text") if not getattr(config, part).present]
    if absent:
        raise UserError(
            f"{source}: it has no {absent[0]} encoder, but both encoders are needed; combine it with another one first: "
            "`vlp pretrain clip_photos --image IMAGE_ENCODER --text TEXT_ENCODER`"
        )
    if config.embed is None:
        raise UserError(
            f"{source}: its images and texts have no joint space; train one first: `vlp pretrain clip_photos --from {source}`"
        )
    return saved


def reading_of(start: str, model: ModelConfig, place: str, captions: str | None) -> dict[str, Any]:
    """Returns the preprocessing of images and texts in the model's training, as fields of the data, with the field of
    captions in the split `place`."""
    data = read_saved_run(start).data
    return {
        "fit": data.fit,
        "regions": data.regions,
        "max_length": min(data.max_length, model.longest_text),
        "captions": captions or field_in(place, data.captions),
    }


def planned(saved: Saved, pairs: PairData, settings: ContrastSettings, freeze: tuple[str, ...]) -> Plan:
    """Returns the plan for the number of pairs. Raises UserError if the model does not know the words of the captions."""
    shards = Shards(pairs.train)
    step = max(1, len(shards) // 200)
    texts = [text for i in range(0, len(shards), step) for text in usable_captions(shards.info(i), pairs.captions)]
    if (share := unknown_share(saved.tokenizer, texts)) > TOO_MANY_UNKNOWN:
        raise UserError(
            f"{pairs.train}: the model does not know {share:.0%} of the words in {pairs.captions!r}; start from a model of "
            "this language, or name another field with `captions`"
        )
    config = saved.model.config
    widths = {"image": config.image.width, "text": config.text.width}
    width = max(own for part, own in widths.items() if part not in freeze or {*widths} <= {*freeze})
    return plan(settings, len(shards), width, dist.world())


def unknown_share(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Returns the share of the tokens of texts that stand for unknown words."""
    ids_BL, length_B = tokenizer.encode(texts, max_length=1 << 16)
    words = torch.cat([row[1 : length - 1] for row, length in zip(ids_BL, length_B.tolist())] or [ids_BL.flatten()])
    counts = dict(zip(*(part.tolist() for part in words.unique(return_counts=True))))
    return sum(count for i, count in counts.items() if tokenizer.token(i) in UNKNOWN) / max(1, len(words))


def loss_of(saved: Saved) -> tuple[str, PairsConfig]:
    """Returns the name and the config of the objective: the contrastive objective of the model's training if it had one."""
    own = [(name, config) for name, config in saved_configs(saved).items() if isinstance(config, PairsConfig)]
    return (own[0][0], own[0][1].for_tuning()) if own else ("clip", CLIPConfig())


def run_for(
    saved: Saved, data: PairData, made: Plan, settings: ContrastSettings, *, freeze: tuple[str, ...], **options: Any
) -> TrainConfig:
    """Returns the config of the run. `options`: further fields."""
    config = saved.model.config
    name, objective = loss_of(saved)
    return TrainConfig(
        data=replace(data, batch_size=made.batch_size),
        model=ModelConfig(image=config.image, text=config.text, embed=config.embed, initial=config.initial),
        objectives={name: objective},
        optim=OptimConfig(
            lr=made.lr,
            weight_decay=settings.weight_decay,
            head_multiplier=1,
            warmup=made.warmup,
            decay="cosine",
            layer_decay=made.layer_decay,
        ),
        steps=made.steps,
        accumulate=settings.accumulate,
        freeze=freeze,
        train_last=unlocked(saved, made.locked, freeze),
        # The states of a frozen encoder are stored, if it always sees the same pixels. The crop is open_clip's.
        augment=AugmentConfig() if "image" in freeze else AugmentConfig(crop=(0.9, 1.0)),
        validate_every=made.validate_every,
        patience=settings.patience,
        checkpoint_every=made.validate_every,
        **options,
    )


def unlocked(saved: Saved, locked: float, freeze: tuple[str, ...]) -> LastLayers:
    """Returns the number of last layers of each encoder that are trained if a share of its layers is locked."""
    counts = {name: len(encoder.layer_names().layers) for name, encoder in saved.model.encoders().items()}
    kept = {name: int(count * locked) for name, count in counts.items() if name not in freeze}
    return LastLayers(**{name: counts[name] - first for name, first in kept.items() if first})


def held_out(data: PairData, original: str | None, start: str) -> dict[str, Held]:
    """Returns the splits on which the old and the tuned model are compared."""
    place = data.test or data.val
    held = {} if place is None else {"test" if data.test else "val": Held(place, data.captions)}
    if original is not None:
        inside = (place_in(original, split) for split in ("test", "test1", "val", "dev"))
        held["original"] = Held(next(filter(is_folder, inside), original), read_saved_run(start).data.captions)
    return held


def scores_on(held: Mapping[str, Held], model: str | Path, encoding: MaskedEncoding) -> dict[str, dict[str, float]]:
    """Returns the retrieval of a model on each split; on all ranks except the main rank, nothing."""
    return {name: recall_on(model, one, encoding) for name, one in held.items()} if dist.is_main() else {}


def lines_of(run: TrainConfig, data: PairData, made: Plan, saved: Saved, source: str) -> list[str]:
    """Returns lines that tell the user what was chosen and why."""
    pairs, name = len(Shards(data.train)), next(iter(run.objectives))
    counts = {part: len(encoder.layer_names().layers) for part, encoder in saved.model.encoders().items()}
    last = {part: number for part in counts if (number := getattr(run.train_last, part)) is not None}
    locked = [f"{part} {counts[part] - number} of {counts[part]} layers" for part, number in last.items()]
    early = "" if run.patience is None else f", sooner after {run.patience} validations without a lower loss"
    scale = saved.learned(name).get("log_scale")
    temperature = (
        "a new temperature, since the source has none" if scale is None else f"temperature {math.exp(-scale):.3g}"
    )
    rows = {
        "length": f"{made.steps:,} steps of {made.rows:,} pairs, {made.steps * made.rows / pairs:.3g} epochs; validated every "
        f"{made.validate_every} steps{early}",
        "rate": f"{made.lr:.2g} for the last layers, at {made.layer_decay:g} times the next one's for those before; "
        f"{made.warmup:.1%} of warm-up",
        "locked": ", ".join([*run.freeze, *locked]) or "nothing",
        "loss": f"{name}, {temperature}",
    }
    head = f"tunes {source} on {pairs:,} pairs ({data.captions}): {made.reason}"
    return [head, *(f"  {row:8}{text}" for row, text in rows.items())]
