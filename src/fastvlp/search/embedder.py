"""An export, ready to use: pictures and texts to unit vectors and, where the model can, captions, answers and match scores.

It reads what `vlp export` wrote and nothing else. No code of training is imported, but for the head of a question
answering model, which lives with its task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvlp.batch import Batch, Record
from fastvlp.data.records.decode import MAX_PIXELS, decode, opened_pixels
from fastvlp.data.records.schema import clean_text
from fastvlp.data.records.shards import RecordError
from fastvlp.data.records.transform import Transform
from fastvlp.data.streams import blocks, in_threads
from fastvlp.dist import pick_device
from fastvlp.errors import UserError
from fastvlp.eval.pair_scores import pair_score
from fastvlp.model.saved_run import SavedData, read_json, read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.saved_objectives import abilities, learned_abilities, load_objective, saved_bos
from fastvlp.search.engines.interface import Stamp
from fastvlp.tasks.generation import greedy

Picture: TypeAlias = bytes | Image.Image
# Or what `Embedder.pixels` gave, uint8 [n 3 size size].
PictureBatch: TypeAlias = Sequence[Picture] | Tensor
Precision = Literal["fp32", "bf16"]
Ability = Literal["embed", "caption", "answer", "match"]
# Image states, ids and lengths of texts to what a head says of each row.
Reads = Callable[[Tensor, Tensor, Tensor], Tensor]
# Rows of one pass.
ROWS = 256
# Of the fields that an importer fills.
LANGUAGES = {"captions": "en", "captions_zh": "zh"}
# Files of an export whose bytes are its fingerprint.
FILES = ("model.json", "config.json", "tokenizer.json", "model.safetensors")


class Unreadable(Exception):  # noqa: N818 (not a fault of the program)
    """The picture at place `index` cannot be read, or is too large; `reason` is for people."""

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"picture {self.index}: {self.reason}"


def fingerprint(folder: str | Path) -> str:
    """Of weights, config and tokenizer: vectors of exports with the same one may be compared."""
    digest = hashlib.sha256()
    for name in FILES:
        with (Path(folder) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def usable_abilities(saved: Saved) -> frozenset[Ability]:
    """What a model has learned and its config allows. A stream over a detector's regions cannot read plain pictures."""
    config, can = saved.model.config, set[Ability]()
    learned = learned_abilities(saved)
    head = config.embed.image if config.embed else None
    if "embed" in learned and head is not None and (head.regions is None or head.regions.grid is not None):
        can.add("embed")
    if config.fusion is None:
        return frozenset(can)
    # A <s> that saw the text in training has nothing to see where a text is only being written.
    if "write" in learned and saved_bos(saved) == "blind":
        can.add("caption")
    if "answer" in learned:
        can.add("answer")
    if {"write", "match"} & learned:
        can.add("match")
    return frozenset(can)


class Embedder:
    """Not for several threads at once.

    Attributes:
        width: of a vector.
        fingerprint: of the export; it stamps every index.
        card: facts of the run, as in the export's card.json.
        can: of embed, caption, answer, match.
        captions: the field of the records with the captions that it was trained on.
        max_pixels: a larger picture is Unreadable; its header tells, before anything is decoded.
    """

    def __init__(self, saved: Saved, reading: SavedData, card: dict[str, Any], fingerprint: str, precision: Precision):
        config = saved.model.config
        self.model, self.tokenizer = saved.model.eval().requires_grad_(False), saved.tokenizer
        self.card, self.fingerprint, self.precision = card, fingerprint, precision
        self.width = config.embed.width if config.embed else 0
        self.can = usable_abilities(saved)
        self.max_pixels = MAX_PIXELS
        self.captions = reading.captions
        self.max_length = min(reading.max_length, config.longest_text)
        self.transform = Transform(size=config.image.size, mode=reading.fit)
        self._match = pair_score(saved)[1] if "match" in self.can else None
        self._answers: Sequence[str] = reading.answers if "answer" in self.can else ()
        self._answer = answer_head(saved) if "answer" in self.can else None

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "auto", precision: Precision = "fp32", threads: int | None = None
    ) -> Embedder:
        """Loads what `vlp export` wrote.

        Args:
            folder: The export.
            device: auto, cpu, cuda or cuda:N.
            precision: In which the model computes; results are in fp32.
            threads: Processor threads of PyTorch, in this process; by default all cores.

        Raises:
            UserError: The folder is no export, is damaged, or was written by a newer version.
        """
        if threads:
            torch.set_num_threads(threads)
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            raise UserError(f"{folder}: not an export, it has no card.json; make one with `vlp export RUN {folder}`")
        saved = load_model(folder)
        saved.model.to(pick_device(device))
        reading, card = read_saved_run(folder).data, read_json(folder / "card.json")
        if missing := {"fit", "max_length", "captions"} - reading.stated:
            raise UserError(
                f"{folder}: a damaged export, config.json lacks {', '.join(sorted(missing))}; export the run again"
            )
        return cls(saved, reading, card, fingerprint(folder), precision)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def languages(self) -> list[str]:
        """In which its captions are, en and zh, where their field tells."""
        return sorted({LANGUAGES[field] for field in self.captions.split("+") if field in LANGUAGES})

    @property
    def stamp(self) -> Stamp:
        """Of an index of its vectors."""
        return Stamp(fingerprint=self.fingerprint, width=self.width, model=str(self.card.get("name", "")))

    def pixels(self, pictures: PictureBatch) -> Tensor:
        """uint8 [n 3 size size] as the model reads them, decoded on all cores. Raises Unreadable for the first picture that
        cannot be read."""
        if isinstance(pictures, Tensor):
            return pictures
        read = [*in_threads(lambda numbered: self._read(*numbered), enumerate(pictures))]
        size = self.transform.size
        return torch.stack(read) if read else torch.empty(0, 3, size, size, dtype=torch.uint8)

    def images(self, pictures: PictureBatch) -> np.ndarray:
        """Unit vectors, float32 [n width]. Raises Unreadable."""
        self._need("embed")
        image = self.pixels(pictures)
        vectors = np.empty((len(image), self.width), np.float32)
        for rows in blocks(len(image), ROWS):
            vectors[rows] = self._run(self.model.embed_image, image[rows]).numpy()
        return vectors

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [n width]. Texts of like length share a pass."""
        self._need("embed")
        order = np.argsort(self.lengths(texts), kind="stable")
        vectors = np.empty((len(texts), self.width), np.float32)
        for part in blocks(len(texts), ROWS):
            rows = order[part]
            vectors[rows] = self._run(self.model.embed_text, None, [texts[i] for i in rows]).numpy()
        return vectors

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, <s> and </s> included, after what is too long is cut."""
        return self._ids(texts)[1].tolist()

    def caption(self, pictures: PictureBatch) -> list[str]:
        """What the model says of each picture, the likeliest word each time."""
        self._need("caption")
        said: list[str] = []
        for rows in blocks(len(pictures), ROWS):
            ids_BT = self._run(partial(greedy, self.model), self.pixels(pictures[rows]))
            said += map(self.tokenizer.decode, ids_BT.tolist())
        return said

    def answer(self, pictures: PictureBatch, questions: Sequence[str]) -> list[str]:
        """The likeliest answer to each picture's question, of those that the model was tuned to choose from."""
        self._need("answer")
        return [self._answers[i] for part in self._beside(self._answer, pictures, questions) for i in part.argmax(1)]

    def match(self, pictures: PictureBatch, texts: Sequence[str]) -> np.ndarray:
        """How well each picture fits its text, float32 [n]: larger is better, comparable for one text or one picture."""
        self._need("match")
        return np.concatenate([np.empty(0, np.float32), *map(np.asarray, self._beside(self._match, pictures, texts))])

    def _beside(self, reads: Reads | None, pictures: PictureBatch, texts: Sequence[str]) -> Iterator[Tensor]:
        """`reads` picture i beside text i."""
        assert reads is not None and len(pictures) == len(texts)
        for rows in blocks(len(texts), ROWS):
            yield self._run(reads, self.pixels(pictures[rows]), texts[rows])

    def _run(self, reads: Callable[..., Tensor], image: Tensor | None, texts: Sequence[str] | None = None) -> Tensor:
        """`reads` the states of images, ids and lengths of texts, or both: one pass, its result in fp32 on the CPU."""
        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            states = () if image is None else (self.model.encode_image(image.to(self.device)),)
            words = () if texts is None else (part.to(self.device) for part in self._ids(texts))
            found = reads(*states, *words).cpu()
        return found.float() if found.is_floating_point() else found

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.tokenizer.encode([clean_text(text) or "" for text in texts], self.max_length)

    def _read(self, i: int, picture: Picture) -> Tensor:
        try:
            if isinstance(picture, bytes):
                record = Record(key=str(i), images=(picture,), info={})
                return decode(record, self.transform, max_pixels=self.max_pixels).images[0]
            if picture.width * picture.height > self.max_pixels:
                raise ValueError(f"{picture.width}x{picture.height} pixels are more than the {self.max_pixels} allowed")
            return self.transform(opened_pixels(picture))
        except RecordError as error:
            raise Unreadable(i, error.reason) from error
        except (OSError, ValueError) as error:
            raise Unreadable(i, str(error)) from error

    def _need(self, ability: Ability) -> None:
        if ability not in self.can:
            raise UserError(
                f"{self.card.get('name', 'this export')} cannot {ability}; it can {', '.join(sorted(self.can)) or 'nothing'}: "
                f"export a run that learned it"
            )


def answer_head(saved: Saved) -> Reads:
    """The head of a model that was tuned to answer questions: logits of its answers [B A]."""
    from fastvlp.tasks.heads import HeadObjective

    name = next(name for name, able in abilities(saved).items() if "answer" in able)
    head = load_objective(saved, name).requires_grad_(False)
    assert isinstance(head, HeadObjective)

    def reads(image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor) -> Tensor:
        batch = Batch(image=image_BKD, ids=ids_BL, length=length_B, seed=torch.zeros_like(length_B))
        return head.logits(saved.model, image_BKD, batch)

    return reads


def mean_direction(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the unit vector [E] between unit vectors; the first where they cancel out."""
    total = np.sum(vectors, axis=0)
    length = float(np.linalg.norm(total))
    return total / length if length > 1e-6 else vectors[0]
