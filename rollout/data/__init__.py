"""Where samples come from: MIMIC-IV tables or a synthetic cohort, PyHealth datasets and tasks, their vocabularies."""
