"""An index engine as a user may write one, in a file of their own: exact search over one NumPy file.

vlp --import numpy_engine.py index build numpy:photos.npz --export EXPORT --data SHARDS --images none
"""

import json
from pathlib import Path

import numpy as np

from fastvlp.errors import UserError
from fastvlp.search.engines.interface import Hit, IndexEngine, Item, checked_stamp


class NumpyIndex(IndexEngine):
    prefixes = ("numpy:",)
    address = "numpy:FILE, searched exactly"

    def __init__(self, uri, stamp=None, create=False):
        self.path = Path(uri.removeprefix("numpy:"))
        self.items = {}
        if self.path.exists():
            with np.load(self.path) as file:
                head, vectors = json.loads(str(file["head"])), file["vectors"]
            self.stamp = checked_stamp(head["stamp"], stamp, uri)
            self.items = {id: Item(id, vector, info) for (id, info), vector in zip(head["items"], vectors)}
        elif create:
            self.stamp = stamp
            self._save()
        else:
            raise UserError(f"{uri}: no index here; make one with `vlp index build`")

    def _save(self):
        head = {"stamp": vars(self.stamp), "items": [(item.id, item.info) for item in self.items.values()]}
        vectors = np.array([item.vector for item in self.items.values()], np.float32)
        # First another file, then renamed: a process that is killed leaves the old one whole.
        new = self.path.with_suffix(".new.npz")
        np.savez(new, head=json.dumps(head), vectors=vectors.reshape(-1, self.stamp.width))
        new.replace(self.path)

    def _add(self, ids, vectors, infos):
        self.items |= {id: Item(id, vector, dict(info)) for id, vector, info in zip(ids, vectors, infos)}
        self._save()

    def _delete(self, ids):
        count = sum(self.items.pop(id, None) is not None for id in ids)
        self._save()
        return count

    def _search(self, vectors, k, offset, where):
        fitting = [
            item for item in self.items.values() if all(item.info.get(name) in values for name, values in where.items())
        ]
        if not fitting:
            return [[] for _ in vectors]
        scores = vectors @ np.stack([item.vector for item in fitting]).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, offset : offset + k]
        return [[Hit(fitting[i].id, float(row[i]), fitting[i].info) for i in order] for row, order in zip(scores, best)]

    def _get(self, ids):
        return [self.items[id] for id in ids if id in self.items]

    def count(self):
        return len(self.items)

    def close(self):
        pass
