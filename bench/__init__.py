"""Benchmarks of every operator; installed as `ppmoe_ops.benchmarks`, run by `ppmoe_ops.bench`.

`inputs` builds what operators are called with, `timer` times callables in turns, `harness` turns a
case into a checked row, `bench_<family>` lists the cases, `targets` says what rows are held to, and
`report`, `compare`, `phases` and `growth` are what people run.
"""
