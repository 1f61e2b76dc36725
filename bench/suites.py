"""The suites by name: `python -m bench.run --suite NAME` runs one alone. What each times: the table in README.md."""

# Suite → the file in bench/ and its test function, if not all of them are the suite.
SUITES = {
    "rows from maps": "test_chains.py::test_rows_from_maps",
    "rows from maps, warm": "test_chains.py::test_warm",
    "rows from bf16 maps": "test_chains.py::test_bfloat16",
    "memory against layers": "test_chains.py::test_memory_against_layers",
    "full matrix": "test_chains.py::test_full_matrix",
    "rows from Q,K": "test_chains.py::test_rows_from_qk",
    "other methods": "test_chains.py::test_methods",
    "model families": "test_models.py::test_family",
    "BERT-base from tokens": "test_models.py::test_bert_base",
    "overhead of capture": "test_models.py::test_overhead",
    "PyHealth end to end": "test_pyhealth_end_to_end.py::test_attribute",
    "PyHealth on real records": "test_pyhealth_end_to_end.py::test_real_records",
    "class-specific relevance": "test_pyhealth_end_to_end.py::test_class_specific",
    "one visit to each score": "test_pyhealth_end_to_end.py::test_visits",
    "evaluation": "test_evaluation.py",
    "cohort run": "test_cohort.py::test_cohort",
    "scaling": "test_scaling.py::test_scaling",
    "kernels on a GPU": "test_gpu.py::test_kernel",
}


def select(wanted: list[str]) -> dict[str, list[str]]:
    """What to hand to pytest, one call a file: file → its node ids, for the suites wanted."""
    found: dict[str, list[str]] = {}
    for node in dict.fromkeys(SUITES[name] for name in wanted):
        found.setdefault(node.partition("::")[0], []).append(f"bench/{node}")
    return found
