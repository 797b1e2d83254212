"""The objective of SCOPE and its rivals: pure functions on tensors, torch only, no engine in sight.

A method (``methods``) gives every rollout of a group two numbers, ``reinforce`` and ``distill``. ``aggregate`` folds
the denominators of the whole optimiser step into them. ``surrogate`` turns them, token by token, into one loss:

    A_t = reinforce + distill * (log pi_T(a_t) - sg log pi_theta(a_t)),      loss = - sum_t sg(c_t) rho_t A_t

Errors are ``ValueError`` with the row index; callers add the rollout's id. Source: arXiv 2604.10688, Eq. 1-6.
"""
