"""The vectors of `vlp embed`, searched where they lie: their codes are in memory, they themselves stay on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastvlp.errors import UserError
from fastvlp.files import whole_file
from fastvlp.search.bulk import open_embedded, read_part
from fastvlp.search.hashing import HashSearch, learned_projection
from fastvlp.search.index import CODES, Hit, Item, Scalar, Stamp, Where, agreed, as_fields, choices, page, rows

VECTORS = "vectors.npy"
BITS = 256
# Of a search for k: so many are scored exactly (bench/retrieval.py: recall@10 of 0.999 or more).
LEAST, EACH = 1000, 20
FIXED = "it is searched as it was embedded; to add and delete, make an index of it: vlp index build INDEX FOLDER"


class CodesIndex:
    """codes:FOLDER. A search takes 1 / 13 of the exact product's time and memory of 32 bytes a vector, besides ids and infos
    (bench/retrieval.py); a filter looks at every item. Nothing can be added or deleted."""

    def __init__(self, uri: str, stamp: Stamp | None = None):
        folder = Path(uri.removeprefix(CODES))
        embedded = open_embedded(folder)
        self.uri, self._stamp = uri, agreed(as_fields(embedded.stamp), stamp, uri)
        self._ids: list[str] = []
        self._infos: list[dict[str, Scalar]] = []
        texts, total_E = 0, np.zeros(self._stamp.width)
        for part in map(read_part, embedded.parts):
            self._ids += part.ids
            self._infos += part.infos
            texts, total_E = texts + len(part.text), total_E + part.text.sum(0)
        if not self._ids:
            raise UserError(f"{folder}: no image is embedded in it; dropped.jsonl says why")
        self._places = {id: place for place, id in enumerate(self._ids)}
        vector_NE = on_disk(folder / VECTORS, embedded.parts, (len(self._ids), self._stamp.width))
        self._search = HashSearch(vector_NE, learned_projection(vector_NE, BITS))
        # Texts lie in a cone of their own, and what their codes tell is where in it.
        image_E = self._search.projection.mean_E
        self._means = np.stack([image_E, total_E / texts if texts else image_E]).astype(np.float32)

    @property
    def stamp(self) -> Stamp:
        return self._stamp

    def add(self, ids: Sequence[str], vectors: np.ndarray, infos: Sequence[Mapping[str, Scalar]]) -> None:
        raise UserError(FIXED)

    def delete(self, ids: Sequence[str]) -> int:
        raise UserError(FIXED)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None, offset: int = 0) -> list[list[Hit]]:
        depth, query_QE = page(k, offset), rows(vectors, self._stamp.width)
        among_N = self._among(choices(where))
        found = []
        for query_E in query_QE:
            mean_E = self._means[(self._means @ query_E).argmax()]
            places, scores = self._search.search(
                query_E[None], depth, max(LEAST, EACH * depth), mean_E=mean_E, among_N=among_N
            )
            hits = zip(places[0, offset:].tolist(), scores[0, offset:].tolist())
            found.append([Hit(self._ids[place], score, self._infos[place]) for place, score in hits])
        return found

    def _among(self, wanted: Mapping[str, Sequence[Scalar]]) -> np.ndarray | None:
        if not wanted:
            return None
        fits = (all(info.get(name) in values for name, values in wanted.items()) for info in self._infos)
        return np.fromiter(fits, bool, len(self._infos))

    def count(self) -> int:
        return len(self._ids)

    def get(self, ids: Sequence[str]) -> list[Item]:
        places = [self._places[id] for id in ids if id in self._places]
        return [Item(self._ids[at], np.array(self._search.vector_NE[at]), self._infos[at]) for at in places]

    def close(self) -> None:
        """Nothing to do: it holds memory alone, and a file that is mapped into it."""


def on_disk(path: Path, parts: Sequence[Path], shape: tuple[int, int]) -> np.ndarray:
    """The parts' vectors of images [N E] in one file beside them, which is read where it is asked for; made the first time."""
    if not path.exists():
        with whole_file(path, f"{path.name}.{os.getpid()}.tmp") as new:
            kept, first = np.lib.format.open_memmap(new, "w+", np.float32, shape), 0
            for part in map(read_part, parts):
                kept[first : first + len(part.image)] = part.image
                first += len(part.image)
            kept.flush()
    found: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if found.shape != shape:
        raise UserError(f"{path}: of {list(found.shape)}, and the folder's parts have {list(shape)}; delete it")
    return found
