"""Measures `jattn` beside its peers: `python -m bench.speed`, read `README.md` here."""
