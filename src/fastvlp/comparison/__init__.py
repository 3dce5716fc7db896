"""Comparisons: several recipes, the same training time for each, on one device.

`compare` reads the options and names the arms (a recipe with its settings). `turns` trains them by turns and asks `scoring`
for scores on the way, by the metrics in `metrics/`. `results` is what results.json holds, `summary` means and times over
seeds; `report`, `charts` and `progress` show them.
"""
