"""Decides whether a run reads stored states of its frozen encoders instead of pixels and words."""

from __future__ import annotations

from dataclasses import replace

from fastvlp.data.augment import AugmentConfig
from fastvlp.data.pairs import Data
from fastvlp.data.state_store import StoreNote
from fastvlp.data.stores import Stored
from fastvlp.data.teacher import TeacherStore
from fastvlp.dist import Precision
from fastvlp.errors import UserError
from fastvlp.model.frozen_states import ImageUse, frozen_encoders, image_store, text_store
from fastvlp.model.teacher_vectors import teacher_store
from fastvlp.training.pretraining import Pretraining
from fastvlp.training.reduced_start import ReducedStart
from fastvlp.training.train_config import TrainConfig


def stored_inputs(pretraining: Pretraining, run: TrainConfig, precision: Precision, ranks: int) -> Stored | None:
    """Returns the stores of the states that a run reads, with its present weights; None if it has no frozen encoder, or stores
    nothing.

    Args:
        precision: precision of the encoders.
        ranks: number of ranks for which the steps of the run are planned.

    Raises UserError if the run requires stored states, and those of a frozen encoder cannot be used.
    """
    model, config, reads = pretraining.model, run.states, rows_read(run.data, run.steps, run.accumulate * ranks)
    teacher = find_teacher(pretraining, run, precision)
    if config.store == "never":
        return None if teacher is None else Stored(teacher=teacher)
    frozen = frozen_encoders(model)
    if config.store == "always" and not frozen:
        raise UserError("`states.store` is always, but no encoder is frozen; name image, text or both in `freeze`")
    mirrors = run.data.reads_mirrored_states
    reasons = {
        "image": why_no_images(pretraining, run.augment, mirrors, run.reduced),
        "text": why_no_texts(pretraining, run.reduced),
    }
    # Texts that are read beside images have no states of their own to store.
    if config.store == "always" and "image" in frozen and reasons["image"] is not None:
        raise UserError(f"`states.store` is always, but the states of the images cannot be stored: {reasons['image']}")
    embeds = all(objective.image_use == "embedding" for objective in pretraining.all_objectives().values())
    use: ImageUse = "embedding" if embeds else "states"
    stored = Stored(
        images=image_store(model, config, use=use, precision=precision, reads=reads, flip=run.augment.flip)
        if reasons["image"] is None
        else None,
        texts=text_store(model, config, precision=precision, reads=reads) if reasons["text"] is None else None,
    )
    skipped = [StoreNote(f"{part}s", "", reason=reason) for part in frozen if (reason := reasons[part]) is not None]
    return stored._replace(skipped=tuple(skipped), teacher=teacher) if frozen or teacher else None


def find_teacher(pretraining: Pretraining, run: TrainConfig, precision: Precision) -> TeacherStore | None:
    """Returns the store of the vectors of the teacher that the objectives name; None without a teacher. Raises UserError if
    they name several."""
    named = {part.teacher for part in pretraining.all_objectives().values() if part.teacher is not None}
    if len(named) > 1:
        raise UserError(f"the objectives name several teachers ({', '.join(sorted(named))}); a run has one")
    device = next(pretraining.parameters()).device
    return next((teacher_store(name, run.states, precision=precision, device=device) for name in named), None)


def why_no_images(pretraining: Pretraining, augment: AugmentConfig, mirrors: bool, reduced: ReducedStart) -> str | None:
    """Returns the reason why images are encoded at each step; None if their stored states are read."""
    stored = replace(augment, flip=0.0) if mirrors else augment
    if "image" not in frozen_encoders(pretraining.model):
        return "the image encoder is trained"
    if pretraining.keep < 1:
        return f"`keep` {pretraining.keep} leaves out other patches each time"
    if reduced.size is not None or reduced.keep is not None:
        return "`reduced` shows smaller images, or fewer patches, at first"
    if stored != AugmentConfig():
        return "`augment` changes the images each time"
    for name, objective in pretraining.all_objectives().items():
        if objective.image_use == "pixels":
            return f"the objective {name} reads their pixels"
    return None


def why_no_texts(pretraining: Pretraining, reduced: ReducedStart) -> str | None:
    """Returns the reason why texts are encoded at each step; None if their stored states are read."""
    model = pretraining.model
    if "text" not in frozen_encoders(model):
        return "the text encoder is trained"
    if all(objective.text_use == "words" for objective in pretraining.all_objectives().values()):
        return "no objective reads texts by themselves"
    if reduced.max_length is not None:
        return "`reduced.max_length` shows shorter texts at first"
    embed = model.embed.config
    if embed.text_mask == "none" and embed.text_length is None:
        return "words see the padding of the batch (`model.embed.text_mask` none)"
    return None


def rows_read(data: Data, steps: int | None, batches: int) -> float | None:
    """Returns the number of rows that a run reads in total; None if it is not known."""
    if steps is None or data.max_tokens is not None:
        return None
    return steps * batches * data.batch_size
