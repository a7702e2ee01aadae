"""Other model servers with the same model, for comparison; each runs in a virtual environment of its own."""
