"""What keeps the page small however large the cohort is. The page says each bound where it applies."""

FEATURES = 12
CODES = 15
LABELS = 4
LABEL_CODES = 6
PLACES = 40
SAMPLES = 6
PATIENT_SAMPLES = 12
CHIPS = 150
VISITS = 20
VISIT_CODES = 16
LEADERS = 8
ERRORS = 8
SESSIONS = 8
METHODS = 12
GROUPS = 8
NOTES = 12
TEXT = 160
NAME = 240
"""Of a code's name: long enough for both titles of an ambiguous one."""
MANIFEST = 20_000
EXACT_PATIENTS = 2_000_000
"""Samples up to which patients are counted exactly; beyond, they are estimated, and the page says so."""
