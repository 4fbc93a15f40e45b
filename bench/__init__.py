"""The benchmark: paired, gated against float64, judged against the best stock arm. `python -m bench --help`.

    cases      what is measured: shapes, dtypes, modes, suites
    workloads  per op: FLOP and byte formulas, inputs, float64 truth, and every way (arm) to compute it
    gate       no number for an arm that computes something else
    clocks     how one block of launches is timed
    measure    rounds over all arms in shuffled order, until the interval is narrow
    stats      median of per-round ratios, bootstrap interval, verdict
    verdict    ratios and rates of a row, fastops against the best stock arm
    run        one case into one row; runner: one suite into one JSON file
    table, compare, report   what people read

docs/measuring.md says why each of these is the way it is.
"""
