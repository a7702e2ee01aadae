"""Offline training: data, attacks, losses, pre-training, joint training and evaluation."""
