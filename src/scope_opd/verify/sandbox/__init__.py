"""Running programs that nobody has read: bubblewrap around a small driver, and only plain data across the pipes.

``driver``, ``plain`` and ``processes`` run inside; ``bubblewrap`` and ``seccomp`` build the wall; ``process`` holds one
sandbox from outside, and ``guard`` ends those that a killed process leaves.
"""
