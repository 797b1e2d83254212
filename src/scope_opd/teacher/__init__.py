"""Teachers: who scores responses. ``local`` does it in the process."""
