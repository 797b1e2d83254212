"""The code verifier: answers and layouts, which program a response holds, and whether it passes its tests."""
