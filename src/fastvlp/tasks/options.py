"""What is said of a fine-tuning and of an evaluation; apart from the code, so that the command line's help needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Task = Literal["vqa", "nlvr", "nlvr2", "caption", "grounding", "retrieval", "entailment", "vcr"]


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Fine-tune a pretrained run on a task, and score it on the splits val and test."""

    task: Positional[Task]
    """vqa: questions with answers. nlvr: statements about one image. nlvr2: statements about two. caption: captions.
    grounding: expressions that mean one region. retrieval: images by captions and back. entailment: does the image
    entail a statement, contradict it, or neither? vcr: questions with answers and rationales to choose from."""
    source: Annotated[str, arg(name="from")]
    """Folder of the pretrained run."""
    data: str
    """Folder whose folders are the splits: train, val or dev, test; for nlvr2 first pairs-train and so on."""
    steps: int = 1000
    batch_size: int = 64
    lr: float | None = None
    """Learning rate of the towers; the task's head trains at a multiple. By default the task's own."""
    reading: Literal["full", "causal", "flm"] | None = None
    """How the model reads the text for the head; by default as in its pretraining. Captions are always read causally."""
    field: str | None = None
    """Field of the records with the questions, statements or captions, such as questions_zh."""
    fit: Literal["crop", "squash", "letterbox"] | None = None
    """How an image becomes a square; by default as in pretraining, but squash instead of crop where a text may speak of what
    a crop loses (nlvr, grounding, entailment, vcr)."""
    max_length: int | None = None
    """Tokens of a text, `<s>` and `</s>` included, after which it is cut; by default as in pretraining and at least 50 (vcr:
    224, for question, answer and rationale in one row), as far as the model has positions."""
    answers: int = 3129
    """Most answers that vqa chooses from: the most frequent ones of the training split."""
    form: Literal["triplet", "pair", "pair-biattn"] | None = None
    """nlvr2: how a pair of images is read; by default pair-biattn on a single stream over regions, else pair."""
    loss: Literal["bce", "ce", "rank"] | None = None
    """entailment: bce (UNITER's released code, by default) or ce (its paper). grounding: ce (by default) or rank."""
    reduction: Literal["mean", "sum"] = "mean"
    """grounding: over the expressions of a batch; UNITER's released code sums."""
    layers: Literal[1, 2] = 1
    """grounding: of the head that scores a region; UNITER has 2 for RefCOCO+."""
    kinds: bool = True
    """vcr: types of their own for the words of answers and rationales, in a single stream."""
    negatives: Literal["random", "hard"] = "random"
    """retrieval: of each pair one other image and text of the batch, or the hardest of a few pairs (online)."""
    anchors: int = 8
    """retrieval with hard negatives: pairs of a batch that get them, out of the whole batch."""
    keep: int = 31
    """retrieval with hard negatives: how many images, and how many texts, each of these pairs is set against."""
    name: str | None = None
    """Name of the new run; by default that of the pretrained one and the task."""
    out: str | None = None
    """Folder of the new run; by default runs/NAME."""
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "bf16"
    threads: int | None = None
    resume: bool = False
    """Continue from the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a fine-tuned run on a split; the result is written beside its earlier ones."""

    run: Positional[str]
    """Folder of the fine-tuned run; with --zero-shot, of a pretrained one."""
    split: str = "test"
    """Name of the split's folder, such as val, test or testA; test may be called test1 there, and val dev."""
    data: str | None = None
    """Folder of another data set with the same splits and fields; by default the one it was fine-tuned on."""
    zero_shot: bool = False
    """Retrieval by the image-text matching that the run was pretrained with, on --data."""
    beams: int = 1
    """Captions kept at a time; 1 is greedy."""
    most: int = 30
    """Tokens of a caption at most."""
    length_penalty: float = 0.0
    """A caption's score is its log-probability / tokens**length_penalty."""
    device: str = "auto"
    threads: int | None = None
