"""The verifiers: what decides whether a response is right, and so which path it takes.

``answers`` sends each answer to ``math_verifier`` or ``code`` by its form; ``boxed`` compares the last boxed answer as
text. The zoo brings its own verifier for its own task.
"""
