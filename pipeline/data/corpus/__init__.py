"""An original instruction corpus, written for this project and dedicated to the public domain (CC0 1.0); see README.md."""
