"""Honest evaluation: how often a checkpoint is right, clean and under attack, and whether to believe it."""
