"""Metrics, and evaluations of a run without fine-tuning.

Metrics are pure functions of arrays: `ranks` (retrieval), `classification`, `composition`, `caption_metrics`. Measurements of
a model: `cloze`, `pair_scores`. Evaluations of a saved run are functions `evaluate_NAME(run, /, *, data, ...) -> Evaluation`,
one in a file: `embedding_retrieval`, `zeroshot`, `probe`, and benchmarks of composition, `sugarcrepe`, `winoground` and `vsr`.
They share how a run is loaded (`encoding`), how a split is read (`split_reading`) and embedded (`embedding`), how published
items and pictures are read (`benchmark_items`, `picture_files`) and scored (`pair_methods`), how images get their classes
(`labelled_images`, `public_sets`), and how results are kept (`evaluation`). `mteb_scores` has mteb measure an export.
"""
