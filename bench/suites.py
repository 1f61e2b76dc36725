"""The suites by name: which file and which of its tests. `python -m bench.run --suite NAME` runs one alone."""

# Suite → (file in bench/, its test functions; none: the whole file).
SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rows from maps": ("test_rows_from_maps.py", ("test_float32",)),
    "rows from maps, warm": ("test_rows_from_maps.py", ("test_warm",)),
    "rows from bf16 maps": ("test_rows_from_maps.py", ("test_bfloat16",)),
    "memory against layers": ("test_rows_from_maps.py", ("test_memory_against_layers",)),
    "head sum": ("test_rows_from_maps.py", ("test_head_sum",)),
    "full matrix": ("test_full_matrix.py", ()),
    "rows from Q,K": ("test_rows_from_qk.py", ()),
    "other methods": ("test_other_methods.py", ()),
    "model families": ("test_families.py", ()),
    "BERT-base from tokens": ("test_capture.py", ("test_bert",)),
    "overhead of capture": ("test_capture.py", ("test_overhead",)),
    "PyHealth end to end": ("test_pyhealth_end_to_end.py", ("test_attribute",)),
    "overhead of capture, PyHealth": ("test_pyhealth_end_to_end.py", ("test_overhead",)),
    "cohort run": ("test_cohort.py", ()),
}
SCALING = "scaling"  # bench/scaling.py, no test file: each provider runs in a process of its own
NAMES = (*SUITES, SCALING)


def selections(wanted: list[str]) -> dict[str, list[str]]:
    """What to hand to pytest, one call a file: file → its node ids, for the suites wanted.

    Raises:
        ValueError: a name is not a suite's.
    """
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise ValueError(f"suite must be one of {', '.join(NAMES)}; got {', '.join(unknown)}")
    found: dict[str, list[str]] = {}
    for name in wanted:
        if name == SCALING:
            continue
        file, functions = SUITES[name]
        nodes = found.setdefault(file, [])
        nodes += [f"bench/{file}::{function}" for function in functions] or [f"bench/{file}"]
    return {file: list(dict.fromkeys(nodes)) for file, nodes in found.items()}
