"""Comparisons: several recipes, the same training time for each, on one device.

`compare` reads the options, `prepared_arms` makes the arms (a recipe with its settings), `continued` reads those of a
comparison that is continued, and `plan` says when they train. `turns` trains them by turns (`arm_training` is one of them) and
asks `scoring` for scores on the way, by the metrics in `metrics/`. `results` is what results.json holds, `summary` means and
times over seeds; `report`, `charts` and `progress` show them. `speed_records` measures one recipe until it reaches a score.
"""
