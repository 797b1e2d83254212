"""The code verifier: formats of tasks, and running solutions against tests."""
