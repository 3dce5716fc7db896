"""Data: from what people have to batches on the device. The path of one line of a csv:

    photos.csv:  img/7.jpg,a dog on a beach
      |
      |  vlp data import photos.csv --out photos           (once)
      |
      |  sources/table.py     reads the rows of one image; other formats: the other files of sources/
      |                       -> Record(key="img/7", images=(bytes,), info={"captions": ["a dog on a beach"]})
      |  sources/importing.py checks fields, decodes the image once, makes it smaller, chooses a split
      |  records/shards.py    writes the record into a tar
      v
    photos/train/00000.tar:  img/7.jpg, img/7.json
      |
      |  vlp pretrain RECIPE                               (every epoch)
      |
      |  pairs.py             PairData, a field of the recipe: which shards, captions and regions
      |  loader.py            which records make batch number s, by seed and rank; batching.py groups them by length
      |  records/split_index.py where the record is in its tar
      |  reader.py            opens it: the image from the cache, or
      |  records/decode.py    bytes -> pixels, for a JPEG at a reduced scale
      |  records/transform.py pixels -> the model's square, uint8 [3 size size]
      |  regions.py           boxes of objects or a detector -> fractions of that square
      |  pairs.py             one of its captions, chosen by the row's seed
      |  tokenize.py          caption -> ids [L]
      |  prefetch.py          keeps batches ready while the model computes
      v
    Batch (fastvlp/batch.py):  image [B 3 size size], ids [B L], length [B], seed [B], regions
      |
      |  augment.py           crops, flips and changes colours on the device
      v
    the model

Beside the path: `world/` makes the embedded corpus, `sources/inspection.py` shows what is in a folder of shards, `splits.py`
finds its splits, `answers.py` compares answers as VQA does, `streams.py` has threads and progress bars.
"""
