"""An export target as a user may write one, in a file of their own: the image vector of a grey picture and the word table.

vlp --import numpy_target.py export RUN OUT --to numpy
"""

import json

import numpy as np
import torch

from fastvlp.exporters.interface import ExportTarget


def grey_vector(model):
    size = model.config.image.size
    with torch.no_grad():
        return model.embed_image(model.encode_image(torch.full((1, 3, size, size), 128, dtype=torch.uint8)))[0].numpy()


class NumpyExport(ExportTarget):
    name = "numpy"
    summary = "two arrays"
    files = ("arrays.npz", "card.json")
    tolerance = 1e-3

    def misfit(self, source):
        return None if source.saved.model.config.embed else "its images have no vectors; export a run with model.embed"

    def write(self, source, folder):
        model = source.saved.model
        words = model.text.word_table.detach().numpy().astype(np.float16)
        np.savez(folder / "arrays.npz", words=words, grey=grey_vector(model))
        (folder / "card.json").write_text(json.dumps(dict(source.card)))

    def differences(self, source, folder):
        model = source.saved.model
        with np.load(folder / "arrays.npz") as arrays:
            words = np.abs(arrays["words"] - model.text.word_table.detach().numpy()).max()
            return {"words": float(words), "grey picture": float(np.abs(arrays["grey"] - grey_vector(model)).max())}
