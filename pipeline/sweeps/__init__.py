"""Many trials from one file: which settings to try, and what that plans."""
