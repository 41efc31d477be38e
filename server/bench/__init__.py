"""`lrt-bench`: speed as ratios within one run, beside what the machine could do. The house in files:

`__main__` runs a mode; `arguments` are its flags, `report` its table and JSON, `limits` the machine's measured limits,
`repeat` the interleaved repetitions. Modes: `offline`, `prefill`, `serve`, `kernels`, `growth`, `checkpoint`. The engine's
modes stand on `model` (what is measured), `cost` (what a step must read and compute) and `work` (how an engine is driven);
`serve` on `http_client`, `load`, `api_probe`, `processes` and `worker`.

Every figure is the median of several repetitions with the spread beside it, because machines, and hours on shared machines,
differ. What is compared takes turns: a, b, a, b.
"""
