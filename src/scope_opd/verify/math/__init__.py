"""The maths verifier: what counts as a final answer (``extract``), and when two are equal."""
