"""An exported model: unit vectors of pictures and texts and, if it has learned them, captions, answers and match scores.

It reads only files that `vlp export` wrote. It imports no training code, except the head of a model that answers questions,
which belongs to a fine-tuning task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

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
from fastvlp.data.tokenize import Reading
from fastvlp.dist import Precision, PrecisionChoice, pick_device, pick_precision
from fastvlp.errors import UserError
from fastvlp.eval.pair_scores import pair_score
from fastvlp.model.saved_run import SavedData, read_json, read_saved_run
from fastvlp.model.saving import Saved, load_model
from fastvlp.objectives.saved_objectives import abilities, learned_abilities, load_objective, saved_bos
from fastvlp.search.engines.interface import Stamp
from fastvlp.search.public_source import content_fingerprint, converted, is_public
from fastvlp.tasks.generation import greedy

# The path of a file, its bytes, a file opened for bytes, or an image that Pillow has opened.
Picture: TypeAlias = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image
# One picture, several, or what `Embedder.pixels` returns, uint8 [n 3 size size].
PictureBatch: TypeAlias = Picture | Sequence[Picture] | Tensor
# What an embedder can do; `usable_abilities` derives it from what the model has learned (`objectives.objective.Ability`).
EmbedderAbility = Literal["embed", "caption", "answer", "match"]
# Image states [B K D], token ids [B L] and lengths [B] -> one row of scores for each picture and its text, [B ...].
PairHead = Callable[[Tensor, Tensor, Tensor], Tensor]
# The most pictures or texts in one pass through the model.
ROWS = 256
# The language of each caption field that an import fills.
LANGUAGES = {"captions": "en", "captions_zh": "zh"}
# The files of an export that its fingerprint is computed from.
FILES = ("model.json", "config.json", "tokenizer.json", "model.safetensors")


class Unreadable(Exception):  # noqa: N818 (not a fault of the program)
    """A picture cannot be read, or has too many pixels.

    Attributes:
        index: Position of the picture in the list that was passed.
        reason: What is wrong with the picture, for a message.
    """

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"picture {self.index}: {self.reason}"


def fingerprint(folder: str | Path) -> str:
    """Hashes the weights, config and tokenizer of an export. Vectors of exports with the same fingerprint can be compared."""
    digest = hashlib.sha256()
    for name in FILES:
        with (Path(folder) / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def usable_abilities(saved: Saved) -> frozenset[EmbedderAbility]:
    """Returns the abilities that a model has learned and that need only a picture, without a detector's regions."""
    config, can = saved.model.config, set[EmbedderAbility]()
    learned = learned_abilities(saved)
    head = config.embed.image if config.embed else None
    if "embed" in learned and head is not None and (head.regions is None or head.regions.grid is not None):
        can.add("embed")
    if config.fusion is None:
        return frozenset(can)
    # A model whose <s> saw the whole text in training cannot generate: when generation starts at <s>, there is no text yet.
    if "write" in learned and saved_bos(saved) == "blind":
        can.add("caption")
    if "answer" in learned:
        can.add("answer")
    if {"write", "match"} & learned:
        can.add("match")
    return frozenset(can)


class Embedder:
    """An exported model that embeds pictures and texts; `Embedder.load` reads one. Only one thread may use it at a time.

    Attributes:
        width: Dimensions of a vector; 0 if the model cannot embed.
        can: The abilities of the model: a subset of embed, caption, answer and match.
        card: Facts about the run, from the export's card.json.
        captions: Name of the record field whose captions the model was trained on.
        fingerprint: Hash of the export. An index stores it, to refuse vectors of other models.
        max_pixels: Largest number of pixels of a picture. A picture with more is `Unreadable`, and is not decoded.
        max_length: Largest number of tokens of a text; longer texts are cut.
        precision: The precision in which the model computes.
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
        cls, folder: str | Path, device: str = "auto", precision: PrecisionChoice = "auto", threads: int | None = None
    ) -> Embedder:
        """Loads an export, or a public model.

        Args:
            folder: A folder that `vlp export` wrote; or the folder of a public model with two towers, or its name on the
                Hugging Face hub, such as openai/clip-vit-base-patch32.
            device: auto, cpu, cuda or cuda:N.
            precision: Precision of the computation: fp32, bf16, or auto, which is bf16 if the model was trained in bf16 and the
                device computes bf16 fast. Results are in fp32.
            threads: CPU threads of PyTorch in this process; by default one for each core.

        Raises:
            UserError: The folder is not an export, is damaged, or was written by a newer version.
        """
        if threads:
            torch.set_num_threads(threads)
        if is_public(folder):
            with converted(folder) as made:
                return cls._loaded(made, {"name": str(folder)}, device, precision, content_fingerprint(made))
        folder = Path(folder)
        if not (folder / "card.json").is_file():
            raise UserError(f"{folder}: {_why_no_export(folder)}")
        card = read_json(folder / "card.json")
        return cls._loaded(folder, card, device, precision, fingerprint(folder))

    @classmethod
    def _loaded(
        cls, folder: Path, card: dict[str, Any], device: str, precision: PrecisionChoice, hashed: str
    ) -> Embedder:
        saved = load_model(folder)
        place = pick_device(device)
        saved.model.to(place)
        run = read_saved_run(folder)
        reading = run.data
        if missing := {"fit", "max_length", "captions"} - reading.stated:
            raise UserError(
                f"{folder}: damaged export, its config.json lacks {', '.join(sorted(missing))}; export the run again"
            )
        return cls(saved, reading, card, hashed, pick_precision(precision, place, run.precision))

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return next(self.model.parameters()).device

    @property
    def languages(self) -> list[str]:
        """The languages of the model's training captions (en, zh), inferred from the name of their field."""
        return sorted({LANGUAGES[field] for field in self.captions.split("+") if field in LANGUAGES})

    @property
    def stamp(self) -> Stamp:
        """The stamp for an index of this model's vectors."""
        return Stamp(fingerprint=self.fingerprint, width=self.width, model=str(self.card.get("name", "")))

    def pixels(self, pictures: PictureBatch) -> Tensor:
        """Decodes pictures to the model's input, uint8 [n 3 size size], on all cores. The other methods accept the result
        instead of pictures.

        Raises:
            Unreadable: A picture cannot be read; the error names the first one.
        """
        if isinstance(pictures, Tensor):
            return pictures
        # Open files are read here, one after the other, because the same file may be in the list twice.
        given = [
            _read(i, picture) if hasattr(picture, "read") else picture for i, picture in enumerate(_as_list(pictures))
        ]
        decoded = [*in_threads(lambda numbered: self._decode(*numbered), enumerate(given))]
        size = self.transform.size
        return torch.stack(decoded) if decoded else torch.empty(0, 3, size, size, dtype=torch.uint8)

    def images(self, pictures: PictureBatch) -> np.ndarray:
        """Embeds pictures.

        Args:
            pictures: Paths of files, their bytes, files opened for bytes, Pillow images, or the result of `pixels`. A single
                picture counts as a list of one.

        Returns:
            Unit vectors, float32 [n width].

        Raises:
            Unreadable: A picture cannot be read.
            UserError: The model cannot embed.
        """
        self._require("embed")
        image = self.pixels(pictures)
        vectors = np.empty((len(image), self.width), np.float32)
        for rows in blocks(len(image), ROWS):
            vectors[rows] = self._run(self.model.embed_image, image[rows]).numpy()
        return vectors

    def texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embeds texts.

        Args:
            texts: Texts. Each is cleaned like a caption, and cut after `max_length` tokens. A single text counts as a list of
                one.

        Returns:
            Unit vectors, float32 [n width].

        Raises:
            UserError: The model cannot embed.
        """
        self._require("embed")
        texts = [texts] if isinstance(texts, str) else texts
        # Texts of similar length share a pass through the model, so that little padding is computed.
        order = np.argsort(self.lengths(texts), kind="stable")
        vectors = np.empty((len(texts), self.width), np.float32)
        for part in blocks(len(texts), ROWS):
            rows = order[part]
            vectors[rows] = self._run(self.model.embed_text, None, [texts[i] for i in rows]).numpy()
        return vectors

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Counts the tokens of each text, <s> and </s> included, after it is cut."""
        return self.tokenizer.lengths(_cleaned(texts), self.max_length).tolist()

    def readings(self, texts: str | Sequence[str]) -> list[Reading]:
        """Returns how the tokenizer reads each text: its number of tokens, the part that is cut off, and its unknown words."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.tokenizer.readings(_cleaned(texts), self.max_length)

    def caption(self, pictures: PictureBatch) -> list[str]:
        """Writes a caption for each picture, by greedy decoding.

        Raises:
            Unreadable: A picture cannot be read.
            UserError: The model cannot write captions.
        """
        self._require("caption")
        pictures = _as_list(pictures)
        captions: list[str] = []
        for rows in blocks(len(pictures), ROWS):
            ids_BT = self._run(partial(greedy, self.model), self.pixels(pictures[rows]))
            captions += map(self.tokenizer.decode, ids_BT.tolist())
        return captions

    def answer(self, pictures: PictureBatch, questions: str | Sequence[str]) -> list[str]:
        """Answers one question about each picture. The answer is one of those that the model was fine-tuned to choose from.

        Raises:
            Unreadable: A picture cannot be read.
            UserError: The model cannot answer questions.
        """
        self._require("answer")
        return [self._answers[i] for part in self._pairs(self._answer, pictures, questions) for i in part.argmax(1)]

    def match(self, pictures: PictureBatch, texts: str | Sequence[str]) -> np.ndarray:
        """Scores how well each picture matches its text, by layers that read both together.

        Returns:
            float32 [n]; larger is better. Compare only scores of the same text, or of the same picture.

        Raises:
            Unreadable: A picture cannot be read.
            UserError: The model has not learned to match, or the numbers of pictures and texts differ.
        """
        self._require("match")
        return np.concatenate([np.empty(0, np.float32), *map(np.asarray, self._pairs(self._match, pictures, texts))])

    def _pairs(self, head: PairHead | None, pictures: PictureBatch, texts: str | Sequence[str]) -> Iterator[Tensor]:
        """Runs a head on picture i and text i, and yields the rows of each pass."""
        assert head is not None
        pictures, texts = _as_list(pictures), [texts] if isinstance(texts, str) else texts
        if len(pictures) != len(texts):
            raise UserError(f"{len(pictures)} pictures and {len(texts)} texts; give one text for each picture")
        for rows in blocks(len(texts), ROWS):
            yield self._run(head, self.pixels(pictures[rows]), texts[rows])

    def _run(self, function: Callable[..., Tensor], image: Tensor | None, texts: Sequence[str] | None = None) -> Tensor:
        """Calls a function with the states of images, with the ids and lengths of texts, or with both. Returns its result
        on the CPU, with floats in fp32."""
        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            states = () if image is None else (self.model.encode_image(image.to(self.device)),)
            words = () if texts is None else (part.to(self.device) for part in self._ids(texts))
            result = function(*states, *words).cpu()
        return result.float() if result.is_floating_point() else result

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.tokenizer.encode(_cleaned(texts), self.max_length)

    def _decode(self, i: int, picture: Picture) -> Tensor:
        try:
            if not isinstance(picture, Image.Image):
                picture = _encoded(picture)
                record = Record(key=str(i), images=(picture,), info={})
                return decode(record, self.transform, max_pixels=self.max_pixels).images[0]
            if picture.width * picture.height > self.max_pixels:
                raise ValueError(f"{picture.width}x{picture.height} pixels are more than the {self.max_pixels} allowed")
            return self.transform(opened_pixels(picture))
        except RecordError as error:
            raise Unreadable(i, error.reason) from error
        except (OSError, ValueError) as error:
            raise Unreadable(i, str(error)) from error

    def _require(self, ability: EmbedderAbility) -> None:
        if ability not in self.can:
            raise UserError(
                f"{self.card.get('name', 'this export')} cannot {ability}; it can {', '.join(sorted(self.can)) or 'nothing'}. "
                f"Export a run that has learned to {ability}"
            )


def _cleaned(texts: Sequence[str]) -> list[str]:
    return [clean_text(text) or "" for text in texts]


def _as_list(pictures: PictureBatch) -> Sequence[Picture] | Tensor:
    """Returns one picture as a list of one."""
    if isinstance(pictures, str | PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(pictures, "read"):
        return [pictures]  # type: ignore[list-item]
    return pictures


def _read(i: int, picture: Picture) -> bytes:
    try:
        return _encoded(picture)
    except (OSError, ValueError) as error:
        raise Unreadable(i, str(error)) from error


def _encoded(picture: Any) -> bytes:
    """Returns the bytes of a picture file. Raises OSError, or ValueError if `picture` is neither a file nor bytes."""
    if isinstance(picture, str | PathLike):
        return Path(picture).read_bytes()
    if hasattr(picture, "read"):
        # The caller may already have read the beginning of the file.
        if picture.seekable():
            picture.seek(0)
        picture = picture.read()
    if not isinstance(picture, bytes | bytearray | memoryview):
        raise ValueError(
            f"a {type(picture).__name__} is no picture; give a path, bytes, a file opened with 'rb' or a Pillow image"
        )
    return bytes(picture)


def answer_head(saved: Saved) -> PairHead:
    """Returns the head of a model that was fine-tuned to answer questions. Its outputs are logits over the answers [B A]."""
    from fastvlp.tasks.heads import HeadObjective

    name = next(name for name, able in abilities(saved).items() if "answer" in able)
    head = load_objective(saved, name).requires_grad_(False)
    assert isinstance(head, HeadObjective)

    def logits(image_BKD: Tensor, ids_BL: Tensor, length_B: Tensor) -> Tensor:
        batch = Batch(image=image_BKD, ids=ids_BL, length=length_B, seed=torch.zeros_like(length_B))
        return head.logits(saved.model, image_BKD, batch)

    return logits


def mean_direction(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the normalised mean [E] of unit vectors; the first of them if the mean is zero."""
    total = np.sum(vectors, axis=0)
    length = float(np.linalg.norm(total))
    return total / length if length > 1e-6 else vectors[0]


def _why_no_export(folder: Path) -> str:
    if not folder.is_dir():
        return "this folder does not exist; give the folder of an export"
    if (folder / "model.json").is_file():
        return f"this is a run or a converted model, not an export; run `vlp export {folder} FOLDER`, and give FOLDER"
    return "this is not an export, it has no card.json; make one with `vlp export RUN FOLDER`"
